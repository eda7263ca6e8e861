"""Engines on disk: the file that belongs to a graph on this machine, or why it is refused.

An engine is code for one version of TensorRT on one GPU, and TensorRT says little if it does not
fit. So everything is compared here, before it is deserialised, with what the builder wrote beside
it (engine.json, described in engines/build.py). Neither TensorRT nor a GPU is needed, and nothing
is ever built here.
"""

import importlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import MANIFEST
from tiny_align.runtime.bundle.profile import Shape, graph_profile
from tiny_align.runtime.bundle.users import USER_RECORD
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.files import sha256
from tiny_align.runtime.machine import gpu_compute_capability, l4t_release

PACKAGES = ("tensorrt", "tensorrt_rtx")  # TensorRT's names in Python, in order of preference
RECORD = "engine.json"
FACTS = {  # what an engine is bound to -> what messages call it
    "package": "package",
    "version": "version",
    "compute_capability": "compute capability",
    "jetpack": "JetPack (L4T release)",
}


def import_tensorrt(package: str, part: str) -> ModuleType | None:
    """The module of that name; None if it is not installed.

    Args:
        part: a name in it, which a mere folder of the package's name lacks.

    Raises:
        BackendError: it is installed and cannot be imported.
    """
    try:
        module = importlib.import_module(package)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return None
        raise BackendError(
            f"{package} is installed but cannot be imported ({error}): repair or remove it"
        ) from error
    return module if hasattr(module, part) else None


def machine_facts(package: str, version: str) -> dict:
    """What `check_engine` compares, for a package that is imported on this machine.

    Args:
        package: "tensorrt" or "tensorrt_rtx".
        version: its `__version__`.

    Returns:
        "package", "version", "compute_capability" (87 for 8.7; None without a GPU) and "jetpack"
        (the L4T release, "36.4.3"; None off a Jetson).
    """
    return {
        "package": package,
        "version": version,
        "compute_capability": gpu_compute_capability(),
        "jetpack": l4t_release(),
    }


def engines_key(facts: dict) -> str:
    """Name of the folder under engines/ for what one builder makes for one kind of GPU."""
    return f"{facts['package']}-{facts['version']}-sm{facts['compute_capability']}"


def engines_path(bundle: Bundle, facts: dict) -> Path:
    """Where the engines of the bundle for these facts belong."""
    return bundle.path / "engines" / engines_key(facts)


def check_engine(bundle: Bundle, graph: str, facts: dict) -> Path:
    """The engine of a graph, after checking that it is whole and made for this machine and bundle.

    Every byte of it is read once, for its hash; the bundle's own files were hashed by Bundle.open.

    Args:
        bundle: the bundle, or a user's folder as one (`Bundle.for_user`).
        graph: its name in the manifest, "encoder", "projector" or "llm".
        facts: as machine_facts returns them.

    Raises:
        BackendError: an engine that is absent, damaged, made for something else, or too small for
            the manifest's dims; it ends with the command that builds it.
        BundleError: a graph that the bundle does not have.
    """
    bundle.graph(graph)
    engine = engines_path(bundle, facts) / f"{graph}.engine"
    try:
        fault = next(_faults(bundle, graph, facts, engine), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fault = f"{engine.with_name(RECORD)} is damaged ({type(error).__name__}: {error})"
    if fault:
        raise BackendError(f"{fault}: run `{build_command(bundle)}`")
    return engine


def build_command(bundle: Bundle) -> str:
    """The command that builds all engines that are absent or do not fit: a bundle's or a user's."""
    command = ["tiny-align", "build-engines", "--bundle"]
    if not (bundle.path / USER_RECORD).is_file():
        return shlex.join([*command, str(bundle.path)])
    users = bundle.path.parent
    if users.name == "users" and (users.parent / MANIFEST).is_file():
        command.append(str(users.parent))
    else:
        command += ["BUNDLE", "--users", str(users)]
    return shlex.join([*command, "--user", bundle.path.name])


def _faults(bundle: Bundle, graph: str, facts: dict, engine: Path) -> Iterator[str]:
    """Why the engine is refused, the simplest reason first; a check relies on those before it."""
    if not engine.parent.is_dir():
        records = bundle.path.glob(f"engines/[!.]*/{RECORD}")
        found = ", ".join(sorted(record.parent.name for record in records)) or "none"
        yield f"{bundle.path} has no engines for {engines_key(facts)} (found: {found})"
    if not engine.with_name(RECORD).is_file():
        yield f"{engine.parent} has no {RECORD}: it is unknown what its engines were made from"
    record = json.loads(engine.with_name(RECORD).read_text(encoding="utf-8"))
    for fact, name in FACTS.items():
        if record[fact] != facts[fact]:
            yield (
                f"the engines in {engine.parent} were built for {name} {record[fact] or 'none'}, "
                f"this machine has {facts[fact] or 'none'}"
            )
    if graph not in record["graphs"] or not engine.is_file():
        yield f"{engine.parent} has no engine of the graph {graph!r}"
    yield from _entry_faults(bundle, graph, record["graphs"][graph], engine)


def _entry_faults(bundle: Bundle, graph: str, entry: dict, engine: Path) -> Iterator[str]:
    """What speaks against one engine, by its entry in engine.json."""
    manifest = bundle.manifest
    spec = manifest.graphs[graph]
    sources = {spec.file: entry["graph_sha256"], **entry["files"]}
    for file, digest in sources.items():
        if manifest.files.get(file) != digest:
            yield f"{engine} was built from another {file} than this bundle's"
    for name, needed in graph_profile(spec, manifest.dims).items():
        built = entry["profile"][name]
        if not _covers(built, needed.min, needed.max):
            yield (
                f"{engine} takes {name} from {built['min']} to {built['max']}, "
                f"this bundle needs {list(needed.min)} to {list(needed.max)}"
            )
    size = engine.stat().st_size
    if size != entry["bytes"]:
        yield f"{engine} has {size} bytes, not the {entry['bytes']} that were built"
    if sha256(engine) != entry["engine_sha256"]:
        yield f"{engine} has changed since it was built"


def _covers(built: dict, min_: Shape, max_: Shape) -> bool:
    """Whether the shapes of an engine's profile enclose the ones needed."""
    return (
        len(built["min"]) == len(built["max"]) == len(min_)
        and all(size <= needed for size, needed in zip(built["min"], min_))
        and all(size >= needed for size, needed in zip(built["max"], max_))
    )
