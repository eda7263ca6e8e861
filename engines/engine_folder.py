"""The folder that a build fills: engines/.<key>.partial.

It becomes engines/<key> when the last engine is done. One build at a time works in it. A killed
build leaves its finished engines there and the next one continues from them: engine.json is
written after each engine. Its entries are described in build.py.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tiny_align.engines.builder import Builder
from tiny_align.runtime.bundle.engines import RECORD
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.files import link_file, replace_folder, sha256, write_json
from tiny_align.runtime.machine import describe, gpu

TIMING_CACHE = "timing.cache"


@contextlib.contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """Yield the hidden folder for `target`, with the engines that a killed build has left there.

    On success it becomes `target`. After a failure it stays only if it holds an engine.

    Raises:
        BackendError: another build is using it, or it cannot be written.
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
    except BrokenPipeError:  # the reader of our progress has gone
        raise
    except OSError as error:
        raise BackendError(
            f"cannot write engines to {target} ({error}): make room, or copy the bundle to a "
            "folder that you can write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            target.parent.rmdir()  # refused unless empty


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other builds out of a folder.

    The system unlocks it when this process ends, in whatever way.
    """
    import fcntl  # on Unix only, as the memory figures of the build processes

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


def valid_entries(folder: Path, builder: Builder, sources: dict[str, dict]) -> dict[str, dict]:
    """The entries of the engines in a folder that are intact, and as this builder would make them.

    Args:
        sources: graph -> the fields that its entry must have.

    Returns:
        None of them if there is no record or a damaged one: then nothing is known of the engines.
    """
    entries = {}
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if builder.facts.items() <= record.items():
            for name, entry in record["graphs"].items():
                engine = folder / f"{name}.engine"
                if (
                    name in sources
                    and sources[name].items() <= entry.items()
                    and engine.is_file()
                    and sha256(engine) == entry["engine_sha256"]
                ):
                    entries[name] = entry
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return entries


def take_over(
    old: Path, folder: Path, builder: Builder, sources: dict[str, dict]
) -> dict[str, dict]:
    """Link valid engines of an older build, and copy its timing cache, into the folder.

    Args:
        sources: the graphs whose engines may be taken over, as for `valid_entries`.

    Returns:
        The entries of the engines that were taken over.
    """
    entries = valid_entries(old, builder, sources)
    for name in entries:
        (folder / f"{name}.engine").unlink(missing_ok=True)
        link_file(old / f"{name}.engine", folder / f"{name}.engine")
    if (old / TIMING_CACHE).is_file() and not (folder / TIMING_CACHE).is_file():
        shutil.copyfile(old / TIMING_CACHE, folder / TIMING_CACHE)
    return entries


def write_record(folder: Path, builder: Builder, entries: dict[str, dict]) -> None:
    """Write engine.json."""
    machine = {**describe(), **gpu()}
    write_json(folder / RECORD, {**builder.facts, "machine": machine, "graphs": entries})


def remove_leftovers(folder: Path, entries: dict[str, dict]) -> None:
    """Remove what killed builds have left beside the engines."""
    expected = {RECORD, TIMING_CACHE, *(f"{name}.engine" for name in entries)}
    for path in folder.iterdir():
        if path.name not in expected:
            path.unlink()
