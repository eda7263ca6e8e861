"""One build in a process of its own, watched from here: its progress, its result, and what it died of."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

from tiny_align.engines.build_one import REFUSED, UNWRITTEN
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import free_memory_line

COMMAND = (sys.executable, "-m", "tiny_align.engines.build_one")


def run_build(name: str, job: dict, tell: Callable[[float, str], None]) -> dict:
    """Run one build to its end and return its result.

    Args:
        name: the graph's, for messages.
        job: what build_one reads.
        tell: given the fraction done and the builder's phase, now and then.

    Raises:
        BackendError: a graph the builder refuses, an engine that cannot be written, a crash, or lack of memory.
    """
    memory, result = free_memory_line(), {}
    with tempfile.TemporaryFile() as words, _started(job, words) as process:
        try:
            for line in process.stdout:
                result = _heard(line, tell) or result
        except BaseException:
            process.kill()
            raise
        status = process.wait()
        words.seek(0)
        said = words.read().decode(errors="replace").strip()
    if status != 0:
        raise BackendError(
            _failure(f"the graph {name!r} ({job['graph']})", job["package"], status, said, memory)
        )
    return result


def _started(job: dict, words) -> subprocess.Popen:
    with tempfile.TemporaryFile() as task:  # no pipe: a process that dies at once would break it
        task.write(json.dumps(job).encode())
        task.seek(0)
        return subprocess.Popen(
            COMMAND,
            stdin=task,
            stdout=subprocess.PIPE,
            stderr=words,
            encoding="utf-8",
            errors="replace",
        )


def _heard(line: str, tell: Callable[[float, str], None]) -> dict:
    """A line of the process: progress is told on, anything but JSON is chatter; returns a result."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    if isinstance(value, dict) and "progress" in value:
        tell(value["progress"], value["phase"])
        return {}
    return value if isinstance(value, dict) else {}


def _failure(graph: str, package: str, status: int, words: str, memory: str) -> str:
    if status == REFUSED:
        return f"{package} does not build {graph}:\n{words}\nExport the graph with what this builder takes"
    if status == UNWRITTEN:
        return f"{words}. Then start the same command again: what was built stays"
    if status == -signal.SIGKILL:
        return (
            f"the build of {graph} was killed, most likely because memory ran out (before it: {memory}): close other "
            "programs, build this graph alone with --graph, or restart the machine and build first"
        )
    return f"{package} crashed on {graph} (exit status {status}, memory before: {memory}):\n{words}"
