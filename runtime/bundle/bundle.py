"""The bundle: a folder with everything a device needs, described and hashed by its manifest.

Nothing here loads a graph; assistant.py and the backends do.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiny_align.runtime.bundle.embeddings import EMBEDDINGS, EmbeddingTable, load_table
from tiny_align.runtime.bundle.manifest import MANIFEST, Manifest, read_manifest
from tiny_align.runtime.bundle.users import GENERAL, UserProjector, check_user, digest_of
from tiny_align.runtime.checks import is_utf8
from tiny_align.runtime.errors import BundleError, UserError
from tiny_align.runtime.files import read_errors, sha256
from tiny_align.runtime.speech_vocabulary import read_speech_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. `Bundle.open` checks it; the paths are then safe to load."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> "Bundle":
        """Read the manifest and check that every file is there and, with `verify`, unchanged.

        Raises:
            BundleError: no bundle at `path`, another schema, or a file that is missing or has
                changed.
        """
        path = Path(path)
        bundle = cls(path, read_manifest(path))
        bundle._check_graphs_are_listed()
        for name, expected in bundle.manifest.files.items():
            with read_errors(path / name, BundleError):
                bundle._check_file(name, expected if verify else None)
        bundle._check_weights()
        return bundle

    def _check_graphs_are_listed(self) -> None:
        graphs = []
        for graph in self.manifest.graphs.values():
            graphs += [graph, *graph.backends.values()]
        unlisted = {graph.file for graph in graphs} - set(self.manifest.files)
        if unlisted:
            raise BundleError(
                f"{self.path / MANIFEST} lists no hash of {', '.join(sorted(unlisted))}: "
                "export the bundle again"
            )

    def _check_file(self, name: str, expected: str | None) -> None:
        if not (self.path / name).is_file():
            raise BundleError(
                f"{self.path} lacks {name}, which its manifest lists: "
                "copy or export the bundle again"
            )
        if expected and sha256(self.path / name) != expected:
            raise BundleError(
                f"{self.path / name} has changed: its SHA-256 is not the manifest's. "
                "Copy or export the bundle again"
            )

    def _check_weights(self) -> None:
        """The projector's weights lie within its data file."""
        if not self.manifest.projector_weights:
            return
        end = max(w.offset + 4 * math.prod(w.shape) for w in self.manifest.projector_weights)
        data = Path(f"{self.graph('projector')}.data")
        if not data.is_file() or data.stat().st_size < end:
            raise BundleError(
                f"{data} has no room for the weights that the manifest puts there, up to byte "
                f"{end}: copy or export the bundle again"
            )

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def embeddings(self) -> Path:
        return self.path / EMBEDDINGS

    @property
    def sentences(self) -> Path:
        """What a user may be asked to read, one sentence per line; not every bundle has them."""
        return self.path / "sentences.txt"

    @property
    def replay(self) -> Path:
        """The rehearsal data of a user's training; not every bundle has them."""
        return self.path / "replay.npz"

    def graph(self, name: str, backend: str | None = None) -> Path:
        """The file of a graph: the one that `backend` takes, or the standard one."""
        if name not in self.manifest.graphs:
            raise BundleError(
                f"{self.path} has no graph {name!r}, it has {', '.join(self.manifest.graphs)}: "
                "export the bundle again"
            )
        return self.path / self.manifest.graphs[name].on(backend).file

    def projector(self, user: str | None = None, users: Path | None = None) -> Path:
        """The projector graph of a user, checked; None: the general one.

        Args:
            users: the folder of users, if not the bundle's own.
        Raises:
            UserError: see check_user.
        """
        if user is None or user == GENERAL:
            return self.graph("projector")
        folder = self.user_folder(user, users)
        check_user(folder, self.manifest)
        return folder / self.manifest.graphs["projector"].file

    def user_projector(self, user: str | None = None, users: Path | None = None) -> UserProjector:
        """The projector of a user, checked, with its speech vocabulary; None: the general one.

        Args:
            users: the folder of users, if not the bundle's own.
        Raises:
            UserError: see check_user.
            BundleError: the list of speech tokens cannot be read.
        """
        if user is None or user == GENERAL:
            graph = self.graph("projector")
            digest = digest_of(self.manifest.files)
            return UserProjector(None, self.path, graph, digest, self.speech_tokens())
        folder = self.user_folder(user, users)
        digest = digest_of(check_user(folder, self.manifest)["files"])
        graph = folder / self.manifest.graphs["projector"].file
        return UserProjector(user, folder, graph, digest, self.speech_tokens(graph))

    def speech_tokens(self, projector: Path | None = None) -> np.ndarray:
        """(K,) int32: the tokens that a projector's speech may produce, in training order.

        Args:
            projector: the file that `projector` gave; None: the general one.
        Raises:
            BundleError: a list that cannot be read, or of another LLM's tokens.
        """
        folders = [self.path] if projector is None else [projector.parent, self.path]
        return read_speech_tokens(folders, self.manifest.llm.vocabulary)

    def load_tokenizer(self) -> "Tokenizer":
        """The LLM's tokenizer.

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

    def load_embeddings(self) -> EmbeddingTable:
        """The LLM's embedding table (V, D), mapped.

        Raises:
            BundleError: a file cannot be read, or is of another size.
        """
        return load_table(self.path, self.manifest.llm.hidden_size)

    def for_user(self, folder: Path) -> "Bundle":
        """A user's folder as a bundle of one graph, so that its engine is built and checked alike.

        Raises:
            UserError: see check_user.
        """
        graphs = {"projector": self.manifest.graphs["projector"]}
        files = check_user(folder, self.manifest)["files"]
        return Bundle(folder, dataclasses.replace(self.manifest, graphs=graphs, files=files))

    def user_folder(self, user: str, users: Path | None = None) -> Path:
        """Where a user's projector belongs; it need not be there.

        Args:
            users: the folder of users, if not the bundle's own.
        Raises:
            UserError: a name that cannot be.
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", user):
            raise UserError(
                f"{user!r} is no user name: use letters, digits, '.', '_' and '-', at most 64"
            )
        if user == GENERAL:
            raise UserError(
                f"{user!r} is the bundle's own projector, for users without one: "
                "choose another name"
            )
        folder = Path(users or self.path / "users") / user
        if not is_utf8(str(folder)):
            raise UserError(
                f"{str(folder)!r} is not UTF-8, as the backends want it: rename the folder"
            )
        return folder
