"""`tiny-align doctor --prove-private`: a spoken turn in a sealed process, and ways out of it tried.

`prove` starts this module in a process of its own, with an empty HOME. There `tiny-align run
--sealed` answers a recording; then we try every way out ourselves (`try_ways_out`). strace, which
needs no root, counts what the libraries attempted until then. Without strace nobody knows.
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

from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.privacy.sealing import WRITING

REFUSALS = ("EPERM", "EACCES")  # seccomp's and Landlock's
STRACE = ("strace", "-f", "-qq", "-e", "trace=%network,%file")
ANSWERED = "/tiny-align has answered"  # no such file: looking for it marks the trace
COVERED = "all threads from the start of the process to the end of the answer, by strace"
UNKNOWN = "not known: strace is not installed or may not trace here"
WRITTEN_BY_ALL = ("/dev/null", "/dev/tty", "/dev/snd", "/dev/dri", "/dev/nv", "/proc/self")


def prove(bundle: Path, audio: Path) -> dict:
    """Answer `audio` in a sealed process.

    Returns:
        text, heard, sealed: as `tiny-align run` gives them.
        denied: way out -> name of the error it met; None if it was open.
        attempted: kind -> number of attempts until the end of the answer; None if nobody counted.
        covered: what was counted.
        proved: False if a way out was open or anything was attempted; None if nobody counted.
    Raises:
        TinyAlignError: what the process said when it refused.
    """
    counts = _strace_works()
    with tempfile.TemporaryDirectory() as folder:
        home, trace = Path(folder, "home"), Path(folder, "trace")
        home.mkdir()
        command = [*STRACE, "-o", str(trace)] if counts else []
        command += [sys.executable, "-m", __name__, str(bundle.resolve()), str(audio.resolve())]
        done = subprocess.run(command, env=_environment(home), capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
            raise TinyAlignError(said.removeprefix("tiny-align: "))
        lines = trace.read_text(errors="replace").splitlines() if counts else []
    answer, denied = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    attempted = count_attempts(lines) if counts else None
    report = {name: answer[name] for name in ("text", "heard", "sealed")}
    report |= {"denied": denied, "attempted": attempted, "covered": COVERED if counts else UNKNOWN}
    return report | {"proved": _judge(denied, attempted)}


def _judge(denied: dict, attempted: dict | None) -> bool | None:
    if any(error not in REFUSALS for error in denied.values()):
        return False
    return None if attempted is None else not any(attempted.values())


def _strace_works() -> bool:
    if not shutil.which("strace"):
        return False
    command = [*STRACE, "-o", os.devnull, sys.executable, "-S", "-c", ""]
    return subprocess.run(command, capture_output=True).returncode == 0


def _environment(home: Path) -> dict[str, str]:
    """Ours with another HOME. Python's own caches are not what is to be counted."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    packages = site.getuserbase()  # those below the user's own HOME
    return ours | {"HOME": str(home), "PYTHONUSERBASE": packages, "PYTHONDONTWRITEBYTECODE": "1"}


def count_attempts(trace: list[str]) -> dict[str, int]:
    """Kind -> number of attempts in strace's output, up to the mark."""
    counts = {"network": 0, "programs": -1, "writing": 0}  # the process itself is a program
    for line in trace:
        if ANSWERED in line:
            break
        counts["network"] += is_network(line)
        counts["programs"] += bool(re.match(r"\d+ +execve(at)?\(", line))
        counts["writing"] += _is_writing(line)
    return counts


def is_network(line: str) -> bool:
    """Whether a line of strace's is a socket or an address beyond this machine's own, or asks DNS."""
    elsewhere = re.search(r"\bsocket\((?!AF_UNIX|AF_LOCAL)|\bsa_family=AF_INET", line)
    return bool(elsewhere) or '"/etc/resolv.conf"' in line  # which a look-up reads first


def _is_writing(line: str) -> bool:
    """Whether a line of strace's opens a file for writing, makes, moves or removes one."""
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


def try_ways_out() -> dict[str, str | None]:
    """Way out -> name of the error it met in this thread and in a new one; None if it was open."""
    results = [_try_all()]
    thread = threading.Thread(target=lambda: results.append(_try_all()))
    thread.start()
    thread.join()
    here, there = results
    return {way: here[way] and there[way] for way in WAYS_OUT}


def _try_all() -> dict[str, str | None]:
    return {way: _error_of(attempt) for way, attempt in WAYS_OUT.items()}


def _error_of(attempt: Callable) -> str | None:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return None


def _ask_dns() -> None:
    """By hand: the system's resolver does not say why it finds nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as question:
        question.sendto(bytes(12), ("127.0.0.1", 53))


def _start_program() -> None:
    os.waitpid(os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {}), 0)


WAYS_OUT = {
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
