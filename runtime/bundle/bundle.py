"""The bundle: a folder with everything a device needs, described and hashed by its manifest.

Nothing here loads a graph; assistant.py and the backends do.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiny_align.runtime.bundle.manifest import MANIFEST, Manifest, read_manifest
from tiny_align.runtime.bundle.users import GENERAL, check_user
from tiny_align.runtime.checks import is_utf8
from tiny_align.runtime.errors import BundleError, UserError
from tiny_align.runtime.files import ARRAY_ERRORS, read_errors, sha256

SPEECH_TOKENS = "speech_tokens.npy"


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `Bundle.open` checks it; the paths are then safe to load."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path, *, verify: bool = True) -> "Bundle":
        """Read the manifest and check that every file is there and, with `verify`, unchanged.

        Raises:
            BundleError: no bundle at `path`, another schema, or a file that is missing or has changed.
        """
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        graphs = [
            g for one in bundle.manifest.graphs.values() for g in (one, *one.backends.values())
        ]
        unlisted = {g.file for g in graphs} - set(bundle.manifest.files)
        if unlisted:
            raise BundleError(
                f"{path / MANIFEST} lists no hash of {', '.join(unlisted)}: export the bundle again"
            )
        for name, expected in bundle.manifest.files.items():
            with read_errors(path / name, BundleError):
                bundle._check_file(name, expected if verify else None)
        bundle._check_weights()
        return bundle

    def _check_file(self, name: str, expected: str | None) -> None:
        if not (self.path / name).is_file():
            raise BundleError(
                f"{self.path} lacks {name}, which its manifest lists: copy or export the bundle again"
            )
        if expected and sha256(self.path / name) != expected:
            raise BundleError(
                f"{self.path / name} has changed: its SHA-256 is not the manifest's. Copy or export the bundle again"
            )

    def _check_weights(self) -> None:
        """The projector's weights lie within its data file."""
        ends = [w.offset + 4 * math.prod(w.shape) for w in self.manifest.projector_weights]
        data = Path(f"{self.graph('projector')}.data") if ends else None
        if data and (not data.is_file() or data.stat().st_size < max(ends)):
            raise BundleError(
                f"{data} has no room for the weights that the manifest puts there, up to byte {max(ends)}: copy or "
                "export the bundle again"
            )

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def embeddings(self) -> Path:
        return self.path / "token_embeddings.npy"

    @property
    def sentences(self) -> Path:
        """What a person may be asked to read, one sentence per line; not every bundle has them."""
        return self.path / "sentences.txt"

    @property
    def replay(self) -> Path:
        """Features of other people that a person's training goes over, so that nobody is forgotten; or no file."""
        return self.path / "replay.npz"

    def graph(self, name: str, backend: str | None = None) -> Path:
        """The file of a graph: the one `backend` takes, or the plain one."""
        if name not in self.manifest.graphs:
            raise BundleError(
                f"{self.path} has no graph {name!r}, it has {', '.join(self.manifest.graphs)}: export the bundle again"
            )
        return self.path / self.manifest.graphs[name].on(backend).file

    def projector(self, user: str | None = None, users: Path | None = None) -> Path:
        """The projector graph of a person, or the general one for None. `users`: where persons are kept."""
        if user is None or user == GENERAL:
            return self.graph("projector")
        folder = self.user_folder(user, users)
        check_user(folder, self.manifest)
        return folder / self.manifest.graphs["projector"].file

    def speech_tokens(self, projector: Path | None = None) -> np.ndarray:
        """(K,) int32: the tokens that speech is read as with a projector, in the order in which training knows them.

        They are listed in the folder of a person who has words of their own, or else in the bundle's; where neither
        has a list they are the whole vocabulary.

        Args:
            projector: the file that `projector` gave; None: the general one.
        """
        for folder in (self.path if projector is None else projector.parent, self.path):
            if (folder / SPEECH_TOKENS).is_file():
                return self._checked_tokens(folder / SPEECH_TOKENS)
        return np.arange(self.manifest.llm.vocabulary, dtype=np.int32)

    def _checked_tokens(self, path: Path) -> np.ndarray:
        tokens, vocabulary = _load_array(path), self.manifest.llm.vocabulary
        if (
            tokens.ndim != 1
            or tokens.dtype.kind not in "iu"
            or (len(tokens) and not _within(tokens, vocabulary))
        ):
            raise BundleError(
                f"{path} is no list of tokens of this LLM, whole numbers from 0 to {vocabulary - 1}: "
                "export the bundle, or train the person, again"
            )
        return tokens

    def load_tokenizer(self):
        """The LLM's `tokenizers.Tokenizer`.

        Raises:
            BundleError: its file cannot be read, or is of another kind.
        """
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.tokenizer))
        except Exception as error:  # tokenizers raises no other class
            raise BundleError(
                f"{self.tokenizer} cannot be read ({error}): copy or export the bundle again"
            ) from error

    def load_embeddings(self) -> np.ndarray:
        """(V, D) float16, mapped: the LLM's embedding table.

        Raises:
            BundleError: its file cannot be read, or is of another size.
        """
        table, size = _load_array(self.embeddings, mmap_mode="r"), self.manifest.llm.hidden_size
        if table.ndim != 2 or table.shape[1] != size or table.dtype.kind != "f":
            raise BundleError(
                f"{self.embeddings} is {table.dtype} {list(table.shape)}, expected floats of {size} columns, as "
                "many as the manifest gives the LLM: export the bundle again"
            )
        return table

    def for_user(self, folder: Path) -> "Bundle":
        """A person's folder as a bundle of one graph, so that its engine is built and checked like any other.

        Raises:
            UserError: as check_user.
        """
        graphs = {"projector": self.manifest.graphs["projector"]}
        files = check_user(folder, self.manifest)["files"]
        return Bundle(folder, dataclasses.replace(self.manifest, graphs=graphs, files=files))

    def user_folder(self, user: str, users: Path | None = None) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", user):
            raise UserError(
                f"{user!r} is no user name: use letters, digits, '.', '_' and '-', at most 64"
            )
        if user == GENERAL:
            raise UserError(
                f"{user!r} is the bundle's own projector, for everybody: choose another name"
            )
        folder = Path(users or self.path / "users") / user
        if not is_utf8(str(folder)):
            raise UserError(
                f"{str(folder)!r} is not UTF-8, as the backends want it: rename the folder"
            )
        return folder


def _load_array(path: Path, **options) -> np.ndarray:
    """A .npy file of the bundle or of a person."""
    try:
        with read_errors(path, BundleError):
            array = np.load(path, allow_pickle=False, **options)
    except ARRAY_ERRORS as error:
        raise BundleError(f"{path} is damaged ({error}): copy, export or train it again") from error
    if not isinstance(array, np.ndarray):  # an archive
        raise BundleError(f"{path} is damaged (no single array): copy, export or train it again")
    return array


def _within(tokens: np.ndarray, vocabulary: int) -> bool:
    return tokens.min() >= 0 and tokens.max() < vocabulary
