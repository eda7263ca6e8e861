"""`tiny-align doctor --prove-private`: answer a recording in a sealed process, then try to get out.

`prove` starts this module in a process of its own, with an empty HOME. There `tiny-align run
--sealed` answers a recording; then we try every way out ourselves (`try_ways_out`). strace, which
needs no root, counts what the libraries attempted until then. Without strace nothing is counted,
and the result says so.
"""

import errno
import json
import os
import re
import shutil
import site
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.privacy.sealing import WRITING

REFUSALS = ("EPERM", "EACCES")  # seccomp's and Landlock's
STRACE = ("strace", "-f", "-qq", "-e", "trace=%network,%file")
ANSWERED = "/tiny-align has answered"  # no such file: looking it up marks the trace
COVERED = "all threads from the start of the process to the end of the answer, by strace"
UNKNOWN = "not known: strace is not installed or may not trace here"
WRITTEN_BY_ALL = ("/dev/null", "/dev/tty", "/dev/snd", "/dev/dri", "/dev/nv", "/proc/self")

Errors = dict[str, str | None]  # way out -> name of the error it met; None: it was open


def prove(bundle: Path, audio: Path) -> dict[str, Any]:
    """Answer `audio` in a sealed process.

    Returns:
        text, heard, sealed: as in the document of `tiny-align run`.
        denied: way out -> name of the error it met; None if it was open.
        attempted: kind -> number of attempts until the end of the answer; None without strace.
        covered: what was counted.
        proved: False if a way out was open or anything was attempted; None without strace.
    Raises:
        TinyAlignError: the process refused; its own message.
    """
    with_strace = strace_works()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        trace = Path(folder, "trace")
        home.mkdir()
        command = [*STRACE, "-o", str(trace)] if with_strace else []
        command += [sys.executable, "-m", __name__, str(bundle.resolve()), str(audio.resolve())]
        done = subprocess.run(command, env=_environment(home), capture_output=True, text=True)
        if done.returncode:
            last_line = done.stderr.strip().rpartition("\n")[2]
            message = last_line.removeprefix("tiny-align: ")
            raise TinyAlignError(message or f"exit status {done.returncode}")
        attempted = None
        if with_strace:
            attempted = count_attempts(trace.read_text(errors="replace").splitlines())
    answer_line, denied_line = done.stdout.splitlines()[-2:]
    answer = json.loads(answer_line)
    denied = json.loads(denied_line)
    return {
        "text": answer["text"],
        "heard": answer["heard"],
        "sealed": answer["sealed"],
        "denied": denied,
        "attempted": attempted,
        "covered": COVERED if with_strace else UNKNOWN,
        "proved": _verdict(denied, attempted),
    }


def _verdict(denied: Errors, attempted: dict[str, int] | None) -> bool | None:
    if any(error not in REFUSALS for error in denied.values()):
        return False
    if attempted is None:
        return None
    return not any(attempted.values())


def strace_works() -> bool:
    """Whether strace is installed and may trace a process of ours."""
    if not shutil.which("strace"):
        return False
    command = [*STRACE, "-o", os.devnull, sys.executable, "-S", "-c", ""]
    return subprocess.run(command, capture_output=True).returncode == 0


def _environment(home: Path) -> dict[str, str]:
    """Our environment with another HOME, and without Python's own caches, which are not counted."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    ours["HOME"] = str(home)
    ours["PYTHONUSERBASE"] = site.getuserbase()  # packages installed below the user's own HOME
    ours["PYTHONDONTWRITEBYTECODE"] = "1"
    return ours


# --- strace's output ---


def count_attempts(trace: list[str]) -> dict[str, int]:
    """Kind -> number of attempts in the lines of strace, up to the mark."""
    counts = {"network": 0, "programs": -1, "writing": 0}  # the process itself is a program
    for line in trace:
        if ANSWERED in line:
            break
        counts["network"] += is_network(line)
        counts["programs"] += bool(re.match(r"\d+ +execve(at)?\(", line))
        counts["writing"] += _is_writing(line)
    return counts


def is_network(line: str) -> bool:
    """Whether a line of strace reaches for more than this machine's own sockets, or for DNS."""
    elsewhere = re.search(r"\bsocket\((?!AF_UNIX|AF_LOCAL)|\bsa_family=AF_INET", line)
    return bool(elsewhere) or '"/etc/resolv.conf"' in line  # which a look-up reads first


def _is_writing(line: str) -> bool:
    """Whether a line of strace opens a file for writing, or creates, moves or removes one."""
    call = re.match(r"\d+ +(\w+)\(", line)
    if call is None or any(f'"{path}' in line for path in WRITTEN_BY_ALL):
        return False
    if call[1] in ("open", "openat"):
        return bool(re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC)", line))
    return call[1] in WRITING.split()


# --- in the sealed process ---


def main(bundle: str, audio: str) -> int:
    from tiny_align.runtime.commands.cli import main as tiny_align

    status = tiny_align(["run", audio, "--bundle", bundle, "--sealed", "--json"])
    if status == 0:
        Path(ANSWERED).exists()
        print(json.dumps(try_ways_out()))
    return status


def try_ways_out() -> Errors:
    """Try each way out in this thread and in a new one; None if either got out."""
    results = [_errors_here()]
    thread = threading.Thread(target=lambda: results.append(_errors_here()))
    thread.start()
    thread.join()
    here, in_thread = results
    return {way: here[way] and in_thread[way] for way in WAYS_OUT}


def _errors_here() -> Errors:
    errors: Errors = {}
    for way, attempt in WAYS_OUT.items():
        try:
            attempt()
            errors[way] = None
        except OSError as error:
            errors[way] = errno.errorcode.get(error.errno or 0, str(error))
    return errors


def _ask_dns() -> None:
    """Send a question by hand: the system's resolver does not say why it finds nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as question:
        question.sendto(bytes(12), ("127.0.0.1", 53))


def _start_program() -> None:
    os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {}), 0)


WAYS_OUT: dict[str, Callable[[], object]] = {
    "IPv4": lambda: socket.socket(socket.AF_INET).close(),
    "IPv6": lambda: socket.socket(socket.AF_INET6).close(),
    "DNS": _ask_dns,
    "another program's socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "a file in HOME": lambda: Path.home().joinpath("left-behind").write_text(""),
    "a file elsewhere": lambda: Path.home().with_name("left-behind").write_text(""),
    "a program": _start_program,
}


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
