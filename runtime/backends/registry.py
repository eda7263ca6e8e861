"""The backends there are. A new backend is one file beside this one, and one line in MODULES.

A backend's file ends with its `BACKEND` (base.Backend) and is imported when the backend is asked
for, so that `names` costs nothing. Nothing here replaces a backend by another.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tiny_align.runtime.errors import BackendError

if TYPE_CHECKING:
    from pathlib import Path

    from tiny_align.runtime.backends.base import Backend, Decoder, GraphFile, Runner
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.bundle.manifest import GraphSpec

MODULES = {  # name, as --backend takes it -> the module with its BACKEND
    "onnxruntime": "tiny_align.runtime.backends.onnxruntime",
    "tensorrt": "tiny_align.runtime.backends.tensorrt",
}
DEFAULT = "onnxruntime"


def names() -> tuple[str, ...]:
    """What --backend takes, the default first."""
    return tuple(MODULES)


def find_backend(name: str) -> Backend:
    """
    Raises:
        BackendError: there is none of that name.
    """
    if name not in MODULES:
        raise BackendError(f"there is no backend {name!r}: choose one of {', '.join(names())}")
    return import_module(MODULES[name]).BACKEND


def graph_specs(bundle: Bundle, backend: str) -> dict[str, GraphSpec]:
    """Name of a graph -> the graph that the backend takes, which may be one of its own."""
    chosen = find_backend(backend)
    specs = {}
    for name, graph in bundle.manifest.graphs.items():
        taken_by = backend
        if name != "llm" and chosen.runner_graphs:
            taken_by = chosen.runner_graphs
        specs[name] = graph.on(taken_by)
    return specs


def load_runner(
    path: Path,
    spec: GraphSpec,
    backend: str,
    threads: int | None = None,
    bundle: Bundle | None = None,
) -> Runner:
    """Load one graph with the named backend.

    Args:
        path: the ONNX file; TensorRT loads the bundle's engine and gives it this file's weights.
        spec: its entry in the manifest, as the backend takes it (`graph_specs`).
        threads: CPU threads, of ONNX Runtime; None: all cores.
        bundle: the bundle that it belongs to; TensorRT takes its engines. If `path` lies in
            another folder, that is a user's.

    Raises:
        BackendError: there is no such backend, or it cannot load the graph.
    """
    return find_backend(backend).load_runner(_graph_file(path, spec, bundle), threads)


def load_decoder(
    path: Path,
    spec: GraphSpec,
    backend: str,
    threads: int | None = None,
    bundle: Bundle | None = None,
) -> Decoder:
    """Load the LLM's graph with the named backend; arguments and errors as of `load_runner`."""
    return find_backend(backend).load_decoder(_graph_file(path, spec, bundle), threads)


def _graph_file(path: Path, spec: GraphSpec, bundle: Bundle | None) -> GraphFile:
    from tiny_align.runtime.backends.base import GraphFile

    if bundle is None:
        return GraphFile(path, spec)
    name = ""
    for graph_name, graph in bundle.manifest.graphs.items():
        for known in (graph, *graph.backends.values()):
            if known.file == spec.file:
                name = graph_name
    in_bundle = path.parent.resolve() == bundle.path.resolve()
    return GraphFile(path, spec, bundle, name, user=None if in_bundle else path.parent)
