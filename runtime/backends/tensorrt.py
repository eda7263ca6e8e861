"""The TensorRT backend: engines of a bundle on device memory of our own, through TensorRT 10.3 and later or -RTX.

Built by `tiny-align build-engines` and checked by engines.py; nothing is built here. Device buffers are laid out once,
for the greatest shapes of the engine's profile. A person's projector is an engine of their own, in engines/ of their
folder (`Bundle.person`), or else the bundle's, refitted with their weights when it is loaded.

In a Chain what the encoder gives is what the projector reads, where it lies. What the projector gives comes to the CPU,
kilobytes of it: there the readout makes soft tokens (readout.py), and the instruction's embeddings are put around them.
Of a step of the LLM only its embeddings and the graph's few best tokens (export/topk.py) cross, on a Jetson without a
copy (cuda_memory.exchange); where a graph picks none, as its manifest tells, every logit does.

The LLM's keys and values stay on the device, in two sets of buffers: what a step writes is what the next one reads. A
set is laid out for the whole context, but TensorRT takes (1, H, past, size) without gaps, so that it is filled from its
start, and every position moves when one is added. Hence no CUDA graph for a step: its shapes are other ones every time,
and a captured graph would go on computing the first. A cache of one shape, masked beyond its length, could be captured,
but this TensorRT writes into no tensor that it reads: every step would copy the whole capacity and look through it, at
4,096 positions of Llama-3.2-1B's shape 268 MB, read twice and written once, beside 0.8 GB of weights. What that would
save is the time of launches, which a model of that size hides: they are made while earlier kernels still read weights.
"""

import functools
import mmap
import weakref
from collections import deque
from pathlib import Path

import numpy as np

from tiny_align.runtime.backends import cuda_memory
from tiny_align.runtime.backends.base import (
    TOPK_LOGITS,
    TOPK_TOKENS,
    Decoder,
    Runner,
    Scores,
    closed,
)
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import (
    PACKAGES,
    build_command,
    check_engine,
    import_tensorrt,
    machine_facts,
)
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
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
        self.file, fits = _engine_file(
            bundle, spec, graph, machine_facts(self._trt.__name__, self._trt.__version__)
        )
        self.stream = cuda_memory.Stream()
        self._runtime = self._made(self._trt.Runtime, self._log)
        self._engine = self._deserialised()
        self._check_tensors()
        if not fits:
            self._refit(bundle, graph)
        self._context = self._given(
            self._engine.create_execution_context(), "make an execution context"
        )

    def _given(self, value, what: str):
        """TensorRT says no with None or False, and why in its log."""
        if value is None or value is False:
            words = " ".join(self._log.words) or "it does not say why"
            raise BackendError(
                f"{self._trt.__name__} {self._trt.__version__} cannot {what} for {self.file}: {words}"
            )
        return value

    def _made(self, kind, *given):
        try:
            return kind(*given)
        except TypeError:  # pybind11's word for nothing
            return self._given(None, f"make a {kind.__name__}")

    def _deserialised(self):
        self._log.words.clear()
        try:  # mapped, so that an 8 GB board does not hold it a second time
            with (
                open(self.file, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                return self._given(self._runtime.deserialize_cuda_engine(data), "load the engine")
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(
                f"{self.file} cannot be read ({error}): build the engines again"
            ) from error

    def _refit(self, bundle: Bundle, graph: Path) -> None:
        """Give the engine the weights of a graph that differs in nothing else."""
        trt = self._trt
        if not self._engine.refittable:
            raise BackendError(
                f"{self.file} was built without REFIT and {graph} has other weights: build an engine of it with "
                f"`{build_command(bundle.for_user(graph.parent))}`"
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
            (
                n,
                engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT,
                np.dtype(trt.nptype(engine.get_tensor_dtype(n))),
            )
            for n in names
        }
        wanted = {
            (t.name, t in self.spec.inputs, np.dtype(t.dtype))
            for t in self.spec.inputs + self.spec.outputs
        }
        if found != wanted:
            odd = ", ".join(sorted(f"{name} {dtype}" for name, _, dtype in found ^ wanted))
            raise BackendError(
                f"{self.file} and the bundle's manifest differ in {odd}: build the engines again"
            )
        if host := [n for n in names if engine.get_tensor_location(n) != trt.TensorLocation.DEVICE]:
            raise BackendError(
                f"{self.file} wants {', '.join(host)} in host memory: export the bundle again"
            )

    def greatest(self, name: str) -> tuple[int, ...]:
        """The greatest shape of an input."""
        return tuple(self._engine.get_tensor_profile_shape(name, PROFILE)[GREATEST])

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            least, _, greatest = (
                list(s) for s in self._engine.get_tensor_profile_shape(name, PROFILE)
            )
            raise BackendError(
                f"{self.file} takes {name} from {least} to {greatest}, given was {list(shape)}"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """An output's shape for the inputs' shapes that are set."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise BackendError(
                f"{self.file} gives {name} a size that is known only when it has run: {list(shape)}"
            )
        return shape

    def set_address(
        self, name: str, memory: cuda_memory.Buffer | cuda_memory.Copied | cuda_memory.Mapped
    ) -> None:
        self._given(
            self._context.set_tensor_address(name, memory.address), f"take the address of {name}"
        )

    def run(self, stream: cuda_memory.Stream) -> None:
        """Start the work; `stream.synchronise` waits for it."""
        self._log.words.clear()
        self._given(self._context.execute_async_v3(stream.handle), "run the graph")


def _engine_file(bundle: Bundle, spec: GraphSpec, graph: Path, facts: dict) -> tuple[Path, bool]:
    """A graph's engine, checked, and whether it has the weights of `graph` already."""
    name = next(name for name, g in bundle.manifest.graphs.items() if g.on(TrtRunner.name) == spec)
    if not graph.parent.samefile(bundle.path) and (graph.parent / "engines").is_dir():
        return check_engine(bundle.for_user(graph.parent), name, facts), True
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
        for tensor in spec.outputs:
            self._engine.set_address(tensor.name, self._buffers[tensor.name])

    def _run(self, feed: dict) -> dict:
        feed = _contiguous(feed)  # stays until the copies are made
        return self._finish(self._start(feed))

    def into(self, other: Runner, feed: dict, rows: int | None = None) -> dict:
        """The other graph reads this one's output where it lies, after it in its stream."""
        if not isinstance(other, TrtRunner):
            return super().into(other, feed, rows)
        self._check(feed)
        feed = _contiguous(feed)
        stream = self._start(feed)
        other._follow(self, rows, stream)
        return other._finish(stream)

    def _start(self, feed: dict) -> cuda_memory.Stream:
        """Have the inputs copied to the device and the graph run on them; the stream in which that happens."""
        engine = self._opened()
        for name, value in feed.items():
            engine.set_shape(name, value.shape)
            engine.set_address(name, self._buffers[name])
            engine.stream.upload(value, self._buffers[name])
        engine.run(engine.stream)
        return engine.stream

    def _follow(self, before: "TrtRunner", rows: int | None, stream: cuda_memory.Stream) -> None:
        """Run on the first `rows` rows of the output of another graph, which runs before in this stream."""
        engine, (own,), (given,) = self._opened(), self.spec.inputs, before.spec.outputs
        batch, n_rows, *row = before._opened().shape(given.name)
        engine.set_shape(own.name, (batch, n_rows if rows is None else min(rows, n_rows), *row))
        engine.set_address(own.name, before._buffers[given.name])
        engine.run(stream)

    def _finish(self, stream: cuda_memory.Stream) -> dict:
        """The outputs, once the stream has come to its end."""
        out = {t.name: np.empty(self._opened().shape(t.name), t.dtype) for t in self.spec.outputs}
        for name, value in out.items():
            stream.download(self._buffers[name], value)
        stream.synchronise()
        return out

    def _opened(self) -> _Engine:
        if self._engine is None:
            raise closed(self.spec)
        return self._engine

    def close(self) -> None:
        self._engine, self._buffers = None, {}


class TrtDecoder(Decoder):
    """The LLM's plain graph; keys and values stay on the device."""

    name = "tensorrt"

    def __init__(self, path: Path, spec: GraphSpec, bundle: Bundle):
        self._spec, self._engine = spec, _Engine(bundle, spec, path)
        self._embeddings, n_kept = spec.inputs[0], len(spec.inputs) - 1
        scores, self._kept = spec.outputs[:-n_kept], spec.outputs[-n_kept:]
        self._given = _exchange(self._embeddings, self._engine.greatest(self._embeddings.name))
        self._told = {t.name: _exchange(t, t.shape) for t in _told(scores)}
        self._untold = {t.name: _buffer(t, t.shape) for t in scores if t.name not in self._told}
        for name, memory in {
            self._embeddings.name: self._given,
            **self._told,
            **self._untold,
        }.items():
            self._engine.set_address(name, memory)
        self._spare: list[_Memory] = []  # of conversations that are over

    def open_cache(self, capacity: int) -> "_TrtCache":
        if self._engine is None:
            raise closed(self._spec)
        fitting = [memory for memory in self._spare if memory.capacity == capacity]
        memory = fitting[0] if fitting else _Memory(self._kept, capacity)
        if fitting:
            self._spare.remove(memory)
        cache = _TrtCache(memory)
        weakref.finalize(cache, self._spare.append, memory)
        return cache

    def read(self, embeddings: np.ndarray, cache: "_TrtCache", past: int) -> Scores:
        if (engine := self._engine) is None:
            raise closed(self._spec)
        total = cache.checked_total(past, len(embeddings))
        self._bind(cache, past, total, len(embeddings))
        self._given.array[: embeddings.size] = embeddings.ravel()
        self._given.send(engine.stream, embeddings.size)
        engine.run(engine.stream)
        for memory in self._told.values():
            memory.fetch(engine.stream)
        engine.stream.synchronise()
        cache.turn(total)
        told = {
            name: memory.array.copy() for name, memory in self._told.items()
        }  # other conversations use it too
        return Scores(*told.values())

    def rewind(self, cache: "_TrtCache", length: int) -> None:
        """Fewer positions without gaps lie elsewhere: what stays of each head moves to the other set of buffers."""
        if (engine := self._engine) is None:
            raise closed(self._spec)
        if length >= cache.length:
            return
        for tensor, origin, to in zip(self._kept, cache.read, cache.write, strict=True):
            _, heads, _, size = tensor.shape
            position = size * np.dtype(tensor.dtype).itemsize
            engine.stream.shorten(origin, to, heads, cache.length * position, length * position)
        engine.stream.synchronise()
        cache.turn(length)

    def _bind(self, cache: "_TrtCache", past: int, total: int, new: int) -> None:
        """Shapes of this step, and the two sets of buffers in the places they have in this step."""
        engine, spec = self._engine, self._spec
        engine.set_shape(self._embeddings.name, _sized(self._embeddings, new))
        for tensor, buffer in zip(spec.inputs[1:], cache.read, strict=True):
            engine.set_shape(tensor.name, _sized(tensor, past))
            engine.set_address(tensor.name, buffer)
        for tensor, buffer in zip(self._kept, cache.write, strict=True):
            engine.set_address(tensor.name, buffer)
        grown = self._kept[0]  # one for all of them
        if engine.shape(grown.name) != _sized(grown, total):  # it would write beyond the buffer
            raise BackendError(
                f"{engine.file} does not give {grown.name} for {total} positions: build it again"
            )

    def close(self) -> None:
        self._engine, self._given, self._told, self._untold, self._spare = None, None, {}, {}, []


class _Memory:
    """Two sets of buffers, each for the keys and values of `capacity` positions."""

    def __init__(self, tensors: tuple[TensorSpec, ...], capacity: int):
        self.capacity = capacity
        self.sets = [[_buffer(t, _sized(t, capacity)) for t in tensors] for _ in range(2)]


class _TrtCache:
    """One conversation's keys and values: what was read lies in the set `read`."""

    def __init__(self, memory: _Memory):
        self._capacity, self.length = memory.capacity, 0
        self.read, self.write = memory.sets

    def checked_total(self, past: int, new: int) -> int:
        """Positions after this step; a cache can be read on from its end, or anew."""
        if past not in (0, self.length) or past + new > self._capacity:
            raise BackendError(
                f"a cache of {self._capacity} positions, {self.length} of them read, cannot take {new} after {past}: "
                "read on from its end, or open another"
            )
        return past + new

    def turn(self, length: int) -> None:
        """What was written is read from now on."""
        self.read, self.write, self.length = self.write, self.read, length


def _sized(tensor: TensorSpec, size: int) -> tuple[int, ...]:
    """The shape of a tensor whose one dynamic dimension is `size`."""
    return tuple(size if isinstance(dim, str) else dim for dim in tensor.shape)


def _contiguous(feed: dict) -> dict:
    return {name: np.ascontiguousarray(value) for name, value in feed.items()}


def _told(scores: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    """Of a graph's outputs those that a token is chosen by, as Scores has them: the best few, or every logit."""
    named = {tensor.name: tensor for tensor in scores}
    wanted = (
        (TOPK_LOGITS, TOPK_TOKENS) if {TOPK_LOGITS, TOPK_TOKENS} <= named.keys() else ("logits",)
    )
    return [named[name] for name in wanted]


def _exchange(
    tensor: TensorSpec, shape: tuple[int, ...]
) -> cuda_memory.Copied | cuda_memory.Mapped:
    return cuda_memory.exchange(int(np.prod(shape)), tensor.dtype)


def _buffer(tensor: TensorSpec, shape: tuple[int, ...]) -> cuda_memory.Buffer:
    return cuda_memory.Buffer(int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize)
