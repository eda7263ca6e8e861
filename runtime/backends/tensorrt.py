"""The TensorRT backend: a bundle's engines on the GPU, by TensorRT 10.3 and later or TensorRT-RTX.

    tensorrt_engine.py   one engine: found, loaded, checked, run
    cuda_memory.py       device memory, copies, streams
    this file            what the runtime wants of them: `TrtRunner`, `TrtDecoder` and its cache

Device buffers are laid out once, for the max shapes of an engine's profile; a KV cache for the
positions that a conversation has used, doubled when they are full (`TrtDecoder.grow`).

What crosses between CPU and GPU. In a Chain the encoder's features stay on the device: the
projector reads them there. The projector's vectors come to the CPU, kilobytes of them, because
the readout (readout.py) makes soft tokens there and puts the prompt's embeddings around them. A
step of the LLM sends its embeddings and fetches the top k logits and tokens, which the graph
picks itself (export/topk.py); on a Jetson neither is copied (cuda_memory.exchange). If the graph
does not pick them, as its manifest says, all logits are fetched.

The KV cache. A conversation has two sets of buffers on the device (`CacheMemory`), one buffer for
each tensor (1, H, past, size) of keys or values, each large enough for `capacity` positions. A step
reads one set and writes the other, longer by its positions; then they change places:

    a step of          reads (`current`)     writes (`next`)
    a prompt, 7        set A: nothing        set B: 7 positions
    a token, 1         set B: 7 positions    set A: 8 positions
    a token, 1         set A: 8 positions    set B: 9 positions

TensorRT takes tensors without gaps, so that a buffer is filled from its start, and a head's
positions lie elsewhere after every step. `rewind` moves what remains of each head to the other
set.

Why no CUDA graph. A captured graph repeats the shapes of its first step, and here they change at
every step. A cache of one shape, masked beyond its length, could be captured. But this TensorRT
writes into no tensor that it reads: every step would copy the whole capacity and attend to all of
it. At 4,096 positions of Llama-3.2-1B's shape that is 268 MB, read twice and written once, beside
0.8 GB of weights. It would save the time of launches, which a model of that size hides: they are
made while earlier kernels still read weights.
"""

import weakref
from collections.abc import Iterator

import numpy as np

from tiny_align.runtime import machine
from tiny_align.runtime.backends import cuda_memory
from tiny_align.runtime.backends.base import (
    TOPK_LOGITS,
    TOPK_TOKENS,
    Arrays,
    Backend,
    Decoder,
    GraphFile,
    Runner,
    Scores,
    closed,
)
from tiny_align.runtime.backends.cuda_memory import Buffer, Copied, Mapped, Stream
from tiny_align.runtime.backends.tensorrt_engine import Engine
from tiny_align.runtime.bundle.manifest import TensorSpec
from tiny_align.runtime.bundle.profile import Shape
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.findings import (
    DOCS,
    Finding,
    Subject,
    assess,
    optional,
    version_numbers,
)

CACHE_SETS = 2  # of keys and values: one is read, the other is written
MIN_VERSION = (10, 3)


class TrtRunner(Runner):
    """An engine on arrays: inputs are copied to the device, outputs are new arrays."""

    name = "tensorrt"

    def __init__(self, graph: GraphFile):
        super().__init__(graph.spec)
        engine = Engine(graph)
        self._engine: Engine | None = engine
        self._buffers: dict[str, Buffer] = {}
        for tensor in self.spec.inputs:
            shape = engine.max_shape(tensor.name)
            engine.set_shape(tensor.name, shape)
            self._buffers[tensor.name] = make_buffer(tensor, shape)
        for tensor in self.spec.outputs:
            self._buffers[tensor.name] = make_buffer(tensor, engine.shape(tensor.name))
            engine.set_address(tensor.name, self._buffers[tensor.name])

    def _run(self, feed: Arrays) -> Arrays:
        feed = _contiguous(feed)  # referenced until the copies are made
        return self._finish(self._start(feed))

    def run_into(self, other: Runner, feed: Arrays, rows: int | None = None) -> Arrays:
        """The other graph reads this one's output on the device, after it in the same stream."""
        if not isinstance(other, TrtRunner):
            return super().run_into(other, feed, rows)
        self._check(feed)
        feed = _contiguous(feed)  # referenced until the copies are made
        stream = self._start(feed)
        other._follow(self, rows, stream)
        return other._finish(stream)

    def _start(self, feed: Arrays) -> Stream:
        """Have the inputs copied and the graph run; the stream in which that happens."""
        engine = self._opened()
        for name, value in feed.items():
            engine.set_shape(name, value.shape)
            engine.set_address(name, self._buffers[name])
            engine.stream.upload(value, self._buffers[name])
        engine.run(engine.stream)
        return engine.stream

    def _follow(self, before: "TrtRunner", rows: int | None, stream: Stream) -> None:
        """Run on the first `rows` rows of the output of a graph that runs before in this stream."""
        engine = self._opened()
        (tensor,) = self.spec.inputs
        (source,) = before.spec.outputs
        batch, n_rows, *size = before._opened().shape(source.name)
        if rows is not None:
            n_rows = min(rows, n_rows)
        engine.set_shape(tensor.name, (batch, n_rows, *size))
        engine.set_address(tensor.name, before._buffers[source.name])
        engine.run(stream)

    def _finish(self, stream: Stream) -> Arrays:
        """The outputs, when the stream has come to its end."""
        engine = self._opened()
        outputs = {}
        for tensor in self.spec.outputs:
            array = np.empty(engine.shape(tensor.name), tensor.dtype)
            stream.download(self._buffers[tensor.name], array)
            outputs[tensor.name] = array
        stream.synchronise()
        return outputs

    def _opened(self) -> Engine:
        if self._engine is None:
            raise closed(self.spec)
        return self._engine

    def close(self) -> None:
        self._engine = None
        self._buffers = {}


class TrtDecoder(Decoder["TrtCache"]):
    """The LLM's plain graph; keys and values stay on the device.

    The graph's inputs are the embeddings, then keys and values; its outputs are scores, then the
    same keys and values, longer by the new positions.
    """

    name = "tensorrt"

    def __init__(self, graph: GraphFile):
        self._spec = graph.spec
        self._embeddings, *self._past = graph.spec.inputs
        n_scores = len(graph.spec.outputs) - len(self._past)
        self._present = graph.spec.outputs[n_scores:]
        scores = graph.spec.outputs[:n_scores]
        self._step: Step | None = Step(Engine(graph), self._embeddings, scores)
        self._spare: list[CacheMemory] = []  # of conversations that are over

    def open_cache(self, capacity: int) -> "TrtCache":
        self._opened()
        if self._spare:
            memory = max(self._spare, key=lambda spare: spare.capacity)
            self._spare.remove(memory)
        else:
            memory = CacheMemory(self._present, capacity)
        cache = TrtCache(memory)
        weakref.finalize(cache, self._spare.append, memory)
        self.grow(cache, capacity)
        return cache

    def grow(self, cache: "TrtCache", capacity: int) -> None:
        """Move keys and values to larger buffers, one tensor after the other."""
        if capacity <= cache.memory.capacity:  # that of a longer conversation, which is over
            return
        stream = self._opened().engine.stream
        for i, tensor in enumerate(self._present):
            cache.next[i] = make_buffer(tensor, _sized(tensor, capacity))
            n_bytes = int(np.prod(_sized(tensor, cache.length))) * np.dtype(tensor.dtype).itemsize
            stream.shorten(cache.current[i], cache.next[i], 1, n_bytes, n_bytes)
            stream.synchronise()
            cache.current[i] = make_buffer(tensor, _sized(tensor, capacity))
        cache.memory.capacity = capacity
        cache.swap(cache.length)

    def run(self, embeddings: np.ndarray, cache: "TrtCache", past: int) -> Scores:
        step = self._opened()
        total = cache.checked_total(past, len(embeddings))
        self._bind(step.engine, cache, past, total)
        scores = step.run(embeddings)
        cache.swap(total)
        return scores

    def rewind(self, cache: "TrtCache", length: int) -> None:
        """Move what remains of each head to the other set: without gaps it lies elsewhere."""
        stream = self._opened().engine.stream
        if length >= cache.length:
            return
        for tensor, origin, to in zip(self._present, cache.current, cache.next, strict=True):
            _, heads, _, size = _sized(tensor, cache.length)
            position = size * np.dtype(tensor.dtype).itemsize
            stream.shorten(origin, to, heads, cache.length * position, length * position)
        stream.synchronise()
        cache.swap(length)

    def _bind(self, engine: Engine, cache: "TrtCache", past: int, total: int) -> None:
        """Set the shapes of this step, and the places that the two sets of buffers have in it."""
        engine.set_shape(self._embeddings.name, _sized(self._embeddings, total - past))
        for tensor, buffer in zip(self._past, cache.current, strict=True):
            engine.set_shape(tensor.name, _sized(tensor, past))
            engine.set_address(tensor.name, buffer)
        for tensor, buffer in zip(self._present, cache.next, strict=True):
            engine.set_address(tensor.name, buffer)
        first = self._present[0]  # as long as all of them
        if engine.shape(first.name) != _sized(first, total):  # it would write beyond the buffer
            raise BackendError(
                f"{engine.file} does not give {first.name} for {total} positions: build it again"
            )

    def _opened(self) -> "Step":
        if self._step is None:
            raise closed(self._spec)
        return self._step

    def close(self) -> None:
        self._step = None
        self._spare = []


class Step:
    """One run of the LLM's engine: memory for what is sent to the device and fetched from it.

    The shapes and addresses of keys and values are the decoder's to set.
    """

    def __init__(self, engine: Engine, embeddings: TensorSpec, scores: tuple[TensorSpec, ...]):
        self.engine = engine
        self._sent = _exchanged(embeddings, engine.max_shape(embeddings.name))
        engine.set_address(embeddings.name, self._sent)
        self._fetched: list[Copied | Mapped] = []  # in the order of Scores' fields
        fetched = _chosen_by(scores)
        for tensor in fetched:
            memory = _exchanged(tensor, _sized(tensor, 1))
            engine.set_address(tensor.name, memory)
            self._fetched.append(memory)
        self._unread: list[Buffer] = []  # the graph writes these scores too
        for tensor in scores:
            if tensor not in fetched:
                buffer = make_buffer(tensor, _sized(tensor, 1))
                engine.set_address(tensor.name, buffer)
                self._unread.append(buffer)

    def run(self, embeddings: np.ndarray) -> Scores:
        """Send embeddings (T, D), run, and fetch the scores."""
        stream = self.engine.stream
        self._sent.array[: embeddings.size] = embeddings.ravel()
        self._sent.send(stream, embeddings.size)
        self.engine.run(stream)
        for memory in self._fetched:
            memory.fetch(stream)
        stream.synchronise()
        # copies: other conversations use this memory too
        return Scores(*(memory.array.copy() for memory in self._fetched))


class CacheMemory:
    """Two sets of buffers, each for the keys and values of `capacity` positions."""

    def __init__(self, tensors: tuple[TensorSpec, ...], capacity: int):
        self.capacity = capacity
        self.sets: list[list[Buffer]] = []
        for _ in range(CACHE_SETS):
            self.sets.append([make_buffer(t, _sized(t, capacity)) for t in tensors])


class TrtCache:
    """One conversation's keys and values: `length` positions in the set `current`."""

    def __init__(self, memory: CacheMemory):
        self.memory = memory
        self.length = 0
        self.current, self.next = memory.sets

    def checked_total(self, past: int, new: int) -> int:
        """Positions after this step, which goes on from the cache's end or starts anew."""
        if past not in (0, self.length) or past + new > self.memory.capacity:
            raise BackendError(
                f"a cache of {self.memory.capacity} positions, {self.length} of them in use, "
                f"cannot take {new} after {past}: go on from its end, or open another"
            )
        return past + new

    def swap(self, length: int) -> None:
        """The set that was written, `length` positions, is read from now on."""
        self.current, self.next = self.next, self.current
        self.length = length


def make_buffer(tensor: TensorSpec, shape: Shape) -> Buffer:
    """Device memory for a tensor of this shape."""
    return Buffer(int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize)


def _exchanged(tensor: TensorSpec, shape: Shape) -> Copied | Mapped:
    return cuda_memory.exchange(int(np.prod(shape)), tensor.dtype)


def _sized(tensor: TensorSpec, size: int) -> Shape:
    """The shape of a tensor whose dynamic dimension, if it has one, is `size`."""
    return tuple(size if isinstance(dim, str) else dim for dim in tensor.shape)


def _contiguous(feed: Arrays) -> Arrays:
    return {name: np.ascontiguousarray(value) for name, value in feed.items()}


def _chosen_by(scores: tuple[TensorSpec, ...]) -> list[TensorSpec]:
    """The outputs that make Scores, in its order: top k logits and tokens, or all logits."""
    by_name = {tensor.name: tensor for tensor in scores}
    if TOPK_LOGITS in by_name and TOPK_TOKENS in by_name:
        return [by_name[TOPK_LOGITS], by_name[TOPK_TOKENS]]
    return [by_name["logits"]]


# --- the doctor ---


def check(subject: Subject) -> Iterator[Finding]:
    """Whether TensorRT is installed for this Python; off a Jetson, also TensorRT-RTX."""
    package = subject.package("tensorrt")
    system = machine.system_tensorrt(subject.root)
    if package:
        remedy = f"engines need 10.3 or later: flash JetPack 6.2 or 7.2, see {DOCS}"
        new_enough = version_numbers(package.version) >= MIN_VERSION
        yield assess("TensorRT", package.version, new_enough, remedy)
    elif system:
        yield _hidden(system, "python" + ".".join(subject.python.split(".")[:2]))
    elif subject.jetson:
        yield Finding("TensorRT", "not installed", False, "sudo apt install nvidia-jetpack")
    else:
        remedy = "to build engines: pip install tensorrt-rtx"
        yield optional(subject, "TensorRT-RTX", ("tensorrt-rtx",), remedy)


def _hidden(system: machine.SystemTensorRT, python: str) -> Finding:
    """Why this Python does not see the system's TensorRT."""
    if not system.pythons:
        why = "has no Python bindings"
        remedy = "sudo apt install python3-libnvinfer"
    elif python not in system.pythons:
        why = f"is for {', '.join(system.pythons)}, this is {python}"
        remedy = f"use {system.pythons[-1]}"
    else:
        why = "is not seen by this Python"
        remedy = "make the venv with `python3 -m venv --system-site-packages`"
    return Finding("TensorRT", f"the system's {system.version} {why}", False, remedy)


# --- the backend ---


def load_runner(graph: GraphFile, threads: int | None) -> TrtRunner:
    return TrtRunner(graph)


def load_decoder(graph: GraphFile, threads: int | None) -> TrtDecoder:
    return TrtDecoder(graph)


BACKEND = Backend("tensorrt", load_runner, load_decoder, check, cache_sets=CACHE_SETS)
