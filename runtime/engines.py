"""Engines on disk: the file that belongs to a graph on this machine."""

from pathlib import Path

from tiny_align.runtime.bundle import Bundle
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import gpu_compute_capability


def machine_facts(package: str, version: str) -> dict:
    """What an engine is bound to, for a package that is imported on this machine."""
    return {"package": package, "version": version, "compute_capability": gpu_compute_capability()}


def check_engine(bundle: Bundle, graph: str, facts: dict) -> Path:
    """The engine of a graph, for a package, its version and this GPU."""
    key = f"{facts['package']}-{facts['version']}-sm{facts['compute_capability']}"
    engine = bundle.path / "engines" / key / f"{graph}.engine"
    if not engine.is_file():
        raise BackendError(f"there is no {engine}: run `tiny-align build-engines --bundle {bundle.path}`")
    return engine
