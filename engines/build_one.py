"""One graph -> one engine, in a process of its own: `python -m tiny_align.engines.build_one < job.json`.

Not for people: build.py starts it, so that every build begins with unbroken memory and none can take the command
down. The job is a JSON object: graph (path), engine (path to write), profile (input -> least, usual and greatest
shape), package ("tensorrt" or "tensorrt_rtx"), compute_capability. The last line of stdout is a JSON object: seconds,
peak_memory_bytes. What the builder had to say against the graph goes to stderr, with exit status 2.
"""

import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path

from tiny_align.runtime.errors import BackendError, TinyAlignError

REFUSED = 2  # exit status: the builder does not take the graph
ECHO = "ModelImporter.cpp"  # TensorRT logs each parser error once more under this name


def build(job: dict) -> dict:
    """Parse the graph, build its engine and write it.

    Strongly typed: the precision is the graph's. TF32 is off, as in Polygraphy.

    Returns:
        "seconds" for parsing and building, and "peak_memory_bytes", the most this process had resident.

    Raises:
        BackendError: with every error of parser and builder.
    """
    _choose_backend(job["package"])
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    errors, start = _collect_errors(), time.perf_counter()
    try:
        network = network_from_onnx_path(job["graph"], strongly_typed=True)
        engine = engine_bytes_from_network(network, _config(job))
    except PolygraphyException as error:
        raise BackendError("\n".join(_told(errors))) from error
    Path(job["engine"]).write_bytes(engine)
    return {"seconds": round(time.perf_counter() - start, 3), "peak_memory_bytes": peak_memory_bytes()}


def _choose_backend(package: str) -> None:
    """Tell Polygraphy which of the two to use; it reads this once, when it is imported."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if package == "tensorrt_rtx" else "0"


def _config(job: dict):
    """Makes the builder's configuration once Polygraphy has the network."""
    from polygraphy.backend.trt import CreateConfig

    def create(builder, network):
        config = CreateConfig(profiles=[_profile(job["profile"])])(builder, network)
        if job["package"] == "tensorrt_rtx":
            _set_target(config, job["compute_capability"])
        return config

    return create


def _profile(shapes: dict):
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, (least, usual, greatest) in shapes.items():
        profile.add(name, min=least, opt=usual, max=greatest)
    return profile


def _set_target(config, compute_capability: int) -> None:
    """Only TensorRT-RTX has a target to set; TensorRT builds for the GPU it runs on."""
    target = getattr(importlib.import_module("tensorrt_rtx").ComputeCapability, f"SM{compute_capability}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(target, 0):
        raise BackendError(f"TensorRT-RTX does not take the compute capability {compute_capability}")


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


def main() -> int:
    try:
        result = build(json.load(sys.stdin))
    except TinyAlignError as error:
        print(error, file=sys.stderr)
        return REFUSED
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
