"""One graph -> one engine, in a process of its own: `python -m tiny_align.engines.build_one < job.json`.

Not for people: process.py starts it, so that every build begins with unbroken memory and none can take the command
down; it dies with that command. The job is a JSON object: graph (path), engine (path to write), profile (input ->
least, usual and greatest shape), package ("tensorrt" or "tensorrt_rtx"), compute_capability, refittable (whether the
engine shall take other weights later), timing_cache (path of the file to read and to write, or null). Lines of stdout
are JSON objects: {"progress", "phase"}, and at last the result. What the builder had to say against the graph goes to
stderr, with exit status 2.
"""

import contextlib
import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from tiny_align.engines.progress import make_monitor
from tiny_align.runtime.errors import BackendError, TinyAlignError
from tiny_align.runtime.files import written_file

REFUSED, UNWRITTEN = (
    2,
    3,
)  # exit status: the builder does not take the graph; the engine cannot be written
ECHO = "ModelImporter.cpp"  # TensorRT logs each parser error once more under this name
PR_SET_PDEATHSIG = 1  # Linux's <sys/prctl.h>


def build(job: dict) -> dict:
    """Parse the graph, build its engine and write it.

    Strongly typed: the precision is the graph's. TF32 is off, as in Polygraphy.

    Returns:
        "seconds" for parsing, building and writing; "peak_memory_bytes", the most this process had resident; "flags",
        those of the builder that were set; "optimization_level".

    Raises:
        BackendError: with every error of parser and builder.
        TinyAlignError: the engine or the timing cache cannot be written.
    """
    _choose_backend(job["package"])
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    errors, start = _collect_errors(), time.perf_counter()
    try:
        builder, network, _parser = network_from_onnx_path(job["graph"], strongly_typed=True)
        config = _config(job, builder, network)
        with written_file(Path(job["engine"])) as engine:
            _build_into(engine, importlib.import_module(job["package"]), builder, network, config)
    except (PolygraphyException, _NotBuilt) as error:
        raise BackendError("\n".join(_told(errors)) or "it does not say why") from error
    seconds = round(time.perf_counter() - start, 3)
    if job["timing_cache"]:
        _save_timing_cache(config, Path(job["timing_cache"]))
    return {
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        **_settings(config, job["package"]),
    }


def _choose_backend(package: str) -> None:
    """Tell Polygraphy which of the two to use; it reads this once, when it is imported."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if package == "tensorrt_rtx" else "0"


class _NotBuilt(Exception):
    """The builder gave no engine; why is in its log."""


def _build_into(path: Path, tensorrt, builder, network, config) -> None:
    """Build and write, piece by piece where this TensorRT can: then memory never holds the engine as a whole."""
    with open(path, "wb") as file:
        if not hasattr(builder, "build_serialized_network_to_stream"):
            engine = builder.build_serialized_network(network, config)
            if engine is None:
                raise _NotBuilt
            file.write(engine)
            return
        writer = _make_writer(tensorrt, file)
        built = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.error is not None:
            raise writer.error
        if not built:
            raise _NotBuilt


def _make_writer(tensorrt, file):
    class Writer(tensorrt.IStreamWriter):
        def __init__(self):
            tensorrt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # not through the builder, which would end the process
                self.error = error
                return 0

    return Writer()


def _config(job: dict, builder, network):
    from polygraphy.backend.trt import create_config

    warnings.filterwarnings(
        "ignore", "(?s).*Timing cache operations are no-ops"
    )  # Polygraphy always makes one
    with _timing_cache(job["timing_cache"]) as cache:
        config = create_config(
            builder,
            network,
            profiles=[_profile(job["profile"])],
            load_timing_cache=cache,
            refittable=job["refittable"],
            progress_monitor=make_monitor(importlib.import_module(job["package"]), _tell),
        )
    if job["package"] == "tensorrt_rtx":
        _set_target(config, job["compute_capability"])
    return config


def _tell(fraction: float, phase: str) -> None:
    print(json.dumps({"progress": round(fraction, 4), "phase": phase}), flush=True)


def _timing_cache(path: str | None):
    """The open file of an earlier build; a context of None where there is none that can be read.

    Of one that is damaged TensorRT makes no cache, and Polygraphy then begins an empty one.
    """
    with contextlib.suppress(OSError):
        if path and Path(path).is_file():
            return open(path, "rb")
    return contextlib.nullcontext()


def _save_timing_cache(config, path: Path) -> None:
    """What the builder timed, for the next build: on the device most of a build is timing."""
    cache = config.get_timing_cache()
    if cache is not None:
        with written_file(path) as file:
            file.write_bytes(cache.serialize())


def _settings(config, package: str) -> dict:
    flags = importlib.import_module(package).BuilderFlag.__members__
    return {
        "flags": [name for name, flag in flags.items() if config.get_flag(flag)],
        "optimization_level": config.builder_optimization_level,
    }


def _profile(shapes: dict):
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, (least, usual, greatest) in shapes.items():
        profile.add(name, min=least, opt=usual, max=greatest)
    return profile


def _set_target(config, compute_capability: int) -> None:
    """Only TensorRT-RTX has a target to set; TensorRT builds for the GPU it runs on."""
    target = getattr(
        importlib.import_module("tensorrt_rtx").ComputeCapability, f"SM{compute_capability}"
    )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(target, 0):
        raise BackendError(
            f"TensorRT-RTX does not take the compute capability {compute_capability}"
        )


def _collect_errors() -> list[str]:
    """From now on Polygraphy's log, which carries TensorRT's, is silent and its errors are added to this list."""
    from polygraphy.logger import G_LOGGER

    errors, handler = [], logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())
    logger = logging.getLogger("Polygraphy")
    logger.propagate = False
    logger.addHandler(handler)
    G_LOGGER.letter = G_LOGGER.colors = False
    G_LOGGER.use_python_logging_system = True
    return errors


def _told(errors: list[str]) -> list[str]:
    """The errors, each once and without TensorRT's echo of the parser's."""
    return list(dict.fromkeys(e for e in errors if not e.startswith(ECHO))) or errors


def peak_memory_bytes() -> int:
    """The most memory this process had resident. Memory of the GPU does not count, not even where it is shared.

    From the kernel's VmHWM, because a child's ru_maxrss starts at the size of the process that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def die_with_parent() -> None:
    """This process ends when the one that started it does, however it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


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
