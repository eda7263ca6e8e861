"""One TensorRT engine, ready to run: found, loaded, checked, given its weights.

An engine is built by `tiny-align build-engines`, never here. It is read from the bundle's
engines/ and compared with this machine and the bundle first (bundle/engines.py), then with the
manifest's names and types. A user's projector has an engine of its own, in engines/ of the user's
folder; without one the bundle's engine is loaded and *refitted*: given the weights of the user's
graph.

A call of TensorRT that fails returns None or False, and the reason is in the log: see
`Engine._require`.
"""

import functools
import mmap
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tiny_align.runtime.backends.base import GraphFile
from tiny_align.runtime.backends.cuda_memory import Buffer, Copied, Mapped, Stream
from tiny_align.runtime.bundle.engines import (
    PACKAGES,
    build_command,
    check_engine,
    import_tensorrt,
    machine_facts,
)
from tiny_align.runtime.bundle.profile import Shape, ShapeRange
from tiny_align.runtime.errors import BackendError

PROFILE = 0  # an engine has one profile
MAX_ERRORS = 4  # of TensorRT's errors, the last ones, in a message


def _package() -> ModuleType:
    """TensorRT, or TensorRT-RTX if only that is installed."""
    for name in PACKAGES:
        module = import_tensorrt(name, "Runtime")
        if module is not None:
            return module
    raise BackendError(
        "the backend 'tensorrt' needs TensorRT, which is not installed for this Python. On a "
        "Jetson it comes with JetPack: make the venv with --system-site-packages. Or choose "
        "--backend onnxruntime"
    )


@functools.cache
def _logger(trt: ModuleType) -> Any:
    """TensorRT's logger, one for everything, as TensorRT wants it; `errors` has the last ones."""
    base: Any = trt.ILogger

    class Logger(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: deque[str] = deque(maxlen=MAX_ERRORS)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (base.Severity.ERROR, base.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Logger()


def find_engine(graph: GraphFile, facts: dict) -> tuple[Path, bool]:
    """The engine of a graph, checked, and whether it still needs the graph's weights.

    Raises:
        BackendError: a graph without a bundle, or no engine that fits.
    """
    bundle = graph.bundle
    if bundle is None:
        raise BackendError(
            f"the backend 'tensorrt' runs engines of a bundle, and {graph.path} is a graph by "
            "itself: load it with another backend"
        )
    if graph.user is not None and (graph.user / "engines").is_dir():
        return check_engine(bundle.for_user(graph.user), graph.name, facts), False
    engine = check_engine(bundle, graph.name, facts)
    return engine, not graph.path.samefile(bundle.graph(graph.name, "tensorrt"))


class Engine:
    """An engine with its execution context and its stream.

    Raises:
        BackendError: what TensorRT refuses, in its own words.
    """

    def __init__(self, graph: GraphFile):
        self.spec = graph.spec
        self._trt = _package()
        self._log = _logger(self._trt)
        facts = machine_facts(self._trt.__name__, self._trt.__version__)
        self.file, needs_weights = find_engine(graph, facts)
        self.stream = Stream()
        self._runtime = self._make(self._trt.Runtime, self._log)
        self._engine = self._load()
        self._check_tensors()
        if needs_weights:
            self._refit(graph)
        context = self._engine.create_execution_context()
        self._context = self._require(context, "make an execution context")

    def _require(self, value: Any, what: str) -> Any:
        """Return the value, or raise with TensorRT's reason if it is None or False."""
        if value is None or value is False:
            reason = " ".join(self._log.errors) or "it does not say why"
            version = f"{self._trt.__name__} {self._trt.__version__}"
            raise BackendError(f"{version} cannot {what} for {self.file}: {reason}")
        return value

    def _make(self, kind: Any, *arguments: Any) -> Any:
        """An object of one of TensorRT's classes."""
        try:
            return kind(*arguments)
        except TypeError:  # how pybind11 says that TensorRT made none
            return self._require(None, f"make a {kind.__name__}")

    def _load(self) -> Any:
        """The engine, deserialised from its mapped file: an 8 GB board would not hold it twice."""
        self._log.errors.clear()
        try:
            with (
                open(self.file, "rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                engine = self._runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise BackendError(
                f"{self.file} cannot be read ({error}): build the engines again"
            ) from error
        return self._require(engine, "load the engine")

    def _check_tensors(self) -> None:
        """Refuse names, directions and types unlike the manifest's, and tensors on the host."""
        found = set()
        on_host = []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
                on_host.append(name)
            is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            found.add((name, is_input, dtype))
        expected = set()
        for tensors, is_input in ((self.spec.inputs, True), (self.spec.outputs, False)):
            for tensor in tensors:
                expected.add((tensor.name, is_input, np.dtype(tensor.dtype)))
        if found != expected:
            odd = ", ".join(sorted(f"{name} {dtype}" for name, _, dtype in found ^ expected))
            raise BackendError(
                f"{self.file} and the bundle's manifest differ in {odd}: build the engines again"
            )
        if on_host:
            names = ", ".join(on_host)
            raise BackendError(f"{self.file} wants {names} in host memory: export the bundle again")

    def _refit(self, graph: GraphFile) -> None:
        """Give the engine the weights of a graph that differs in nothing else."""
        if not self._engine.refittable:
            assert graph.bundle is not None  # see find_engine
            own = graph.bundle.for_user(graph.user or graph.path.parent)
            raise BackendError(
                f"{self.file} was built without REFIT and {graph.path} has other weights: build an "
                f"engine of it with `{build_command(own)}`"
            )
        self._log.errors.clear()
        refitter = self._make(self._trt.Refitter, self._engine, self._log)
        parser = self._make(self._trt.OnnxParserRefitter, refitter, self._log)
        what = f"take the weights of {graph.path}"
        if not parser.refit_from_file(str(graph.path)):
            for index in range(parser.num_errors):
                self._log.errors.append(parser.get_error(index).desc())
            self._require(False, what)
        self._require(refitter.refit_cuda_engine(), what)

    def _shapes(self, name: str) -> ShapeRange:
        """What the engine's profile allows for an input."""
        min_, opt, max_ = self._engine.get_tensor_profile_shape(name, PROFILE)
        return ShapeRange(tuple(min_), tuple(opt), tuple(max_))

    def max_shape(self, name: str) -> Shape:
        """The max shape of an input."""
        return self._shapes(name).max

    def set_shape(self, name: str, shape: Shape) -> None:
        """Set an input's shape for the next run."""
        if not self._context.set_input_shape(name, shape):
            known = self._shapes(name)
            raise BackendError(
                f"{self.file} takes {name} from {list(known.min)} to {list(known.max)}, "
                f"got {list(shape)}"
            )

    def shape(self, name: str) -> Shape:
        """An output's shape for the inputs' shapes that are set."""
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise BackendError(
                f"{self.file} gives {name} a size that is known only after a run: {list(shape)}"
            )
        return shape

    def set_address(self, name: str, memory: Buffer | Copied | Mapped) -> None:
        """Set where an input is read or an output is written."""
        accepted = self._context.set_tensor_address(name, memory.address)
        self._require(accepted, f"take the address of {name}")

    def run(self, stream: Stream) -> None:
        """Start the work; `stream.synchronise` waits for it."""
        self._log.errors.clear()
        self._require(self._context.execute_async_v3(stream.handle), "run the graph")
