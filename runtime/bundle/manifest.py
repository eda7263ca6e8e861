"""The manifest: everything the runtime knows about a bundle without opening a graph.

The dataclasses of this file are its form: they are read from and written to manifest.json.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PureWindowsPath
from typing import Any

from tiny_align.runtime.checks import Range, check_form, is_utf8
from tiny_align.runtime.errors import BundleError
from tiny_align.runtime.files import read_errors, sha256, write_json
from tiny_align.runtime.front_ends.base import AnyFrontEnd, front_end_from
from tiny_align.runtime.readout import Readout
from tiny_align.runtime.windows import WindowSpec

SCHEMA = 1
MANIFEST = "manifest.json"
SIZES = {  # a number's field -> what it may be
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
QUANTISED_ACTIVATIONS = ("none", "dynamic", "static")
DTYPES = ("float32", "float16", "int64", "int32", "bool")  # of a graph's inputs and outputs
PROJECTOR_SIZE = Range(0, 2**20)  # of a size that the projector is built with


@dataclass(frozen=True)
class TensorSpec:
    """A graph's input or output; a dimension is a number, or the name of a dynamic one."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TensorSpec":
        return cls(value["name"], value["dtype"], tuple(value["shape"]))


@dataclass(frozen=True)
class WeightSpec:
    """Where a projector parameter lies in the graph's data file (little-endian float32)."""

    parameter: str  # name in the PyTorch state dict
    offset: int  # bytes
    shape: tuple[int, ...]  # as stored in the graph
    transposed: bool  # whether the graph stores the parameter's transpose

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "WeightSpec":
        shape = tuple(value["shape"])
        return cls(value["parameter"], value["offset"], shape, value["transposed"])


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle, and the graphs of backends with operators of their own."""

    file: str
    precision: str  # "fp32", "fp16", "int8", "int4": of most of its weights
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: dict = field(default_factory=dict)  # differences to PyTorch, see export/parity.py
    # backend -> its graph; the others take this one
    backends: dict[str, "GraphSpec"] = field(default_factory=dict)
    # which activations the graph rounds to 8 bits: "none", or "dynamic" by the range that they have
    # in the call, or "static" by a calibrated range; None: written by an earlier version, not known
    quantised_activations: str | None = None

    def __post_init__(self) -> None:
        """Turn what manifest.json holds into dataclasses; what is one already stays."""
        for name in ("inputs", "outputs"):
            tensors = []
            for tensor in getattr(self, name):
                is_spec = isinstance(tensor, TensorSpec)
                tensors.append(tensor if is_spec else TensorSpec.from_json(tensor))
            object.__setattr__(self, name, tuple(tensors))
        backends = {}
        for backend, graph in self.backends.items():
            backends[backend] = graph if isinstance(graph, GraphSpec) else GraphSpec(**graph)
        object.__setattr__(self, "backends", backends)

    def on(self, backend: str | None) -> "GraphSpec":
        """The graph that this backend takes; None: the standard one."""
        return self if backend is None else self.backends.get(backend, self)


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

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LlmSpec":
        return cls(**{**value, "end_tokens": tuple(value["end_tokens"])})


@dataclass(frozen=True)
class PromptSpec:
    """The chat template in pieces: before | instruction | between | speech or text | after.

    Without an instruction: uninstructed | speech or text | after. Where the template says what day
    it is, a mark stands in the pieces: see `on`.
    """

    before: str
    between: str
    after: str
    instruction: str  # used where the caller gives none; "": none, as `uninstructed`
    repeat_instruction: str  # asks for the user's own words; measures the word error rate
    # from the end of an answer to the next turn's words; None: the LLM knows one turn only
    next: str | None = None
    # mark -> strftime format of the day in its place
    dates: dict[str, str] = field(default_factory=dict)
    # what the template puts before the words without a system message, such as the model's own
    # system text; None: before and between
    uninstructed: str | None = None

    def lead(self, instruction: str) -> str:
        """What stands before the words, spoken or typed."""
        if self.uninstructed is not None and not instruction.strip():
            return self.uninstructed
        return self.before + instruction.strip() + self.between

    def on(self, day: datetime) -> "PromptSpec":
        """The prompt of a conversation that begins on this day."""
        if not self.dates:
            return self
        dates = {mark: day.strftime(format_) for mark, format_ in self.dates.items()}
        pieces: dict[str, Any] = {}
        for name in ("before", "between", "after", "next", "uninstructed"):
            text = getattr(self, name)
            pieces[name] = None if text is None else _replace_all(text, dates)
        return dataclasses.replace(self, **pieces, dates={})


def _replace_all(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime knows about a bundle without opening a graph."""

    name: str
    front_end: AnyFrontEnd
    encoder: EncoderSpec
    llm: LlmSpec
    prompt: PromptSpec
    projector: dict  # the projector's class and sizes, as align's build_projector takes them
    projector_weights: tuple[WeightSpec, ...]
    graphs: dict[str, GraphSpec]  # "encoder", "projector", "llm"
    dims: dict[str, tuple[int, int, int]]  # min, opt and max of each dynamic dimension
    embeddings_sha256: str  # the LLM's embedding table; a projector is bound to it
    readout: Readout  # how the projector's output becomes soft tokens
    files: dict[str, str]  # every file of the bundle but this one -> SHA-256
    # how speech is cut for the encoder; None: not at all, so that nothing streams
    windows: WindowSpec | None = None
    projector_trained: bool = True  # False: the general projector is random still
    schema: int = SCHEMA

    @property
    def encoder_key(self) -> str:
        """Names what decides the features (hex SHA-256).

        That is the front end, the windows and the encoder, graph and weights. A parameter of the
        front end counts only where it is not the default, so that a new one changes no key.
        """
        parameters = {}
        for parameter in dataclasses.fields(self.front_end):
            value = getattr(self.front_end, parameter.name)
            if value != parameter.default:
                parameters[parameter.name] = value
        parts: list[Any] = []
        for name, digest in sorted(self.files.items()):
            if name.startswith(self.graphs["encoder"].file):
                parts.append(digest)
        if self.windows:
            parts.append(dataclasses.astuple(self.windows))
        key = json.dumps([self.front_end.kind, parameters, parts], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()

    @property
    def binding(self) -> dict[str, tuple[str, str]]:
        """What a user's projector is made for: field of the record -> (its name, value here)."""
        return {
            "encoder_key": ("encoder", self.encoder_key),
            "embeddings_sha256": ("LLM", self.embeddings_sha256),
        }

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Manifest":
        """The manifest from the content of manifest.json.

        Raises:
            KeyError, TypeError, AttributeError, ValueError: a field is missing or not known.
        """
        fields = dict(value)
        fields["front_end"] = front_end_from(value["front_end"])
        fields["encoder"] = EncoderSpec(**value["encoder"])
        fields["llm"] = LlmSpec.from_json(value["llm"])
        fields["prompt"] = PromptSpec(**value["prompt"])
        fields["readout"] = Readout(**value["readout"])
        weights = [WeightSpec.from_json(weight) for weight in value["projector_weights"]]
        fields["projector_weights"] = tuple(weights)
        fields["graphs"] = {name: GraphSpec(**graph) for name, graph in value["graphs"].items()}
        fields["dims"] = {name: tuple(bounds) for name, bounds in value["dims"].items()}
        fields["windows"] = WindowSpec(**value["windows"]) if value.get("windows") else None
        return cls(**fields)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the bundle in `path`, its form and every number checked.

    Raises:
        BundleError: no manifest, one of another schema, or one that is damaged.
    """
    file = path / MANIFEST
    value = _read_json(path)
    if value["schema"] != SCHEMA:
        raise BundleError(
            f"{path} has schema {value['schema']}, this version reads schema {SCHEMA}: "
            "export the bundle again"
        )
    try:
        manifest = Manifest.from_json(value)
        names = [*(graph.file for graph in manifest.graphs.values()), *manifest.files.keys()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(
            f"{file} lacks or misnames a field ({error}): export the bundle again"
        ) from error
    for name in names:
        if not _is_inside(name):
            raise BundleError(
                f"{file} names the file {name!r}: expected a relative path inside the bundle. "
                "Copy or export the bundle again"
            )
    try:
        _check_numbers(manifest)
    except BundleError as error:
        raise BundleError(f"{file}: {error}. Copy or export the bundle again") from error
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    """The content of manifest.json; it has a schema."""
    if not is_utf8(str(path)):
        raise BundleError(
            f"{str(path)!r} is not UTF-8, as the backends want it: rename the bundle's folder"
        )
    with read_errors(path / MANIFEST, BundleError):
        if not (path / MANIFEST).is_file():
            raise BundleError(
                f"{path} is not a bundle: it has no {MANIFEST}. "
                "Give the folder that `tiny-align export` wrote"
            )
        text = (path / MANIFEST).read_bytes()
    try:
        value = json.loads(text.decode())
        if "schema" not in value:
            raise KeyError("schema")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"{path / MANIFEST} is not a manifest ({error}): copy or export the bundle again"
        ) from error
    return value


def _check_numbers(manifest: Manifest) -> None:
    """Check that every size is possible, before memory is laid out by it."""
    check_form(manifest, Manifest, "", SIZES, BundleError)
    if manifest.readout.kind not in READOUTS:
        raise BundleError(
            f"readout.kind is {manifest.readout.kind!r}: expected {' or '.join(READOUTS)}"
        )
    for name, value in manifest.projector.items():
        if not isinstance(value, str) and value is not None:
            PROJECTOR_SIZE.check(f"projector.{name}", value, BundleError)
    for name, graph in manifest.graphs.items():
        _check_tensors(name, graph, manifest.dims)


def _check_tensors(name: str, graph: GraphSpec, dims: dict[str, tuple[int, int, int]]) -> None:
    if not graph.inputs or not graph.outputs:
        raise BundleError(
            f"graphs.{name} has no inputs or no outputs: expected at least one of each"
        )
    for spec in (graph, *graph.backends.values()):
        if spec.quantised_activations not in (None, *QUANTISED_ACTIVATIONS):
            raise BundleError(
                f"graphs.{name}: quantised_activations is {spec.quantised_activations!r}: expected "
                f"{', '.join(QUANTISED_ACTIVATIONS)}"
            )
    for tensor in (*graph.inputs, *graph.outputs):
        if tensor.dtype not in DTYPES:
            raise BundleError(
                f"graphs.{name}: {tensor.name} is of {tensor.dtype}: expected {', '.join(DTYPES)}"
            )
    for tensor in graph.inputs:
        for dim in tensor.shape:
            if isinstance(dim, str) and dim not in dims:
                raise BundleError(
                    f"graphs.{name} has a dimension {dim!r}: "
                    f"expected one of dims, {', '.join(dims)}"
                )


def _is_inside(name: object) -> bool:
    """Whether a file name of a manifest stays in the bundle, on any system."""
    path = PureWindowsPath(name if isinstance(name, str) else "")  # takes / and \ for separators
    return bool(path.parts) and not path.anchor and ".." not in path.parts


def write_manifest(path: Path, manifest: Manifest) -> Manifest:
    """Hash every file of the bundle in `path` and write the manifest, the last step of an export.

    Returns:
        The manifest with the files' hashes.
    """
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    files = {}
    for name in names:
        if name != MANIFEST and not name.startswith(("users/", "engines/")):
            files[name] = sha256(path / name)
    manifest = dataclasses.replace(manifest, files=files)
    write_json(path / MANIFEST, manifest.to_json())
    return manifest
