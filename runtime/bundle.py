"""The bundle: a folder with everything a device needs, described and hashed by its manifest.

Nothing here loads a graph; assistant.py and the backends do. The manifest's form is this file: frozen
dataclasses, read from and written to manifest.json.
"""

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PureWindowsPath

import numpy as np

from tiny_align.runtime.checks import Range, check_form, is_utf8
from tiny_align.runtime.errors import BundleError, UserError
from tiny_align.runtime.files import NO_ARRAY, read_errors, sha256, write_json
from tiny_align.runtime.front_end import AnyFrontEnd, front_end_from
from tiny_align.runtime.readout import Readout
from tiny_align.runtime.windows import WindowSpec

SCHEMA = 1
MANIFEST = "manifest.json"
USER_RECORD = "user.json"
SPEECH_TOKENS = "speech_tokens.npy"
GENERAL = "general"  # the bundle's own projector, for everybody
SIZES = {  # what a number of the manifest may be, by the name of its field
    "feature_size": Range(1, 2**20),
    "hidden_size": Range(1, 2**20),
    "head_size": Range(1, 2**20),
    "vocabulary": Range(1, 2**24),
    "n_layers": Range(1, 2**16),
    "n_kv_heads": Range(1, 2**16),
    "max_context": Range(1, 2**24),
    "sample_rate": Range(1_000, 2**20),
    "n_mels": Range(1, 2**12),
    "n_fft": Range(1, 2**20),
    "window_samples": Range(1, 2**20),
    "hop_samples": Range(1, 2**20),
    "padded_samples": Range(1, 2**30),
    "stride": Range(1, 2**12),
    "n_vectors": Range(1, 2**24),
    "vector_samples": Range(1, 2**24),
    "n_features": Range(1, 2**24),
    "frame_s": Range(1e-4, 60, whole=False),
}
READOUTS = ("ctc", "pooled")
DTYPES = ("float32", "float16", "int64", "int32", "bool")  # of a graph's inputs and outputs
PROJECTOR_SIZE = Range(0, 2**20)  # of the sizes that align.build_projector takes


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output; a dimension is a number, or the name of a dynamic one."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class WeightSpec:
    """Where a projector parameter lies in the graph's external data file (little-endian float32)."""

    parameter: str  # name in the PyTorch state dict
    offset: int  # bytes
    shape: tuple[int, ...]  # as stored in the graph
    transposed: bool  # whether the graph stores the parameter's transpose


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle, and what stands in its place for a backend with operators of its own."""

    file: str
    precision: str  # "fp32", "fp16", "int8", "int4": of most of its weights
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: dict = field(default_factory=dict)  # max absolute difference to PyTorch, by length
    backends: dict[str, "GraphSpec"] = field(
        default_factory=dict
    )  # backend -> its graph; the others take this one

    def __post_init__(self):
        for name in ("inputs", "outputs"):
            object.__setattr__(self, name, tuple(_tensor(t) for t in getattr(self, name)))
        made = {
            name: g if isinstance(g, GraphSpec) else GraphSpec(**g)
            for name, g in self.backends.items()
        }
        object.__setattr__(self, "backends", made)

    def on(self, backend: str | None) -> "GraphSpec":
        """The graph that this backend takes."""
        return self.backends.get(backend, self)


def _tensor(value) -> TensorSpec:
    return (
        value
        if isinstance(value, TensorSpec)
        else TensorSpec(value["name"], value["dtype"], tuple(value["shape"]))
    )


@dataclass(frozen=True)
class EncoderSpec:
    feature_size: int  # Da
    frame_s: float  # seconds per encoder frame


@dataclass(frozen=True)
class LlmSpec:
    vocabulary: int  # V
    hidden_size: int  # D
    n_layers: int
    n_kv_heads: int
    head_size: int
    end_tokens: tuple[int, ...]
    max_context: int  # positions: prompt and answer together
    embedding_scale: float = 1.0  # applied to a row of the table before the LLM sees it


@dataclass(frozen=True)
class PromptSpec:
    """The chat template cut at its two holes: before | instruction | between | speech or text | after.

    Where the template says what day it is, a mark stands in the pieces: see `on`.
    """

    before: str
    between: str
    after: str
    instruction: str  # used where the caller gives none
    repeat_instruction: str  # asks for the user's own words; measures the word error rate
    next: str | None = (
        None  # from the end of an answer to the next turn's words; None: the LLM knows one turn only
    )
    dates: dict[str, str] = field(
        default_factory=dict
    )  # mark -> strftime format of the day in its place

    def on(self, day: datetime) -> "PromptSpec":
        """The prompt of a conversation that begins on this day."""
        if not self.dates:
            return self
        pieces = {name: getattr(self, name) for name in ("before", "between", "after", "next")}
        for mark, format_ in self.dates.items():
            text = day.strftime(format_)
            pieces = {name: piece and piece.replace(mark, text) for name, piece in pieces.items()}
        return dataclasses.replace(self, **pieces, dates={})


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle without opening a graph."""

    name: str
    front_end: AnyFrontEnd
    encoder: EncoderSpec
    llm: LlmSpec
    prompt: PromptSpec
    projector: dict  # the projector's class and sizes, as align.build_projector takes them
    projector_weights: tuple[WeightSpec, ...]
    graphs: dict[str, GraphSpec]  # "encoder", "projector", "llm"
    dims: dict[
        str, tuple[int, int, int]
    ]  # least, usual and greatest value of each dynamic dimension
    embeddings_sha256: str  # the LLM's embedding table; a projector is bound to it
    readout: Readout  # how the projector's output becomes soft tokens
    files: dict[str, str]  # every file of the bundle but this one -> SHA-256
    windows: WindowSpec | None = (
        None  # how speech is cut for the encoder; None: not at all, so that nothing streams
    )
    projector_trained: bool = True  # False: the general projector is random still
    schema: int = SCHEMA

    @property
    def encoder_key(self) -> str:
        """Names what features are: the front end, the windows and the encoder, graph and weights (hex SHA-256).

        A parameter of the front end counts where it is not the usual one, so that a new one changes no key.
        """
        fields = dataclasses.fields(self.front_end)
        unusual = {
            f.name: value for f in fields if (value := getattr(self.front_end, f.name)) != f.default
        }
        graph = self.graphs["encoder"].file
        parts = [digest for name, digest in sorted(self.files.items()) if name.startswith(graph)]
        parts += [dataclasses.astuple(self.windows)] if self.windows else []
        return hashlib.sha256(
            json.dumps([self.front_end.kind, unusual, parts], sort_keys=True).encode()
        ).hexdigest()

    @property
    def binding(self) -> dict[str, tuple[str, str]]:
        """What a person's projector is made for: field of their record -> (its name, this bundle's value)."""
        return {
            "encoder_key": ("encoder", self.encoder_key),
            "embeddings_sha256": ("LLM", self.embeddings_sha256),
        }

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "Manifest":
        made = {
            "front_end": front_end_from(value["front_end"]),
            "encoder": EncoderSpec(**value["encoder"]),
            "llm": LlmSpec(**{**value["llm"], "end_tokens": tuple(value["llm"]["end_tokens"])}),
            "prompt": PromptSpec(**value["prompt"]),
            "readout": Readout(**value["readout"]),
            "projector_weights": tuple(
                WeightSpec(w["parameter"], w["offset"], tuple(w["shape"]), w["transposed"])
                for w in value["projector_weights"]
            ),
            "graphs": {name: GraphSpec(**g) for name, g in value["graphs"].items()},
            "dims": {name: tuple(d) for name, d in value["dims"].items()},
            "windows": WindowSpec(**value["windows"]) if value.get("windows") else None,
        }
        return cls(**{**value, **made})


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
        bundle = cls(path, _read_manifest(path))
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
    except NO_ARRAY as error:
        raise BundleError(f"{path} is damaged ({error}): copy, export or train it again") from error
    if not isinstance(array, np.ndarray):  # an archive
        raise BundleError(f"{path} is damaged (no single array): copy, export or train it again")
    return array


def _within(tokens: np.ndarray, vocabulary: int) -> bool:
    return tokens.min() >= 0 and tokens.max() < vocabulary


def _read_manifest(path: Path) -> Manifest:
    if not is_utf8(str(path)):
        raise BundleError(
            f"{str(path)!r} is not UTF-8, as the backends want it: rename the bundle's folder"
        )
    with read_errors(path / MANIFEST, BundleError):
        if not (path / MANIFEST).is_file():
            raise BundleError(
                f"{path} is not a bundle: it has no {MANIFEST}. Give the folder that `tiny-align export` wrote"
            )
        text = (path / MANIFEST).read_bytes()
    try:
        value = json.loads(text.decode())
        schema = value["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path / MANIFEST} is not a manifest ({error}): copy or export the bundle again"
        ) from error
    if schema != SCHEMA:
        raise BundleError(
            f"{path} has schema {schema}, this version reads schema {SCHEMA}: export the bundle again"
        )
    try:
        manifest = Manifest.from_json(value)
        names = [*(graph.file for graph in manifest.graphs.values()), *manifest.files.keys()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{path / MANIFEST} lacks or misnames a field ({error}): export the bundle again"
        ) from error
    if outside := [name for name in names if not _inside(name)]:
        raise BundleError(
            f"{path / MANIFEST} names the file {outside[0]!r}: expected a relative path inside the bundle. "
            "Copy or export the bundle again"
        )
    try:
        _check_numbers(manifest)
    except BundleError as error:
        raise BundleError(f"{path / MANIFEST}: {error}. Copy or export the bundle again") from error
    return manifest


def _check_numbers(manifest: Manifest) -> None:
    """Every size is one that can be, before anything is laid out by it."""
    check_form(manifest, Manifest, "", SIZES, BundleError)
    if manifest.readout.kind not in READOUTS:
        raise BundleError(
            f"readout.kind is {manifest.readout.kind!r}: expected {' or '.join(READOUTS)}"
        )
    for name, value in manifest.projector.items():
        if not isinstance(value, str | None):
            PROJECTOR_SIZE.check(f"projector.{name}", value, BundleError)
    for name, graph in manifest.graphs.items():
        _check_tensors(name, graph, manifest.dims)


def _check_tensors(name: str, graph: GraphSpec, dims: dict) -> None:
    if not graph.inputs or not graph.outputs:
        raise BundleError(
            f"graphs.{name} has no inputs or no outputs: expected at least one of each"
        )
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.dtype not in DTYPES:
            raise BundleError(
                f"graphs.{name}: {tensor.name} is of {tensor.dtype}: expected {', '.join(DTYPES)}"
            )
    for dim in (dim for tensor in graph.inputs for dim in tensor.shape):
        if isinstance(dim, str) and dim not in dims:
            raise BundleError(
                f"graphs.{name} has a dimension {dim!r}: expected one of dims, {', '.join(dims)}"
            )


def _inside(name) -> bool:
    """Whether a file name of a manifest stays in the bundle, on any system."""
    path = PureWindowsPath(name if isinstance(name, str) else "")  # takes / and \ for separators
    return bool(path.parts) and not path.anchor and ".." not in path.parts


def check_user(folder: Path, manifest: Manifest) -> dict:
    """The person's record, after checking that it is whole and made for this encoder and this LLM.

    Raises:
        UserError: nobody of that name, a changed file, or a projector trained for another bundle.
    """
    with read_errors(folder, UserError):
        return _checked_user(folder, manifest)


def _checked_user(folder: Path, manifest: Manifest) -> dict:
    if not (folder / USER_RECORD).is_file():
        known = sorted(p.parent.name for p in folder.parent.glob(f"*/{USER_RECORD}"))
        raise UserError(
            f"no user {folder.name!r} in {folder.parent} (known: {', '.join(known) or 'none'}): "
            f"train one with `tiny-align align --user {folder.name}`"
        )
    try:
        record = json.loads((folder / USER_RECORD).read_text(encoding="utf-8"))
        files, bound_to = (
            dict(record["files"]),
            {name: str(record[name]) for name in manifest.binding},
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / USER_RECORD} is damaged ({error}): train {folder.name!r} again"
        ) from error
    for name, (part, here) in manifest.binding.items():
        if bound_to[name] != here:
            raise UserError(
                f"the projector of {folder.name!r} was trained for another {part} ({name} {bound_to[name][:12]}, "
                f"this bundle has {here[:12]}): train it again with this bundle"
            )
    for name in sorted(
        {manifest.graphs["projector"].file, *files}
    ):  # the graph, even if the record forgot it
        if not (folder / name).is_file() or sha256(folder / name) != files.get(name):
            raise UserError(
                f"{folder / name} is missing or has changed: train {folder.name!r} again"
            )
    return record


def write_user_record(folder: Path, manifest: Manifest, training: dict) -> None:
    """Describe the projector files that lie in `folder`: the last step of writing a person."""
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != USER_RECORD}
    bound_to = {name: here for name, (_, here) in manifest.binding.items()}
    record = {**bound_to, "training": training, "files": files}
    write_json(folder / USER_RECORD, record)


def write_manifest(path: Path, manifest: Manifest) -> Manifest:
    """Hash every file of the bundle in `path` and write the manifest, the last step of an export; returns it."""
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    kept = [n for n in names if n != MANIFEST and not n.startswith(("users/", "engines/"))]
    files = {name: sha256(path / name) for name in kept}
    manifest = dataclasses.replace(manifest, files=files)
    write_json(path / MANIFEST, manifest.to_json())
    return manifest
