"""Stands in for `tensorrt` and libcudart, and computes: on the bytes at the addresses that are set,
in the shapes set.

What the backend gets wrong goes wrong here too. Memory of the "device" is NaN until it is written
and after it was freed. Outputs are overwritten with NaN before inputs are read. A range that leaves
its allocation is an illegal address. Nothing runs and nothing comes back before the stream is
synchronised. A shape outside the profile is refused. Memory shared with the host has another
address there than on the "device".

An "engine" is a JSON file that names the ONNX graph, which ONNX Runtime runs. Speed is not
emulated, nor is TensorRT's arithmetic. Classes and parameters are those of
tests/data/tensorrt-api.json: test_trt.py checks that.
"""

import ctypes
import enum
import functools
import json
import sys
import types
from pathlib import Path

import numpy as np

from tiny_align.runtime.backends import cuda_memory
from tiny_align.runtime.backends.onnxruntime import open_session

OK = 0  # cudaError_t
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
ILLEGAL_ADDRESS = 700
WORDS = {
    INVALID_VALUE: b"invalid argument",
    OUT_OF_MEMORY: b"out of memory",
    ILLEGAL_ADDRESS: b"illegal memory access",
}
ALIGNMENT = 256  # bytes
MAPPED_AT = 1 << 52  # from the host's address of shared memory to the device's: no memory is there
NAN = 0xFF  # a byte; four of them are a float32 that is none
BUILD_ONE = (  # stands in for engines.build_one: the job on stdin, the cost on stdout
    "import json, sys; job = json.load(sys.stdin); "
    "engine = {'graph': job['graph'], 'profile': job['profile'], 'refittable': job.get('refittable', True)}; "
    "open(job['engine'], 'w').write(json.dumps(engine)); "
    "print(json.dumps({'seconds': 0.0, 'peak_memory_bytes': 1}))"
)


class Cudart:
    """libcudart on host memory, of a GPU that shares it, as a Jetson's does."""

    def __init__(self, capacity: int = 1 << 30, integrated: bool = True):
        self.capacity = capacity
        self.integrated = integrated
        self.n_mallocs = 0
        self.copied = {cuda_memory.TO_DEVICE: [], cuda_memory.TO_HOST: []}  # bytes of each copy
        self.live: dict[int, np.ndarray] = {}  # address -> its bytes
        # not given back, so that a stray address does no harm to the process
        self._freed: list = []
        self._queues: dict[int, list] = {}

    @property
    def n_bytes(self) -> int:
        return sum(len(memory) for memory in self.live.values())

    def cudaMalloc(self, address, size: int) -> int:
        return self._allocate(address, size, 0)

    def cudaFree(self, address: int) -> int:
        return INVALID_VALUE if address >= MAPPED_AT else self._free(address)

    def cudaHostAlloc(self, address, size: int, flags: int) -> int:
        if flags != cuda_memory.MAPPED:
            return INVALID_VALUE
        return self._allocate(address, size, MAPPED_AT)

    def cudaHostGetDevicePointer(self, address, host: int, flags: int) -> int:
        address._obj.value = host + MAPPED_AT
        return OK if host + MAPPED_AT in self.live and flags == 0 else INVALID_VALUE

    def cudaFreeHost(self, address: int) -> int:
        return self._free(address + MAPPED_AT)

    def cudaGetDevice(self, device) -> int:
        device._obj.value = 0
        return OK

    def cudaDeviceGetAttribute(self, value, which: int, device: int) -> int:
        known = {cuda_memory.INTEGRATED: self.integrated, cuda_memory.CAN_MAP_HOST_MEMORY: True}
        value._obj.value = known[which]
        return OK if device == 0 else INVALID_VALUE

    def _allocate(self, address, size: int, shift: int) -> int:
        """Memory that the device has at `shift` bytes from its address here."""
        self.n_mallocs += 1
        if size < 1 or self.n_bytes + size > self.capacity:
            return OUT_OF_MEMORY
        block = np.full(size + ALIGNMENT, NAN, np.uint8)
        start = -block.ctypes.data % ALIGNMENT
        address._obj.value = block.ctypes.data + start
        self.live[block.ctypes.data + start + shift] = block[start : start + size]
        return OK

    def _free(self, address: int) -> int:
        if address not in self.live:
            return INVALID_VALUE
        memory = self.live.pop(address)
        memory[:] = NAN
        self._freed.append(memory)
        return OK

    def cudaStreamCreate(self, stream) -> int:
        stream._obj.value = len(self._queues) + 1
        self._queues[stream._obj.value] = []
        return OK

    def cudaStreamDestroy(self, stream: int) -> int:
        return OK if stream in self._queues else INVALID_VALUE

    def cudaMemcpyAsync(self, to: int, origin: int, size: int, kind: int, stream: int) -> int:
        device = self.memory(to if kind == cuda_memory.TO_DEVICE else origin, size)
        host = origin if kind == cuda_memory.TO_DEVICE else to
        if device is None or stream not in self._queues or self.memory(host, 1) is not None:
            return INVALID_VALUE
        self.copied[kind].append(size)
        if kind == cuda_memory.TO_DEVICE:  # pageable memory is read at once
            sent = ctypes.string_at(host, size)
            source = np.frombuffer(sent, np.uint8)
            self.enqueue(stream, lambda: np.copyto(device, source))
        else:
            self.enqueue(stream, lambda: ctypes.memmove(host, device.ctypes.data, size))
        return OK

    def cudaMemcpy2DAsync(self, to, to_pitch, origin, pitch, width, height, kind, stream) -> int:
        source = self.memory(origin, pitch * height)
        target = self.memory(to, to_pitch * height)
        if source is None or target is None:
            return INVALID_VALUE
        if width > min(pitch, to_pitch) or kind != cuda_memory.ON_DEVICE:
            return INVALID_VALUE
        rows = source.reshape(height, pitch)[:, :width]
        places = target.reshape(height, to_pitch)[:, :width]
        self.enqueue(stream, lambda: np.copyto(places, rows.copy()))
        return OK

    def cudaStreamSynchronize(self, stream: int) -> int:
        if stream not in self._queues:
            return INVALID_VALUE
        steps = self._queues[stream]
        self._queues[stream] = []
        try:
            for step in steps:
                step()
        except IllegalAddress:
            return ILLEGAL_ADDRESS
        return OK

    def cudaGetErrorString(self, status: int) -> bytes:
        return WORDS[status]

    def enqueue(self, stream: int, step) -> None:
        self._queues[stream].append(step)

    def memory(self, address: int, size: int) -> np.ndarray | None:
        """The bytes from an address on, (size,) uint8; None unless they lie in one allocation."""
        for start, block in list(self.live.items()):  # other threads allocate
            if start <= address and address + size <= start + len(block):
                return block[address - start : address - start + size]
        return None


class IllegalAddress(Exception):
    """A kernel read or wrote outside of its memory."""


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64, BOOL = range(5)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


NUMPY = {
    DataType.FLOAT: "float32",
    DataType.HALF: "float16",
    DataType.INT32: "int32",
    DataType.INT64: "int64",
}
ORT = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int64)": DataType.INT64,
}


def nptype(trt_type):
    return np.dtype(NUMPY[trt_type]).type


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self):
        self._made = True

    def log(self, severity, msg):
        raise NotImplementedError


def _log_error(logger, message: str) -> None:
    assert logger._made, "pybind11 wants ILogger.__init__ to be called"
    logger.log(ILogger.Severity.INFO, "an event of no interest")
    logger.log(ILogger.Severity.ERROR, message)


class Runtime:
    def __init__(self, logger):
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        try:
            return ICudaEngine(json.loads(bytes(serialized_engine)), self._logger)
        except ValueError:
            return _log_error(self._logger, "Serialization assertion failed")


@functools.lru_cache(maxsize=16)
def _loaded(graph: str, changed: int):
    return open_session(Path(graph), 1, spinning=False)


@functools.lru_cache(maxsize=4096)
def _output_shapes(session, shapes: tuple) -> dict[str, tuple[int, ...]]:
    """Output shapes for input shapes: found by running, since an ONNX graph does not have them."""
    zeros = {}
    for value, shape in zip(session.get_inputs(), shapes, strict=True):
        zeros[value.name] = np.zeros(shape, NUMPY[ORT[value.type]])
    names = [output.name for output in session.get_outputs()]
    return {name: value.shape for name, value in zip(names, session.run(names, zeros))}


class ICudaEngine:
    def __init__(self, content: dict, logger):
        self._logger = logger
        self._profile = content["profile"]
        self._refittable = content["refittable"]
        self._load(content["graph"])

    def _load(self, graph: str) -> None:
        self._graph = graph
        changed = sum(path.stat().st_mtime_ns for path in _files(Path(graph)))
        self._session = _loaded(graph, changed)
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = {value.name: value for value in self._session.get_outputs()}

    @property
    def num_io_tensors(self):
        return len(self._inputs) + len(self._outputs)

    @property
    def refittable(self):
        return self._refittable

    def get_tensor_name(self, index):
        return [*self._outputs, *self._inputs][index]  # no caller may rely on the order

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        return ORT[{**self._inputs, **self._outputs}[name].type]

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile_index):
        assert profile_index == 0
        return [tuple(shape) for shape in self._profile[name]]

    def create_execution_context(self):
        return IExecutionContext(self)


def _files(graph: Path):
    return sorted(graph.parent.glob(f"{graph.name}*"))


class IExecutionContext:
    def __init__(self, engine: ICudaEngine):
        self._engine = engine
        self._session = engine._session
        self._shapes = {}
        self._addresses = {}

    def set_input_shape(self, name, shape):
        min_, _, max_ = self._engine._profile[name]
        inside = [low <= size <= high for low, size, high in zip(min_, shape, max_)]
        if len(shape) != len(min_) or not all(inside):
            message = f"Supplied shape {list(shape)} for {name} is outside the profile"
            _log_error(self._engine._logger, message)
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, memory):
        known = {**self._engine._inputs, **self._engine._outputs}
        if memory == 0 or memory % ALIGNMENT or name not in known:
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name):
        if set(self._shapes) != set(self._engine._inputs):
            return (-1,)
        return {**self._shapes, **self._output_shapes()}[name]

    def execute_async_v3(self, stream_handle):
        missing = {*self._engine._inputs, *self._engine._outputs} - set(self._addresses)
        if missing or set(self._shapes) != set(self._engine._inputs):
            message = f"Neither address nor shape may be missing: {sorted(missing)}"
            _log_error(self._engine._logger, message)
            return False
        work = functools.partial(
            self._compute, dict(self._shapes), dict(self._addresses), self._output_shapes()
        )
        cuda_memory.library().enqueue(stream_handle, work)
        return True

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = tuple(self._shapes[name] for name in self._engine._inputs)
        return _output_shapes(self._session, shapes)

    def _compute(self, shapes: dict, addresses: dict, output_shapes: dict) -> None:
        outputs = {}
        for name, shape in output_shapes.items():
            outputs[name] = self._array(addresses[name], name, shape)
            outputs[name].view(np.uint8)[...] = NAN
        feed = {}
        for name, shape in shapes.items():
            feed[name] = self._array(addresses[name], name, shape)
        for name, value in zip(outputs, self._session.run(list(outputs), feed)):
            outputs[name][...] = value

    def _array(self, address: int, name: str, shape: tuple) -> np.ndarray:
        dtype = np.dtype(NUMPY[self._engine.get_tensor_dtype(name)])
        memory = cuda_memory.library().memory(address, int(np.prod(shape)) * dtype.itemsize)
        if memory is None:
            raise IllegalAddress
        return memory.view(dtype).reshape(shape)


class Refitter:
    def __init__(self, engine, logger):
        self._engine = engine
        self._graph = None

    def refit_cuda_engine(self):
        if self._graph is None or not self._engine._refittable:
            return False
        self._engine._load(self._graph)
        return True


class ParserError:
    def __init__(self, message):
        self._message = message

    def desc(self):
        return self._message


class OnnxParserRefitter:
    def __init__(self, refitter, logger):
        self._refitter = refitter
        self._errors = []

    def refit_from_file(self, model):
        if _structure(model) != _structure(self._refitter._engine._graph):
            self._errors.append(ParserError("the model's structure is not the engine's"))
            return False
        self._refitter._graph = model
        return True

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return self._errors[index]


def _structure(graph: str):
    """A graph without its weights."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(graph, load_external_data=False).graph
    except (DecodeError, OSError):
        return None
    nodes = [node.SerializeToString(deterministic=True) for node in model.node]
    return nodes, [(t.name, t.data_type, tuple(t.dims)) for t in model.initializer]


API = (ILogger, Runtime, ICudaEngine, IExecutionContext, Refitter, ParserError, OnnxParserRefitter)
ENUMS = (DataType, TensorIOMode, TensorLocation, ILogger.Severity)


def install(monkeypatch, version: str = "10.3.0", capacity: int = 1 << 30) -> Cudart:
    """A machine with TensorRT and a GPU of compute capability 8.7, until the test is over.

    Returns its memory.
    """
    module = types.ModuleType("tensorrt")
    module.__dict__.update({c.__name__: c for c in (*API, DataType, TensorIOMode, TensorLocation)})
    module.__version__, module.nptype, module.Builder = version, nptype, object
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    cudart = Cudart(capacity)
    monkeypatch.setattr(cuda_memory, "library", lambda: cudart)
    for stage in ("runtime.bundle.engines", "engines.builder", "engines.build"):
        monkeypatch.setattr(f"tiny_align.{stage}.gpu_compute_capability", lambda: 87)
    monkeypatch.setattr("tiny_align.engines.process.COMMAND", (sys.executable, "-c", BUILD_ONE))
    return cudart
