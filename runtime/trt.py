"""The TensorRT backend: engines of a bundle on device memory of our own, through TensorRT 10.3 and later or -RTX.

Built by `tiny-align build-engines` and checked by engines.py; nothing is built here. Device buffers are laid out once,
for the greatest shapes of the engine's profile. A person's projector is an engine of their own, in engines/ of their
folder (`Bundle.person`), or else the bundle's, refitted with their weights when it is loaded.

The LLM's keys and values stay on the device, in two sets of buffers: what a step writes is what the next one reads. A
set is laid out for the whole context, but TensorRT takes (1, H, past, size) without gaps, so that it is filled from its
start, and every position moves when one is added. Hence no CUDA graph for a step: its shapes are other ones every time,
and a captured graph would go on computing the first.
"""

import functools
import mmap
import weakref
from collections import deque
from pathlib import Path

import numpy as np

from tiny_align.runtime import cuda
from tiny_align.runtime.backend import Decoder, Runner, closed
from tiny_align.runtime.bundle import Bundle, GraphSpec, TensorSpec
from tiny_align.runtime.engines import PACKAGES, build_command, check_engine, import_tensorrt, machine_facts
from tiny_align.runtime.errors import BackendError

PROFILE, GREATEST = 0, 2  # an engine has one profile: least, usual and greatest shapes
LAST_WORDS = 4  # of TensorRT's errors, told to people


def _package():
    """TensorRT, or TensorRT-RTX where only that is installed."""
    for name in PACKAGES:
        if module := import_tensorrt(name, "Runtime"):
            return module
    raise BackendError(
        "the backend 'tensorrt' needs TensorRT, which is not installed for this Python. On a Jetson it comes with "
        "JetPack: make the venv with --system-site-packages. Or choose --backend onnxruntime"
    )


@functools.cache
def _log(trt):
    """TensorRT's logger, the same for everything, as TensorRT wants; it keeps the last errors in `words`."""

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.words = deque(maxlen=LAST_WORDS)

        def log(self, severity, msg):
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.words.append(msg)

    return Log()


class _Engine:
    """An engine that is ready to run: its execution context and its stream.

    Raises:
        BackendError: what TensorRT refuses, in its own words.
    """

    def __init__(self, bundle: Bundle, spec: GraphSpec, graph: Path):
        self._trt, self.spec = _package(), spec
        self._log = _log(self._trt)
        self.file, fits = _engine_file(bundle, spec, graph, machine_facts(self._trt.__name__, self._trt.__version__))
        self.stream = cuda.Stream()
        self._runtime = self._made(self._trt.Runtime, self._log)
        self._engine = self._deserialised()
        self._check_tensors()
        if not fits:
            self._refit(bundle, graph)
        self._context = self._given(self._engine.create_execution_context(), "make an execution context")

    def _given(self, value, what: str):
        """TensorRT says no with None or False, and why in its log."""
        if value is None or value is False:
            words = " ".join(self._log.words) or "it does not say why"
            raise BackendError(f"{self._trt.__name__} {self._trt.__version__} cannot {what} for {self.file}: {words}")
        return value

    def _made(self, kind, *given):
        try:
            return kind(*given)
        except TypeError:  # pybind11's word for nothing
            return self._given(None, f"make a {kind.__name__}")

    def _deserialised(self):
        self._log.words.clear()
        try:  # mapped, so that an 8 GB board does not hold it a second time
            with open(self.file, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return self._given(self._runtime.deserialize_cuda_engine(data), "load the engine")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(f"{self.file} cannot be read ({error}): build the engines again") from error

    def _refit(self, bundle: Bundle, graph: Path) -> None:
        """Give the engine the weights of a graph that differs in nothing else."""
        trt = self._trt
        if not self._engine.refittable:
            raise BackendError(
                f"{self.file} was built without REFIT and {graph} has other weights: build an engine of it with "
                f"`{build_command(bundle.person(graph.parent))}`"
            )
        self._log.words.clear()
        refitter = self._made(trt.Refitter, self._engine, self._log)
        parser = self._made(trt.OnnxParserRefitter, refitter, self._log)
        what = f"take the weights of {graph}"
        if not parser.refit_from_file(str(graph)):
            self._log.words.extend(parser.get_error(i).desc() for i in range(parser.num_errors))
            self._given(False, what)
        self._given(refitter.refit_cuda_engine(), what)

    def _check_tensors(self) -> None:
        """Names, directions, types and places: those of the manifest, and all on the device."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {
            (n, engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT, np.dtype(trt.nptype(engine.get_tensor_dtype(n))))
            for n in names
        }
        wanted = {(t.name, t in self.spec.inputs, np.dtype(t.dtype)) for t in self.spec.inputs + self.spec.outputs}
        if found != wanted:
            odd = ", ".join(sorted(f"{name} {dtype}" for name, _, dtype in found ^ wanted))
            raise BackendError(f"{self.file} and the bundle's manifest differ in {odd}: build the engines again")
        if host := [n for n in names if engine.get_tensor_location(n) != trt.TensorLocation.DEVICE]:
            raise BackendError(f"{self.file} wants {', '.join(host)} in host memory: export the bundle again")

    def greatest(self, name: str) -> tuple[int, ...]:
        """The greatest shape of an input."""
        return tuple(self._engine.get_tensor_profile_shape(name, PROFILE)[GREATEST])

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            least, _, greatest = (list(s) for s in self._engine.get_tensor_profile_shape(name, PROFILE))
            raise BackendError(f"{self.file} takes {name} from {least} to {greatest}, given was {list(shape)}")

    def shape(self, name: str) -> tuple[int, ...]:
        """An output's shape for the inputs' shapes that are set."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(f"{self.file} gives {name} a size that is known only when it has run: {list(shape)}")
        return shape

    def set_address(self, name: str, buffer: cuda.Buffer) -> None:
        self._given(self._context.set_tensor_address(name, buffer.address), f"take the address of {name}")

    def run(self) -> None:
        """Start the work; `stream.synchronise` waits for it."""
        self._log.words.clear()
        self._given(self._context.execute_async_v3(self.stream.handle), "run the graph")


def _engine_file(bundle: Bundle, spec: GraphSpec, graph: Path, facts: dict) -> tuple[Path, bool]:
    """A graph's engine, checked, and whether it has the weights of `graph` already."""
    name = next(name for name, g in bundle.manifest.graphs.items() if g.on(TrtRunner.name) == spec)
    if not graph.parent.samefile(bundle.path) and (graph.parent / "engines").is_dir():
        return check_engine(bundle.person(graph.parent), name, facts), True
    return check_engine(bundle, name, facts), graph.samefile(bundle.graph(name, TrtRunner.name))


class TrtRunner(Runner):
    """An engine on arrays: what comes in is copied to the device, what goes out is a new array."""

    name = "tensorrt"

    def __init__(self, path: Path, spec: GraphSpec, bundle: Bundle):
        super().__init__(spec)
        self._engine = _Engine(bundle, spec, path)
        for tensor in spec.inputs:
            self._engine.set_shape(tensor.name, self._engine.greatest(tensor.name))
        shapes = {t: self._engine.greatest(t.name) for t in spec.inputs}
        shapes |= {t: self._engine.shape(t.name) for t in spec.outputs}
        self._buffers = {tensor.name: _buffer(tensor, shape) for tensor, shape in shapes.items()}
        for name, buffer in self._buffers.items():
            self._engine.set_address(name, buffer)

    def _run(self, feed: dict) -> dict:
        if (engine := self._engine) is None:
            raise closed(self.spec)
        feed = {name: np.ascontiguousarray(value) for name, value in feed.items()}
        for name, value in feed.items():
            engine.set_shape(name, value.shape)
        out = {t.name: np.empty(engine.shape(t.name), t.dtype) for t in self.spec.outputs}
        for name, value in feed.items():
            engine.stream.upload(value, self._buffers[name])
        engine.run()
        for name, value in out.items():
            engine.stream.download(self._buffers[name], value)
        engine.stream.synchronise()
        return out

    def close(self) -> None:
        self._engine, self._buffers = None, {}


class TrtDecoder(Decoder):
    """The LLM's plain graph; keys and values stay on the device."""

    name = "tensorrt"

    def __init__(self, path: Path, spec: GraphSpec, bundle: Bundle):
        self._spec, self._engine = spec, _Engine(bundle, spec, path)
        self._embeddings, self._logits = spec.inputs[0], spec.outputs[0]
        self._buffers = [
            _buffer(self._embeddings, self._engine.greatest(self._embeddings.name)),
            _buffer(self._logits, self._logits.shape),
        ]
        self._engine.set_address(self._embeddings.name, self._buffers[0])
        self._engine.set_address(self._logits.name, self._buffers[1])
        self._spare: list[_Memory] = []  # of conversations that are over

    def open_cache(self, capacity: int) -> "_TrtCache":
        if self._engine is None:
            raise closed(self._spec)
        fitting = [memory for memory in self._spare if memory.capacity == capacity]
        memory = fitting[0] if fitting else _Memory(self._spec, capacity)
        if fitting:
            self._spare.remove(memory)
        cache = _TrtCache(memory)
        weakref.finalize(cache, self._spare.append, memory)
        return cache

    def read(self, embeddings: np.ndarray, cache: "_TrtCache", past: int) -> np.ndarray:
        if (engine := self._engine) is None:
            raise closed(self._spec)
        total = cache.checked_total(past, len(embeddings))
        self._bind(cache, past, total, len(embeddings))
        logits = np.empty(self._logits.shape, self._logits.dtype)
        given = np.ascontiguousarray(embeddings[None], self._embeddings.dtype)
        engine.stream.upload(given, self._buffers[0])
        engine.run()
        engine.stream.download(self._buffers[1], logits)
        engine.stream.synchronise()
        cache.turn(total)
        return logits[0, 0]

    def _bind(self, cache: "_TrtCache", past: int, total: int, new: int) -> None:
        """Shapes of this step, and the two sets of buffers in the places they have in this step."""
        engine, spec = self._engine, self._spec
        engine.set_shape(self._embeddings.name, _sized(self._embeddings, new))
        for tensor, buffer in zip(spec.inputs[1:], cache.read, strict=True):
            engine.set_shape(tensor.name, _sized(tensor, past))
            engine.set_address(tensor.name, buffer)
        for tensor, buffer in zip(spec.outputs[1:], cache.write, strict=True):
            engine.set_address(tensor.name, buffer)
        grown = spec.outputs[1]  # one for all of them
        if engine.shape(grown.name) != _sized(grown, total):  # it would write beyond the buffer
            raise BackendError(f"{engine.file} does not give {grown.name} for {total} positions: build it again")

    def close(self) -> None:
        self._engine, self._buffers, self._spare = None, [], []


class _Memory:
    """Two sets of buffers, each for the keys and values of `capacity` positions."""

    def __init__(self, spec: GraphSpec, capacity: int):
        self.capacity = capacity
        self.sets = [[_buffer(t, _sized(t, capacity)) for t in spec.outputs[1:]] for _ in range(2)]


class _TrtCache:
    """One conversation's keys and values: what was read lies in the set `read`."""

    def __init__(self, memory: _Memory):
        self._capacity, self._length = memory.capacity, 0
        self.read, self.write = memory.sets

    def checked_total(self, past: int, new: int) -> int:
        """Positions after this step; a cache can be read on from its end, or anew."""
        if past not in (0, self._length) or past + new > self._capacity:
            raise BackendError(
                f"a cache of {self._capacity} positions, {self._length} of them read, cannot take {new} after {past}: "
                "read on from its end, or open another"
            )
        return past + new

    def turn(self, length: int) -> None:
        """What was written is read from now on."""
        self.read, self.write, self._length = self.write, self.read, length


def _sized(tensor: TensorSpec, size: int) -> tuple[int, ...]:
    """The shape of a tensor whose one dynamic dimension is `size`."""
    return tuple(size if isinstance(dim, str) else dim for dim in tensor.shape)


def _buffer(tensor: TensorSpec, shape: tuple[int, ...]) -> cuda.Buffer:
    return cuda.Buffer(int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize)
