"""The ONNX Runtime backend, on the CPU.

The KV cache (`OrtCache`) is one set of numpy arrays (1, H, capacity, size) that are bound as the
LLM graph's inputs and outputs at once: a layer writes new keys and values where it reads the old
ones. Attention works in memory of the capacity's size, so a cache is no larger than it must be.
"""

import contextlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiny_align.runtime.backends.base import (
    Arrays,
    Backend,
    Decoder,
    GraphFile,
    Runner,
    Scores,
    closed,
)
from tiny_align.runtime.backends.huge_pages import on_huge_pages
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.findings import Finding, Subject, assess

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

# Accuracy level of MatMulNBits: the activations of block-quantised weights are multiplied in INT8.
INT8_PRODUCTS = "4"
# Where x86 lacks VNNI, sums of products of uint8 and int8 overflow their 16 bits. This session
# option avoids it, and is slower. Products with 7-bit codes (export/int8.py) do not overflow.
EXACT_INT8 = "1"


def open_session(
    path: Path,
    threads: int | None,
    *,
    spinning: bool,
    activations: str | None = None,
    prepack: bool = True,
) -> "InferenceSession":
    """A graph in an ONNX Runtime session.

    Args:
        threads: of its operators; None: all cores.
        spinning: whether they wait for work by spinning: faster for what runs all the time, slower
            for all else.
        activations: the manifest's `quantised_activations`; None: found out from the graph.
        prepack: whether weights are copied into the layout of the operators, for speed.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # it raises its errors too
    options.enable_mem_pattern = False  # it would keep a plan for every length that has occurred
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", INT8_PRODUCTS)
    if (activations or quantised_activations(path)) == "static":
        options.add_session_config_entry("session.x64quantprecision", EXACT_INT8)
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if threads:
        options.intra_op_num_threads = threads
    with _explained(f"cannot load {path}"):
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantised_activations(path: Path) -> str:
    """The manifest's field of that name, for a graph whose manifest lacks it: by its operators."""
    graph = path.read_bytes()
    dynamic = b"DynamicQuantizeLinear"
    if b"QuantizeLinear" in graph.replace(dynamic, b""):  # DequantizeLinear has a small q
        return "static"
    return "dynamic" if dynamic in graph else "none"


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what ONNX Runtime raises into one sentence."""
    try:
        yield
    except Exception as error:  # onnxruntime has no common base class
        import onnxruntime as ort

        reason = " ".join(str(error).split())
        message = f"ONNX Runtime {ort.__version__} {what} ({reason})"
        if "bad_alloc" in str(error):
            message += ": memory ran out, close other programs or raise its limit"
        raise BackendError(message) from error


class OrtRunner(Runner):
    """A graph in an ONNX Runtime session."""

    name = "onnxruntime"

    def __init__(
        self, path: Path, spec: GraphSpec, threads: int | None = None, prepack: bool = True
    ):
        super().__init__(spec)
        self._session: InferenceSession | None = open_session(
            path,
            threads,
            spinning=False,
            activations=spec.quantised_activations,
            prepack=prepack,
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def _run(self, feed: Arrays) -> Arrays:
        if self._session is None:
            raise closed(self.spec)
        with _explained(f"cannot run {self.spec.file}"):
            return dict(zip(self._outputs, self._session.run(self._outputs, feed)))

    def close(self) -> None:
        self._session = None


class OrtDecoder(Decoder["OrtCache"]):
    """The LLM's fused graph (export/llm_ort.py) on a cache that ONNX Runtime writes in place.

    It returns all logits, since they are in this process's memory anyway: numpy finds the top k of
    128,256 sooner than the graph would.
    """

    name = "onnxruntime"

    def __init__(
        self, path: Path, spec: GraphSpec, threads: int | None = None, prepack: bool = True
    ):
        self._spec = spec
        with on_huge_pages():
            self._session: InferenceSession | None = open_session(
                path,
                threads,
                spinning=True,
                activations=spec.quantised_activations,
                prepack=prepack,
            )

    def open_cache(self, capacity: int) -> "OrtCache":
        if self._session is None:
            raise closed(self._spec)
        return OrtCache(self._session, self._spec, capacity)

    def grow(self, cache: "OrtCache", capacity: int) -> None:
        cache.grow(capacity)

    def run(self, embeddings: np.ndarray, cache: "OrtCache", past: int) -> Scores:
        if self._session is None:
            raise closed(self._spec)
        cache.prepare(embeddings, past)
        with _explained(f"cannot run {self._spec.file}"):
            self._session.run_with_iobinding(cache.binding)
        return cache.scores

    def rewind(self, cache: "OrtCache", length: int) -> None:
        """Nothing to do: the graph ignores positions beyond the length that it gets."""

    def close(self) -> None:
        self._session = None


class OrtCache:
    """Keys and values of one conversation, bound as inputs and outputs of the LLM's graph.

    The graph's inputs are embeddings, length, then keys and values; its outputs are logits, then
    the same keys and values.
    """

    def __init__(self, session: "InferenceSession", spec: GraphSpec, capacity: int):
        self.binding = session.io_binding()
        self._alive: dict[str, OrtValue] = {}  # a binding does not keep its arrays alive
        logits = _zeros(spec.outputs[0], capacity)
        self.scores = Scores(logits[0, 0])
        self._bind(self.binding.bind_ortvalue_output, spec.outputs[0].name, logits)
        length, *past = spec.inputs[1:]
        self._length = _zeros(length, capacity)
        self._bind(self.binding.bind_ortvalue_input, length.name, self._length)
        self._states = list(zip(past, spec.outputs[1:], strict=True))  # input and output of each
        self._present: Arrays = {}  # by the graph's output
        for before, after in self._states:
            self._place(before, after, _zeros(before, capacity))

    def _place(self, before: TensorSpec, after: TensorSpec, array: np.ndarray) -> None:
        """Have the graph read and write keys or values in this array."""
        self._present[after.name] = array
        self._bind(self.binding.bind_ortvalue_input, before.name, array)
        self._bind(self.binding.bind_ortvalue_output, after.name, array)

    def grow(self, capacity: int) -> None:
        """Copy keys and values, one array after the other, to arrays of `capacity` positions."""
        for before, after in self._states:
            old = self._present[after.name]
            array = _zeros(before, capacity)
            array[:, :, : old.shape[2]] = old
            self._place(before, after, array)

    def _bind(self, bind: Callable[[str, "OrtValue"], None], name: str, array: np.ndarray) -> None:
        """Bind the array itself, not a copy of it."""
        import onnxruntime as ort

        self._alive[name] = ort.OrtValue.ortvalue_from_numpy(array)
        bind(name, self._alive[name])

    def prepare(self, embeddings: np.ndarray, past: int) -> None:
        """Set what a step changes: the embeddings (T, D), and the length after them."""
        rows = np.ascontiguousarray(embeddings[None])
        self._bind(self.binding.bind_ortvalue_input, "inputs_embeds", rows)
        self._length[0] = past + len(embeddings)

    def present(self, length: int) -> Arrays:
        """The first `length` keys and values, (1, H, length, size) by the graph's output; views."""
        return {name: array[:, :, :length] for name, array in self._present.items()}


def _zeros(tensor: TensorSpec, capacity: int) -> np.ndarray:
    shape = [capacity if isinstance(size, str) else size for size in tensor.shape]
    return np.zeros(shape, tensor.dtype)


# --- the doctor ---


def check(subject: Subject) -> Iterator[Finding]:
    """Whether exactly one build of ONNX Runtime is installed, and for which devices."""
    builds = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        found = subject.package(name)
        if found:
            builds[name] = found
    if not builds:
        yield Finding("ONNX Runtime", "not installed", False, "pip install tiny-align")
        return
    versions = ", ".join(f"{name} {build.version}" for name, build in builds.items())
    providers = ", ".join(_providers(next(iter(builds.values()))))
    remedy = (
        "the two overwrite each other's files: pip uninstall onnxruntime onnxruntime-gpu, then "
        "install one of them"
    )
    yield assess("ONNX Runtime", f"{versions}: {providers}", len(builds) == 1, remedy)


def _providers(distribution: metadata.Distribution) -> list[str]:
    """The devices a build is for, by the libraries in the package's folder; all builds share it."""
    folder = Path(str(distribution.locate_file("onnxruntime/capi")))
    providers = []
    for device, part in (("TensorRT", "tensorrt"), ("CUDA", "cuda")):
        if any(folder.glob(f"*onnxruntime_providers_{part}.*")):
            providers.append(device)
    return [*providers, "CPU"]  # the CPU's is built in


# --- the backend ---


def load_runner(graph: GraphFile, threads: int | None) -> OrtRunner:
    return OrtRunner(graph.path, graph.spec, threads)


def load_decoder(graph: GraphFile, threads: int | None) -> OrtDecoder:
    return OrtDecoder(graph.path, graph.spec, threads)


BACKEND = Backend("onnxruntime", load_runner, load_decoder, check)
