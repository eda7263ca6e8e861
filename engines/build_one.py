"""One graph -> one engine, in a process of its own.

    python -m tiny_align.engines.build_one < job.json

Not a command for users: process.py starts it, so that every build has unfragmented memory and
a crash does not end the command. It dies with that command. stdin is a BuildJob (process.py)
as JSON. Lines of stdout are JSON objects: {"progress", "phase"}, and at last the result of
`build`. If the builder refuses the graph, its errors are on stderr and the exit status is 2.
"""

import contextlib
import importlib
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from tiny_align.engines.process import REFUSED, UNWRITTEN, BuildJob, die_with_parent
from tiny_align.engines.progress import make_monitor
from tiny_align.runtime.errors import BackendError, TinyAlignError
from tiny_align.runtime.files import written_file

ECHO = "ModelImporter.cpp"  # under this name TensorRT logs each parser error a second time

# Objects of TensorRT's Python bindings, which have no types.
TrtBuilder = Any
TrtNetwork = Any
TrtConfig = Any


class NotBuiltError(Exception):
    """The builder returned no engine; its log tells why."""


def build(job: BuildJob) -> dict:
    """Parse the graph, build its engine and write it.

    Strongly typed: the precision is the graph's. TF32 is off, as in Polygraphy.

    Returns:
        "seconds" for parsing, building and writing; "peak_memory_bytes", the most this
        process had resident; "flags", those of the builder that were set;
        "optimization_level".

    Raises:
        BackendError: with every error of parser and builder.
        TinyAlignError: the engine or the timing cache cannot be written.
    """
    # Polygraphy reads this once, when it is imported.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if job["package"] == "tensorrt_rtx" else "0"
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    log = collect_errors()
    start = time.perf_counter()
    try:
        builder, network, _parser = network_from_onnx_path(job["graph"], strongly_typed=True)
        tensorrt = importlib.import_module(job["package"])
        config = _make_config(job, tensorrt, builder, network)
        with written_file(Path(job["engine"])) as path:
            write_engine(path, tensorrt, builder, network, config)
    except (PolygraphyException, NotBuiltError) as error:
        raise BackendError(log.text() or "it does not say why") from error
    seconds = round(time.perf_counter() - start, 3)
    if job["timing_cache"]:
        _save_timing_cache(config, Path(job["timing_cache"]))
    flags = tensorrt.BuilderFlag.__members__
    return {
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "flags": [name for name, flag in flags.items() if config.get_flag(flag)],
        "optimization_level": config.builder_optimization_level,
    }


def _make_config(
    job: BuildJob, tensorrt: ModuleType, builder: TrtBuilder, network: TrtNetwork
) -> TrtConfig:
    from polygraphy.backend.trt import Profile, create_config

    profile = Profile()
    for name, (min_shape, opt_shape, max_shape) in job["profile"].items():
        profile.add(name, min=min_shape, opt=opt_shape, max=max_shape)
    # Polygraphy always makes a timing cache.
    warnings.filterwarnings("ignore", "(?s).*Timing cache operations are no-ops")
    with _open_timing_cache(job["timing_cache"]) as cache:
        config = create_config(
            builder,
            network,
            profiles=[profile],
            load_timing_cache=cache,
            refittable=job["refittable"],
            progress_monitor=make_monitor(tensorrt, _print_progress),
        )
    if job["package"] == "tensorrt_rtx":  # TensorRT builds for the GPU it runs on
        target = getattr(tensorrt.ComputeCapability, f"SM{job['compute_capability']}")
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(target, 0):
            raise BackendError(
                f"TensorRT-RTX does not accept the compute capability {job['compute_capability']}"
            )
    return config


def _print_progress(fraction: float, phase: str) -> None:
    print(json.dumps({"progress": round(fraction, 4), "phase": phase}), flush=True)


def _open_timing_cache(path: str | None) -> contextlib.AbstractContextManager:
    """The open file of an earlier build; a context of None if there is none that can be read.

    If it is damaged, TensorRT makes no cache of it and Polygraphy starts an empty one.
    """
    with contextlib.suppress(OSError):
        if path and Path(path).is_file():
            return open(path, "rb")
    return contextlib.nullcontext()


def _save_timing_cache(config: TrtConfig, path: Path) -> None:
    """Save what the builder timed for the next build: on the device most of a build is timing."""
    cache = config.get_timing_cache()
    if cache is not None:
        with written_file(path) as file:
            file.write_bytes(cache.serialize())


def write_engine(
    path: Path, tensorrt: ModuleType, builder: TrtBuilder, network: TrtNetwork, config: TrtConfig
) -> None:
    """Build the engine and write it.

    A TensorRT that can stream writes it piece by piece: then it is never in memory as a whole.

    Raises:
        NotBuiltError: the builder returned no engine.
        OSError: it cannot be written.
    """
    with open(path, "wb") as file:
        if not hasattr(builder, "build_serialized_network_to_stream"):
            engine = builder.build_serialized_network(network, config)
            if engine is None:
                raise NotBuiltError
            file.write(engine)
            return
        writer = _make_writer(tensorrt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        if not built:
            raise NotBuiltError


def _make_writer(tensorrt: ModuleType, file: IO[bytes]) -> Any:
    """An IStreamWriter that writes to a file and keeps the error of a write that failed."""
    base: Any = tensorrt.IStreamWriter  # of a package without types

    class Writer(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # raised through the builder it would end the process
                self.error = error
                return 0

    return Writer()


class ErrorLog(logging.Handler):
    """Collects errors instead of printing them."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(record.getMessage())

    def text(self) -> str:
        """The errors, each once and without TensorRT's echo of the parser's."""
        errors = [error for error in self.errors if not error.startswith(ECHO)]
        return "\n".join(dict.fromkeys(errors) or self.errors)


def collect_errors() -> ErrorLog:
    """Silence Polygraphy's log, which contains TensorRT's, and collect its errors from now on."""
    from polygraphy.logger import G_LOGGER

    log = ErrorLog()
    logger = logging.getLogger("Polygraphy")
    logger.propagate = False
    logger.addHandler(log)
    G_LOGGER.letter = False
    G_LOGGER.colors = False
    G_LOGGER.use_python_logging_system = True
    return log


def peak_memory_bytes() -> int:
    """The most memory this process had resident.

    Memory of the GPU does not count, not even where it is shared.

    From the kernel's VmHWM, because a child's ru_maxrss starts at the size of the process
    that started it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise BackendError("the kernel does not report VmHWM in /proc/self/status: build on Linux")


def main() -> int:
    die_with_parent()
    try:
        result = build(json.load(sys.stdin))
    except TinyAlignError as error:
        print(error, file=sys.stderr)
        return REFUSED if isinstance(error, BackendError) else UNWRITTEN
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
