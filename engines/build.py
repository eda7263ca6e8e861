"""A bundle's graphs -> engines in bundle/engines/<key>/.

The key names one builder version and one kind of GPU.

Each graph is built in a fresh process (process.py), the largest first, while memory is least
fragmented. Engines gather in a hidden folder (engine_folder.py) until the last one is done.
select_precision.py chooses the precision. Nothing is loaded here: the runtime does that, and
checks engine.json first (runtime/bundle/engines.py):

    package, version        of the builder, see builder.py
    compute_capability      of the GPU it built for; with package and version it is the key
    jetpack                 the L4T release it ran on, null off a Jetson
    machine                 what it ran on: system, GPU, CUDA
    graphs: name ->
        precision           as in the manifest, or the selected rung's; "int4/fp16": weights in
                            INT4, computed in FP16
        asked               of a ladder (ladder.py): the request
        accuracy            of a ladder: the lowest cosine to the bundle's own graph and the
                            bound of each rung tried
        built_sha256        of the ONNX file that was built: a rung's, or the bundle's
        bytes               of <name>.engine
        engine_sha256       of <name>.engine
        seconds             of parsing, building and writing
        peak_memory_bytes   host memory of the build process
        flags               of the builder
        optimization_level  of the builder
        graph_sha256        of the ONNX file
        files               the ONNX file and its external data -> SHA-256, as in the manifest
        profile             input -> its "min", "opt" and "max" shape

An engine is stale if `files` differs from the manifest: a change of weights in external data
leaves the ONNX file unchanged. An engine is built from the manifest's plain graph, in the
precision that the graph has, or from a rung of it.
"""

from collections.abc import Iterable
from pathlib import Path

from tiny_align.engines.builder import Builder, find_builder
from tiny_align.engines.engine_folder import (
    TIMING_CACHE,
    remove_leftovers,
    take_over,
    unfinished_folder,
    valid_entries,
    write_record,
)
from tiny_align.engines.ladder import Ladder
from tiny_align.engines.preflight import require_legal, require_memory
from tiny_align.engines.process import BuildJob, run_build
from tiny_align.engines.progress import ReportProgress, progress_bar
from tiny_align.engines.select_precision import Selection, select_precision
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import engines_path
from tiny_align.runtime.bundle.profile import graph_profile
from tiny_align.runtime.errors import BundleError
from tiny_align.runtime.files import sha256
from tiny_align.runtime.machine import gpu_compute_capability

REFITTED = ("projector",)  # graphs whose engine takes other weights later: a user's


def build_engines(
    bundle: Bundle,
    *,
    compute_capability: int | None = None,
    graphs: Iterable[str] | None = None,
    ladder: Ladder | None = None,
    force: bool = False,
) -> dict[str, dict]:
    """Build the engines of a bundle, or of a user (`Bundle.for_user`).

    An existing engine that is intact and made from the same graph and profile is not built
    again, unless `graphs` names it or `ladder` requests something else. After a kill the same
    call continues: what was finished is not built again.

    Args:
        compute_capability: the target GPU's, 86 for 8.6; see builder.find_builder for None.
        graphs: names of the graphs to build; None: all without a matching engine.
        ladder: the precision of each graph; None: the bundle's own, where there is no engine yet.
        force: build with too little memory too, and a graph that TensorRT's rules forbid.

    Returns:
        The entry in engine.json of each graph that was requested, the largest first.

    Raises:
        BackendError: no builder, a target or a graph it refuses, too little memory, a build
            that was killed, a folder that cannot be written, another build of the same
            engines, or a precision beyond its bound.
        AudioError: a recording of the ladder that cannot be used.
        BundleError: a graph the bundle does not have, or a damaged manifest.
    """
    names = _graph_names(bundle, graphs)
    builder = find_builder(compute_capability)
    sources = {name: graph_source(bundle, name, ladder) for name in bundle.manifest.graphs}
    names = sorted(names, key=lambda name: -_graph_bytes(bundle, sources[name]))  # largest first
    target = engines_path(bundle, builder.facts)
    with unfinished_folder(target) as folder:
        entries = valid_entries(folder, builder, sources)
        others = {}  # engines that an older build may have; a graph that is named is built again
        for name, source in sources.items():
            if name not in entries and (graphs is None or name not in names):
                others[name] = source
        entries.update(take_over(target, folder, builder, others))
        pending = [name for name in names if name not in entries]
        for name, report in progress_bar(pending):
            graph = bundle.graph(name)
            profile = graph_profile(bundle.manifest.graphs[name], bundle.manifest.dims)
            if not force:
                require_legal(name, graph, profile, builder)
                # TensorRT builds in the GPU's memory; on a Jetson that is the machine's own,
                # and it cannot go to swap.
                swaps = builder.package != "tensorrt"
                require_memory(name, _graph_bytes(bundle, sources[name]), swaps=swaps)
            report(0.0, "choosing a precision")
            selection = select_precision(bundle, name, ladder or Ladder(), folder)
            if selection.graph != graph and not force:
                require_legal(name, selection.graph, profile, builder)
            entries[name] = _build_graph(name, selection, sources[name], builder, folder, report)
            write_record(folder, builder, entries)
        write_record(folder, builder, entries)
        remove_leftovers(folder, entries)
    return {name: entries[name] for name in names}


def _graph_names(bundle: Bundle, graphs: Iterable[str] | None) -> list[str]:
    known = list(bundle.manifest.graphs)
    if graphs is None:
        return known
    names = list(dict.fromkeys(graphs))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        missing = ", ".join(map(repr, unknown)) or "to build"
        raise BundleError(f"{bundle.path} has no graph {missing}: it has {', '.join(known)}")
    return names


def _build_graph(
    name: str,
    selection: Selection,
    source: dict,
    builder: Builder,
    folder: Path,
    report: ReportProgress,
) -> dict:
    """Build the engine of one graph; returns its entry in engine.json."""
    job = make_job(selection.graph, name, builder, folder, source["profile"])
    cost = run_build(name, job, report)
    engine = folder / f"{name}.engine"
    return {
        **source,
        **selection.entry,
        **cost,
        "bytes": engine.stat().st_size,
        "engine_sha256": sha256(engine),
    }


def graph_source(bundle: Bundle, name: str, ladder: Ladder | None = None) -> dict:
    """What an engine of this graph is made from: the fields of its entry in engine.json."""
    graph = bundle.manifest.graphs[name]
    files = {}
    for path in graph_files(bundle.graph(name)):
        files[path.relative_to(bundle.path).as_posix()] = sha256(path)
    profile = {}
    for tensor, shapes in graph_profile(graph, bundle.manifest.dims).items():
        min_shape, opt_shape, max_shape = map(list, shapes)
        profile[tensor] = {"min": min_shape, "opt": opt_shape, "max": max_shape}
    source = {"graph_sha256": files[graph.file], "files": files, "profile": profile}
    if ladder is not None:
        source.update(ladder.record_fields(name, graph.precision))
    return source


def graph_files(path: Path) -> list[Path]:
    """The ONNX file and the files of its external data.

    Raises:
        BundleError: a file that is missing, or is no ONNX graph.
    """
    from google.protobuf.message import DecodeError

    from tiny_align.runtime.bundle.onnx_weights import data_files, load_graph

    try:
        model = load_graph(path)
    except DecodeError as error:
        raise BundleError(
            f"{path} is not an ONNX graph ({error}): export the bundle again"
        ) from error
    files = [path, *(path.parent / name for name in data_files(model))]
    for file in files:
        if not file.is_file():
            raise BundleError(
                f"{file}, a file of the graph {path.name}, is missing: "
                "copy or export the bundle again"
            )
    return files


def _graph_bytes(bundle: Bundle, source: dict) -> int:
    return sum((bundle.path / file).stat().st_size for file in source["files"])


def make_job(graph: Path, name: str, builder: Builder, folder: Path, profile: dict) -> BuildJob:
    """The job of a graph's build process.

    Only TensorRT times kernels while it builds; TensorRT-RTX does that where the engine runs.
    TensorRT-RTX 1.7 makes an engine that can take other weights only if there is a GPU
    (elsewhere it fails with CUDA_SUCCESS).

    Args:
        graph: the ONNX file.
        folder: where the engine and the timing cache are written.
        profile: input -> its "min", "opt" and "max" shape.
    """
    timing_cache = folder / TIMING_CACHE if builder.package == "tensorrt" else None
    return {
        "graph": str(graph.resolve()),
        "engine": str((folder / f"{name}.engine").resolve()),
        "package": builder.package,
        "compute_capability": builder.compute_capability,
        "profile": {tensor: list(shapes.values()) for tensor, shapes in profile.items()},
        "refittable": name in REFITTED and gpu_compute_capability() is not None,
        "timing_cache": str(timing_cache.resolve()) if timing_cache else None,
    }
