"""A bundle's graphs -> engines in bundle/engines/<key>/, for one builder version and one kind of GPU.

Each graph is built in a fresh process (process.py), the largest first, while memory is least broken up. Engines gather
in the hidden folder engines/.<key>.partial, from which a killed build goes on; it takes its name when the last one is
done. Nothing is loaded here: runtime does, and checks engine.json first (runtime/bundle/engines.py):

    package, version, compute_capability    of the builder, see builder.py; together they are the key
    jetpack                                 the L4T release it ran on, null off a Jetson
    machine                                 what it ran on: system, GPU, CUDA
    graphs: name ->
        precision                           as in the manifest, or the rung's that was chosen; "int4/fp16": weights in
                                            INT4, computed in FP16
        asked, accuracy                     of a ladder (ladder.py): what it was asked, and of each rung tried its least
                                            cosine to the bundle's own graph and its bound
        built_sha256                        of the ONNX file that was built: a rung's, or the bundle's
        bytes, engine_sha256                of <name>.engine
        seconds, peak_memory_bytes          of parsing, building and writing; host memory of the build process
        flags, optimization_level           of the builder
        graph_sha256                        of the ONNX file
        files                               the ONNX file and its external data -> SHA-256, as in the manifest
        profile                             input -> its "min", "opt" and "max" shape

An engine is stale where `files` differs from the manifest: weights in external data leave the ONNX file unchanged. It
is built from the manifest's plain graph, in the precision that the graph has, or from what a ladder's rung made of it.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from tiny_align.engines.builder import Builder, find_builder
from tiny_align.engines.ladder import Ladder
from tiny_align.engines.preflight import require_memory
from tiny_align.engines.process import run_build
from tiny_align.engines.select_precision import select_precision
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.engines import RECORD, engines_path
from tiny_align.runtime.bundle.profile import graph_profile
from tiny_align.runtime.errors import BackendError, BundleError
from tiny_align.runtime.files import link_file, replace_folder, sha256, write_json
from tiny_align.runtime.machine import describe, gpu, gpu_compute_capability

TIMING_CACHE = "timing.cache"
REFITTED = ("projector",)  # graphs whose engine takes other weights later: a person's
SHOWN = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


def build_engines(
    bundle: Bundle,
    *,
    compute_capability: int | None = None,
    graphs: Iterable[str] | None = None,
    ladder: Ladder | None = None,
    force: bool = False,
) -> dict[str, dict]:
    """Build a bundle's engines, or a person's (`Bundle.person`), for this machine or, with TensorRT-RTX, another GPU.

    An engine that is there, whole and made from the same graph and profile stays as it is, unless `graphs` names it or
    `ladder` asks for something else.
    After a kill the same call goes on: what it had finished is not built again.

    Args:
        compute_capability: the target GPU's, 86 for 8.6; see builder.find_builder for None.
        graphs: names of the graphs to build; None: all that lack an engine that fits.
        ladder: which precision each graph is built in; None: the bundle's own, where there is no engine yet.
        force: build even where memory seems not to do.

    Returns:
        The entry in engine.json of each graph that was asked for, the largest first.

    Raises:
        BackendError: no builder, a target or a graph it refuses, too little memory, a build that was killed, a folder
            not writable, another build of the same engines under way, or a precision beyond its bound.
        AudioError: a recording of the ladder that cannot be used.
        BundleError: a graph the bundle does not have, or a damaged manifest.
    """
    names = _checked(bundle, graphs)
    builder = find_builder(compute_capability)
    sources = {name: _source(bundle, name, ladder) for name in bundle.manifest.graphs}
    target = engines_path(bundle, builder.facts)
    with _unfinished(target) as folder:
        done = _whole(folder, builder, sources)
        kept = _whole(
            target, builder, {n: s for n, s in sources.items() if graphs is None or n not in names}
        )
        done |= _take_over(
            target, folder, {name: entry for name, entry in kept.items() if name not in done}
        )
        wanted = _largest_first(bundle, names, sources)
        for name, tell in _progress([n for n in wanted if n not in done]):
            if not force:
                _require_memory(name, _graph_bytes(bundle, sources[name]), builder)
            tell(0.0, "choosing a precision")
            selection = select_precision(bundle, name, ladder or Ladder(), folder)
            cost = run_build(
                name, _job(selection.graph, name, builder, folder, sources[name]), tell
            )
            done[name] = {
                **sources[name],
                **selection.entry,
                **cost,
                **_engine_entry(folder / f"{name}.engine"),
            }
            _write_record(folder, builder, done)
        _finish(folder, builder, done)
    return {name: done[name] for name in wanted}


def _checked(bundle: Bundle, graphs: Iterable[str] | None) -> list[str]:
    known = list(bundle.manifest.graphs)
    names = known if graphs is None else list(dict.fromkeys(graphs))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise BundleError(
            f"{bundle.path} has no graph {', '.join(map(repr, unknown)) or 'to build'}: it has {', '.join(known)}"
        )
    return names


def _source(bundle: Bundle, name: str, ladder: Ladder | None = None) -> dict:
    """What an engine of this graph is made from, as engine.json has it."""
    graph = bundle.manifest.graphs[name]
    files = {
        p.relative_to(bundle.path).as_posix(): sha256(p) for p in graph_files(bundle.graph(name))
    }
    profile = {
        tensor: {"min": list(least), "opt": list(usual), "max": list(greatest)}
        for tensor, (least, usual, greatest) in graph_profile(graph, bundle.manifest.dims).items()
    }
    wanted = ladder.record_fields(name, graph.precision) if ladder else {}
    return {"graph_sha256": files[graph.file], "files": files, "profile": profile, **wanted}


def graph_files(path: Path) -> list[Path]:
    """The ONNX file and the files its initialisers lie in.

    Raises:
        BundleError: a file that is not there, or is no ONNX graph.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        tensors = onnx.load(path, load_external_data=False).graph.initializer
    except DecodeError as error:
        raise BundleError(
            f"{path} is not an ONNX graph ({error}): export the bundle again"
        ) from error
    entries = (
        e for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL for e in t.external_data
    )
    files = [
        path,
        *(path.parent / name for name in sorted({e.value for e in entries if e.key == "location"})),
    ]
    for file in files:
        if not file.is_file():
            raise BundleError(
                f"{file}, a file of the graph {path.name}, is missing: copy or export the bundle again"
            )
    return files


@contextlib.contextmanager
def _unfinished(target: Path):
    """Yields the hidden folder in which `target` is made, with what a killed build has left there.

    On success it becomes `target`. After a failure it stays only if it holds an engine.
    """
    folder = target.with_name(f".{target.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            try:
                yield folder
                replace_folder(folder, target)
            finally:
                if not (folder / RECORD).is_file():
                    shutil.rmtree(folder, ignore_errors=True)
    except BrokenPipeError:  # who read the progress has left
        raise
    except OSError as error:
        raise BackendError(
            f"cannot write engines to {target} ({error}): make room, or copy the bundle to a folder you may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # refused unless empty


@contextlib.contextmanager
def _locked(folder: Path):
    """Nobody else builds in this folder meanwhile; the system unlocks it when this process ends, however it ends."""
    import fcntl  # Unix's, as the builders' memory figures are

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BackendError(
            f"another build is at work in {folder}: wait for it, or end it"
        ) from error
    finally:
        os.close(handle)


def _whole(folder: Path, builder: Builder, sources: dict[str, dict]) -> dict[str, dict]:
    """The entries of a folder's engines that are whole, and made by this builder here from these very graphs."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if builder.facts.items() <= record.items():
            return {
                n: e
                for n, e in record["graphs"].items()
                if n in sources and _fresh(e, folder, n, sources[n])
            }
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no record, or a damaged one: nobody knows what the engines are
    return {}


def _fresh(entry: dict, folder: Path, name: str, source: dict) -> bool:
    engine = folder / f"{name}.engine"
    return (
        source.items() <= entry.items()
        and engine.is_file()
        and sha256(engine) == entry["engine_sha256"]
    )


def _take_over(old: Path, folder: Path, kept: dict[str, dict]) -> dict[str, dict]:
    """Put engines that stay, and what the builder timed, into the new folder; returns their entries."""
    for name in kept:
        (folder / f"{name}.engine").unlink(missing_ok=True)
        link_file(old / f"{name}.engine", folder / f"{name}.engine")
    if (old / TIMING_CACHE).is_file() and not (folder / TIMING_CACHE).is_file():
        shutil.copyfile(old / TIMING_CACHE, folder / TIMING_CACHE)
    return kept


def _largest_first(bundle: Bundle, names: list[str], sources: dict) -> list[str]:
    return sorted(names, key=lambda name: -_graph_bytes(bundle, sources[name]))


def _graph_bytes(bundle: Bundle, source: dict) -> int:
    return sum((bundle.path / file).stat().st_size for file in source["files"])


def _progress(names: list[str]):
    """Yields each name with the function that shows its build's progress, under one bar on stderr."""
    from tqdm import tqdm

    with tqdm(
        total=len(names), desc="engines", file=sys.stderr, bar_format=SHOWN, disable=not names
    ) as bar:
        for number, name in enumerate(names):
            yield name, functools.partial(_show, bar, name, number)
            bar.update(number + 1 - bar.n)


def _show(bar, name: str, number: int, fraction: float, phase: str) -> None:
    bar.set_postfix_str(f"{name}: {phase}", refresh=False)
    bar.update(number + fraction - bar.n)


def _require_memory(name: str, graph_bytes: int, builder: Builder) -> None:
    """TensorRT builds in the GPU's memory, which on a Jetson is the machine's and cannot go to swap."""
    require_memory(name, graph_bytes, swaps=builder.package != "tensorrt")


def _job(graph: Path, name: str, builder: Builder, folder: Path, source: dict) -> dict:
    """What build_one reads.

    Only TensorRT times kernels while it builds; TensorRT-RTX does so where it runs. And TensorRT-RTX 1.7 makes an
    engine that takes other weights only where there is a GPU (CUDA_SUCCESS failed, it says elsewhere).
    """
    return {
        "graph": str(graph.resolve()),
        "engine": str((folder / f"{name}.engine").resolve()),
        "package": builder.package,
        "compute_capability": builder.compute_capability,
        "profile": {tensor: list(shapes.values()) for tensor, shapes in source["profile"].items()},
        "refittable": name in REFITTED and gpu_compute_capability() is not None,
        "timing_cache": str((folder / TIMING_CACHE).resolve())
        if builder.package == "tensorrt"
        else None,
    }


def _engine_entry(engine: Path) -> dict:
    return {"bytes": engine.stat().st_size, "engine_sha256": sha256(engine)}


def _write_record(folder: Path, builder: Builder, done: dict[str, dict]) -> None:
    write_json(
        folder / RECORD, {**builder.facts, "machine": {**describe(), **gpu()}, "graphs": done}
    )


def _finish(folder: Path, builder: Builder, done: dict[str, dict]) -> None:
    """Make the folder fit to be published: the record, and nothing that killed builds have left."""
    _write_record(folder, builder, done)
    known = {RECORD, TIMING_CACHE, *(f"{name}.engine" for name in done)}
    for path in folder.iterdir():
        if path.name not in known:
            path.unlink()
