"""One build in a process of its own (build_one.py): start it, follow it, explain how it ended."""

import ctypes
import json
import signal
import subprocess
import sys
import tempfile
from typing import TypedDict

from tiny_align.engines.progress import ReportProgress
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import free_memory_line

COMMAND = (sys.executable, "-m", "tiny_align.engines.build_one")
REFUSED = 2  # exit status: the builder does not accept the graph
UNWRITTEN = 3  # exit status: the engine cannot be written
PR_SET_PDEATHSIG = 1  # Linux's <sys/prctl.h>


class BuildJob(TypedDict):
    """What the process reads from stdin, as JSON."""

    graph: str  # path of the ONNX file
    engine: str  # path to write
    package: str  # "tensorrt" or "tensorrt_rtx"
    compute_capability: int
    profile: dict[str, list[list[int]]]  # input -> its min, opt and max shape
    refittable: bool  # whether the engine can take other weights later
    timing_cache: str | None  # path of the file to read and to write


def run_build(name: str, job: BuildJob, report: ReportProgress) -> dict:
    """Run one build to its end and return its result, see build_one.build.

    Args:
        name: the graph's, for messages.
        report: called now and then with the progress.

    Raises:
        BackendError: the builder refused the graph, the engine cannot be written, a crash, or
            lack of memory.
    """
    memory = free_memory_line()
    result: dict = {}
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps(job).encode())  # no pipe: a process that dies at once would break it
        stdin.seek(0)
        with subprocess.Popen(
            COMMAND,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            errors="replace",
        ) as process:
            try:
                for line in process.stdout or ():
                    result = _read_line(line, report) or result
            except BaseException:
                process.kill()
                raise
            status = process.wait()
        stderr.seek(0)
        output = stderr.read().decode(errors="replace").strip()
    if status != 0:
        graph = f"the graph {name!r} ({job['graph']})"
        raise BackendError(_explain(graph, job["package"], status, output, memory))
    return result


def _read_line(line: str, report: ReportProgress) -> dict:
    """Handle a line of the process: report progress, return a result, ignore what is not JSON."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(value, dict):
        return {}
    if "progress" in value:
        report(value["progress"], value["phase"])
        return {}
    return value


def _explain(graph: str, package: str, status: int, output: str, memory: str) -> str:
    """Why a build failed and what to do.

    Args:
        status: exit status of the process, negative for a signal.
        output: what it wrote to stderr.
        memory: the free memory before it started.
    """
    if status == REFUSED:
        return (
            f"{package} does not build {graph}:\n{output}\n"
            "Export the graph with operators that this builder accepts"
        )
    if status == UNWRITTEN:
        return f"{output}. Then run the same command again: finished engines are not built again"
    if status == -signal.SIGKILL:
        return (
            f"the build of {graph} was killed, most likely because memory ran out "
            f"(before it: {memory}): close other programs, build this graph alone with --graph, "
            "or restart the machine and build first"
        )
    return (
        f"{package} crashed on {graph} (exit status {status}, memory before: {memory}):\n{output}"
    )


def die_with_parent() -> None:
    """Make this process end when the one that started it ends, in whatever way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
