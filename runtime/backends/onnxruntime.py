"""The ONNX Runtime backend, on the CPU."""

import contextlib
from pathlib import Path

import numpy as np

from tiny_align.runtime.backends.base import Decoder, Runner, Scores, closed
from tiny_align.runtime.backends.huge_pages import on_huge_pages
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.errors import BackendError

INT8_PRODUCTS = "4"  # accuracy level of MatMulNBits: activations of block-quantised weights in int8
EXACT_INT8 = (
    "1"  # where x86 lacks VNNI: sums of products of uint8 and int8 overflow their 16 bits there
)
SMALL_INT8 = b"DynamicQuantizeLinear"  # of what is multiplied by 7-bit codes (export/int8.py), where nothing overflows


def _session(path: Path, threads: int | None, spinning: bool):
    """A graph in an ONNX Runtime session.

    Args:
        threads: of its operators; None: all cores.
        spinning: whether they wait for work by spinning: faster for what runs all the time, slower for all else.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # it raises what it would say
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", INT8_PRODUCTS)
    options.enable_mem_pattern = (
        False  # ONNX Runtime would keep a plan for every length there has been
    )
    if b"QuantizeLinear" in path.read_bytes().replace(
        SMALL_INT8, b""
    ):  # DequantizeLinear has a small q
        options.add_session_config_entry("session.x64quantprecision", EXACT_INT8)
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if threads:
        options.intra_op_num_threads = threads
    with _explained(f"cannot load {path}"):
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _explained(what: str):
    """Turns what ONNX Runtime raises into one sentence."""
    try:
        yield
    except Exception as error:  # onnxruntime has no common base class
        import onnxruntime as ort

        remedy = (
            ": memory ran out, close other programs or raise its limit"
            if "bad_alloc" in str(error)
            else ""
        )
        raise BackendError(
            f"ONNX Runtime {ort.__version__} {what} ({' '.join(str(error).split())}){remedy}"
        ) from error


class OrtRunner(Runner):
    """A graph in an ONNX Runtime session."""

    name = "onnxruntime"

    def __init__(self, path: Path, spec: GraphSpec, threads: int | None = None):
        super().__init__(spec)
        self._session = _session(path, threads, spinning=False)
        self._outputs = [o.name for o in self._session.get_outputs()]

    def _run(self, feed: dict) -> dict:
        if self._session is None:
            raise closed(self.spec)
        with _explained(f"cannot run {self.spec.file}"):
            return dict(zip(self._outputs, self._session.run(self._outputs, feed)))

    def close(self) -> None:
        self._session = None


class OrtDecoder(Decoder):
    """The LLM's fused graph (export/llm_ort.py) on a cache that ONNX Runtime writes in place.

    Its logits lie in this process's memory anyway, so that they are given whole: the best of 128,256 is found sooner
    than the graph would pick the best few.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, spec: GraphSpec, threads: int | None = None):
        with on_huge_pages():
            self._spec, self._session = spec, _session(path, threads, spinning=True)

    def open_cache(self, capacity: int) -> "_OrtCache":
        if self._session is None:
            raise closed(self._spec)
        return _OrtCache(self._session, self._spec, capacity)

    def read(self, embeddings: np.ndarray, cache: "_OrtCache", past: int) -> Scores:
        if self._session is None:
            raise closed(self._spec)
        cache.prepare(embeddings, past)
        with _explained(f"cannot run {self._spec.file}"):
            self._session.run_with_iobinding(cache.binding)
        return cache.scores

    def rewind(self, cache: "_OrtCache", length: int) -> None:
        """Nothing to do: what lies beyond the length that the next reading gives is not looked at."""

    def close(self) -> None:
        self._session = None


class _OrtCache:
    """Memory for one conversation, bound as the graph's inputs and outputs: what a layer writes lies where it reads."""

    def __init__(self, session, spec: GraphSpec, capacity: int):
        self.binding, self._alive = session.io_binding(), {}
        self._length, *memory = (_zeros(tensor, capacity) for tensor in spec.inputs[1:])
        logits = _zeros(spec.outputs[0], capacity)
        self.scores = Scores(logits[0, 0])
        for tensor, array in zip(spec.inputs[1:], (self._length, *memory), strict=True):
            self._bind(self.binding.bind_ortvalue_input, tensor.name, array)
        for tensor, array in zip(spec.outputs, (logits, *memory), strict=True):
            self._bind(self.binding.bind_ortvalue_output, tensor.name, array)

    def _bind(self, bind, name: str, array: np.ndarray) -> None:
        """Bind the array itself, not a copy; a binding does not keep it alive."""
        import onnxruntime as ort

        self._alive[name] = ort.OrtValue.ortvalue_from_numpy(array)
        bind(name, self._alive[name])

    def prepare(self, embeddings: np.ndarray, past: int) -> None:
        """What a step changes: the embeddings (T, D), and how many positions are in use after them."""
        self._bind(
            self.binding.bind_ortvalue_input,
            "inputs_embeds",
            np.ascontiguousarray(embeddings[None]),
        )
        self._length[0] = past + len(embeddings)


def _zeros(tensor: TensorSpec, capacity: int) -> np.ndarray:
    return np.zeros(
        [capacity if size == "capacity" else size for size in tensor.shape], tensor.dtype
    )
