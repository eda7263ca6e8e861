"""A bundle's graphs -> engines in bundle/engines/<key>/, for one builder version and one kind of GPU.

Each graph is built in a fresh process (build_one.py), the largest first, while memory is least broken up. The folder
appears when the last engine is done, or not at all. It does not load engines: runtime does. engine.json:

    package, version, compute_capability    of the builder, see builder.py; together they are the key
    jetpack                                 the L4T release it ran on, null off a Jetson
    graphs: name ->
        precision                           as in the manifest
        bytes, engine_sha256                of <name>.engine
        seconds, peak_memory_bytes          of parsing and building; host memory of the build process
        graph_sha256                        of the ONNX file
        files                               the ONNX file and its external data -> SHA-256, as in the manifest
        profile                             input -> its "min", "opt" and "max" shape

An engine is stale where `files` differs from the manifest: weights in external data leave the ONNX file unchanged.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tiny_align.engines.build_one import REFUSED
from tiny_align.engines.builder import Builder, find_builder
from tiny_align.runtime.bundle import Bundle
from tiny_align.runtime.engines import RECORD, engines_path
from tiny_align.runtime.errors import BackendError, BundleError
from tiny_align.runtime.files import sha256, write_json, written_folder
from tiny_align.runtime.machine import free_memory_line
from tiny_align.runtime.profile import graph_profile

COMMAND = (sys.executable, "-m", "tiny_align.engines.build_one")


def build_engines(
    bundle: Bundle, *, compute_capability: int | None = None, graphs: Iterable[str] | None = None
) -> dict[str, dict]:
    """Build the engines of a bundle for this machine or, with TensorRT-RTX, for a given kind of GPU.

    Engines that an earlier build left for other graphs stay, as long as their graph and profile are still the same.

    Args:
        compute_capability: the target GPU's, 86 for 8.6; see builder.find_builder for None.
        graphs: names of the graphs to build; None: all.

    Returns:
        The entry in engine.json of each graph built, the largest first.

    Raises:
        BackendError: no builder, a target or a graph it refuses, a build that was killed, or a folder not writable.
        BundleError: a graph the bundle does not have, or a damaged manifest.
    """
    names = _checked(bundle, graphs)
    builder = find_builder(compute_capability)
    sources = {name: _source(bundle, name) for name in bundle.manifest.graphs}
    target = engines_path(bundle, builder.facts)
    with _written_engines(target) as folder:
        kept = _keep(target, folder, {name: s for name, s in sources.items() if name not in names})
        built = _build_all(bundle, names, builder, folder, sources)
        write_json(folder / RECORD, {**builder.facts, "graphs": {**kept, **built}})
    return built


def _checked(bundle: Bundle, graphs: Iterable[str] | None) -> list[str]:
    known = list(bundle.manifest.graphs)
    names = known if graphs is None else list(dict.fromkeys(graphs))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise BundleError(
            f"{bundle.path} has no graph {', '.join(map(repr, unknown)) or 'to build'}: it has {', '.join(known)}"
        )
    return names


def _source(bundle: Bundle, name: str) -> dict:
    """What an engine of this graph is made from, as engine.json has it."""
    graph = bundle.manifest.graphs[name]
    files = {p.relative_to(bundle.path).as_posix(): sha256(p) for p in graph_files(bundle.graph(name))}
    profile = {
        tensor: {"min": list(least), "opt": list(usual), "max": list(greatest)}
        for tensor, (least, usual, greatest) in graph_profile(graph, bundle.manifest.dims).items()
    }
    return {"precision": graph.precision, "graph_sha256": files[graph.file], "files": files, "profile": profile}


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
        raise BundleError(f"{path} is not an ONNX graph ({error}): export the bundle again") from error
    entries = (e for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL for e in t.external_data)
    files = [path, *(path.parent / name for name in sorted({e.value for e in entries if e.key == "location"}))]
    for file in files:
        if not file.is_file():
            raise BundleError(f"{file}, a file of the graph {path.name}, is missing: copy or export the bundle again")
    return files


@contextlib.contextmanager
def _written_engines(target: Path):
    """written_folder that leaves no empty engines/ behind and says where writing failed."""
    try:
        with written_folder(target) as folder:
            yield folder
    except OSError as error:
        raise BackendError(
            f"cannot write engines to {target} ({error}): make room, or copy the bundle to a folder you may write"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # refused unless empty


def _keep(old: Path, folder: Path, sources: dict[str, dict]) -> dict[str, dict]:
    """Copy from an earlier build the engines that still belong to these graphs; returns their entries."""
    if not sources or not (old / RECORD).is_file():
        return {}
    entries = _entries(old / RECORD)
    kept = {
        name: entries[name] for name in sources if _fresh(entries.get(name, {}), old / f"{name}.engine", sources[name])
    }
    for name in kept:
        shutil.copy2(old / f"{name}.engine", folder)
    return kept


def _entries(record: Path) -> dict[str, dict]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))["graphs"]
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{record} is damaged ({error}): remove {record.parent} and build all graphs") from error


def _fresh(entry: dict, engine: Path, source: dict) -> bool:
    """Whether the engine is whole and was made from this very graph."""
    return source.items() <= entry.items() and engine.is_file() and sha256(engine) == entry["engine_sha256"]


def _build_all(bundle: Bundle, names: list[str], builder: Builder, folder: Path, sources: dict) -> dict[str, dict]:
    from tqdm import tqdm

    built = {}
    with tqdm(_largest_first(bundle, names, sources), desc="engines", unit="engine", file=sys.stderr) as progress:
        for name in progress:
            progress.set_postfix_str(name)
            engine = folder / f"{name}.engine"
            cost = _run(name, _job(bundle.graph(name), engine, builder, sources[name]["profile"]))
            built[name] = {**_engine_entry(engine), **cost, **sources[name]}
    return built


def _largest_first(bundle: Bundle, names: list[str], sources: dict) -> list[str]:
    size = {name: sum((bundle.path / f).stat().st_size for f in sources[name]["files"]) for name in names}
    return sorted(names, key=lambda name: -size[name])


def _job(graph: Path, engine: Path, builder: Builder, profile: dict) -> dict:
    """What build_one reads."""
    return {
        "graph": str(graph.resolve()),
        "engine": str(engine.resolve()),
        "package": builder.package,
        "compute_capability": builder.compute_capability,
        "profile": {name: list(shapes.values()) for name, shapes in profile.items()},
    }


def _engine_entry(engine: Path) -> dict:
    return {"bytes": engine.stat().st_size, "engine_sha256": sha256(engine)}


def _run(name: str, job: dict) -> dict:
    """Run one build to its end in a process of its own."""
    memory = free_memory_line()
    done = subprocess.run(
        COMMAND, input=json.dumps(job), capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode != 0:
        raise BackendError(_failure(f"the graph {name!r} ({job['graph']})", job["package"], done, memory))
    return json.loads(done.stdout.splitlines()[-1])


def _failure(graph: str, package: str, done: subprocess.CompletedProcess, memory: str) -> str:
    words = done.stderr.strip()
    if done.returncode == REFUSED:
        return f"{package} does not build {graph}:\n{words}\nExport the graph with what this builder takes"
    if done.returncode == -signal.SIGKILL:
        return (
            f"the build of {graph} was killed, most likely because memory ran out (before it: {memory}): close other "
            "programs, build this graph alone with --graph, or restart the machine and build first"
        )
    return f"{package} crashed on {graph} (exit status {done.returncode}, memory before: {memory}):\n{words}"
