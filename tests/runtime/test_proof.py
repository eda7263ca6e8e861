"""`doctor --prove-private`: its verdict with and without strace, and on libraries that report."""

import json
import sys

import pytest

from tiny_align.runtime.commands import proof
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.privacy.sealing import load_libseccomp

CALL = "import sys; from tiny_align.runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))"
PROVE = ("doctor", "--prove-private", "--json")
TRY_UNSEALED = """
import json
from tiny_align.runtime.commands import proof
print(json.dumps(proof.try_ways_out()))
"""
REPORTING = """
import os, socket
if "PYTHONDONTWRITEBYTECODE" in os.environ:  # the process that is watched
    socket.socket(socket.AF_INET).close()
    open(os.path.expanduser("~/identifier"), "w").close()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sealing is Linux's")


@pytest.fixture(autouse=True)
def sealable():
    try:
        load_libseccomp()
    except TinyAlignError as error:
        pytest.skip(str(error))


@pytest.fixture
def strace():
    if not proof.strace_works():
        pytest.skip("strace is not installed, or may not trace")


def test_a_spoken_turn_is_private(run_python, strace):
    done = run_python(CALL, *PROVE)
    assert (done.status, done.stderr) == (0, "")
    private = done.document["private"]
    assert private["heard"] and private["text"]
    assert list(private["denied"]) == list(proof.WAYS_OUT)
    assert set(private["denied"].values()) <= {"EPERM", "EACCES"}
    assert private["attempted"] == {"network": 0, "programs": 0, "writing": 0}
    assert "strace" in private["covered"] and private["proved"] is True
    assert {"what": "privacy", "ok": True}.items() <= done.document["findings"][-1].items()


def test_a_library_that_reports_is_detected(run_python, strace, monkeypatch, tmp_path, bundle_path):
    """A module that Python loads at its start reaches for the network and HOME before the seal."""
    (tmp_path / "sitecustomize.py").write_text(REPORTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_python(CALL, *PROVE, "--bundle", bundle_path)
    assert done.status == 1, done.stderr
    private = done.document["private"]
    assert private["attempted"] == {"network": 1, "programs": 0, "writing": 1}
    assert private["proved"] is False and done.document["wrong"] == ["privacy"]


def test_without_strace_attempts_are_not_known(run_python, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = run_python(CALL, *PROVE)
    private = done.document["private"]
    assert (done.status, private["attempted"], private["proved"]) == (0, None, None)
    assert private["covered"].startswith("not known")
    assert "strace" in done.document["findings"][-1]["remedy"] and not done.document["wrong"]


def test_a_damaged_bundle_is_one_sentence(run_python, bundle_copy):
    (bundle_copy / "llm.onnx").write_bytes(b"")
    done = run_python(CALL, *PROVE, "--bundle", bundle_copy)
    assert (done.status, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_open_ways_out_meet_no_error(run_python, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    done = run_python(TRY_UNSEALED)
    open_ways = {way for way, error in json.loads(done.stdout).items() if error is None}
    assert {"IPv4", "another program's socket", "a file in HOME", "a program"} <= open_ways


def test_attempts_are_counted_up_to_the_answer():
    trace = [
        '7 execve("/usr/bin/python", ["python"], 0x7ff /* 9 vars */) = 0',
        "7 socket(AF_UNIX, SOCK_STREAM, 0) = 3",
        '7 openat(AT_FDCWD, "/etc/hosts", O_RDONLY|O_CLOEXEC) = 3',
        '7 openat(AT_FDCWD, "/dev/null", O_RDWR) = 3',
        "8 socket(AF_INET, SOCK_DGRAM|SOCK_CLOEXEC, IPPROTO_IP <unfinished ...>",
        "8 <... socket resumed>) = 4",
        "9 connect(4, {sa_family=AF_INET6, sin6_port=htons(53)}, 28) = -1 ENETUNREACH",
        '9 openat(AT_FDCWD, "/etc/resolv.conf", O_RDONLY|O_CLOEXEC) = 3',
        '9 openat(AT_FDCWD, "/home/ana/.cache/id", O_WRONLY|O_CREAT, 0666) = -1 EACCES',
        '9 mkdir("/home/ana/.cache", 0700) = -1 EACCES',
        '9 execve("/bin/sh", ["sh"], 0x7ff /* 9 vars */) = -1 EPERM',
        f'7 newfstatat(AT_FDCWD, "{proof.ANSWERED}", 0x7ff, 0) = -1 ENOENT',
        "7 socket(AF_INET, SOCK_STREAM, 0) = -1 EPERM",
    ]
    assert proof.count_attempts(trace) == {"network": 3, "programs": 1, "writing": 2}
