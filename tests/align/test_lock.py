"""align/lock.py: one process at a time; the other waits and says so; what was killed leaves no lock."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("torch", reason="projectors are written from torch")

from tiny_align.align.data.rehearsal import read_rehearsal
from tiny_align.align.lock import LOCK, alone, work_folder
from tiny_align.align.model.users import load_projector, write_general
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import check_user
from tiny_align.runtime.errors import TinyAlignError

HOLDER = """
import sys, time
from pathlib import Path
from tiny_align.align.lock import alone
with alone(Path(sys.argv[1])) as work:
    print("in", flush=True)
    (work / "features").mkdir(exist_ok=True)
    time.sleep(float(sys.argv[2]))
print("out", flush=True)
"""

MANY = """
import sys, time
from pathlib import Path
from tiny_align.align.lock import alone
for _ in range(20):
    with alone(Path(sys.argv[1])) as work:
        (work / "here").touch(exist_ok=False)
        time.sleep(0.001)
        (work / "here").unlink()
"""


@pytest.fixture
def person(tmp_path):
    return tmp_path / "users/ana"


@pytest.fixture
def holder(person):
    """Another process that is in the work folder for so many seconds: holder(seconds)."""
    started = []

    def hold(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(person), str(seconds)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_what_was_made_for_the_lock_goes_with_it(tmp_path, person):
    with alone(person) as work:
        assert (
            work == work_folder(person) == tmp_path / "users/.ana.align" and (work / LOCK).exists()
        )
    assert not list(tmp_path.iterdir())


def test_what_else_is_in_the_work_folder_stays(person):
    with pytest.raises(KeyboardInterrupt), alone(person) as work:
        (work / "features").mkdir()
        raise KeyboardInterrupt
    assert [p.name for p in work_folder(person).iterdir()] == ["features"]


def test_a_process_may_enter_twice(person):
    with alone(person) as work:
        with alone(person):
            pass
        assert (work / LOCK).exists()
    assert not work.exists()


def test_another_process_is_waited_for_which_is_said(person, holder, capfd):
    other = holder(1.0)
    assert other.stdout.readline() == "in\n"
    with alone(person) as work:
        assert other.communicate()[0] == "out\n"  # it has left
        assert [p.name for p in sorted(work.iterdir())] == ["features", LOCK]
    assert (
        capfd.readouterr().err
        == "tiny-align: another process is training ana: waiting until it has finished\n"
    )


def test_a_killed_process_leaves_no_lock(person, holder, capfd):
    other = holder(60.0)
    assert other.stdout.readline() == "in\n"
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    began = time.monotonic()
    with alone(person):
        assert time.monotonic() - began < 5
    assert not capfd.readouterr().err


def test_many_never_meet(person):
    """Although the work folder and the lock's file go whenever one leaves."""
    processes = [subprocess.Popen([sys.executable, "-c", MANY, str(person)]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert not work_folder(person).exists()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(TinyAlignError, match=r"\.ana\.align cannot be written \(.*: make room")
    with refused, alone(tmp_path / "file/ana"):
        pass


# --- two commands at once ---


def started(*arguments) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "tiny_align.runtime.commands.cli",
        *map(str, arguments),
        "--threads",
        "1",
        "--json",
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def ended(*processes: subprocess.Popen) -> tuple[list[dict], str]:
    """Their documents, and what both have said."""
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), [
        err[-500:] for _, err in outputs
    ]
    return [json.loads(out) for out, _ in outputs], "".join(err for _, err in outputs)


def test_two_trainings_of_one_person_are_both_whole(bundle_copy, write_recordings, tmp_path):
    write_recordings(tmp_path / "few", 3, 1)
    call = ("--bundle", bundle_copy, "--data", tmp_path / "few", "--user", "ana", "--steps", 2)
    documents, said = ended(started("align", *call), started("enroll", *call))
    assert said.count("another process is training ana: waiting until it has finished") == 1
    assert all(document["steps"] == 2 for document in documents)
    users = bundle_copy / "users"
    assert check_user(users / "ana", Bundle.open(bundle_copy).manifest)["training"]["steps"] == 2
    assert [p.name for p in sorted(users.iterdir())] == [".ana.align", "ana"]
    assert [p.name for p in (users / ".ana.align").iterdir()] == ["features"]


def test_two_general_trainings_of_one_bundle_are_both_whole(bundle_copy, voice_path):
    """The second opens what the first has written."""
    call = ("align", "--general", "--bundle", bundle_copy, "--data", voice_path, "--steps", 1)
    documents, said = ended(started(*call), started(*call))
    assert said.count("another process is training bundle: waiting until it has finished") == 1
    assert all(document["steps"] == 1 for document in documents)
    Bundle.open(bundle_copy)
    names = [p.name for p in sorted(bundle_copy.parent.iterdir())]
    assert names == [f".{bundle_copy.name}.align", bundle_copy.name]


def test_a_bundle_is_not_replaced_while_a_person_is_trained_in_it(bundle_copy, capfd):
    """What they get meanwhile would be lost with the old folder."""
    bundle, inside, done = Bundle.open(bundle_copy), threading.Event(), threading.Event()
    projector = load_projector(bundle, bundle.graph("projector"))

    def person():
        with alone(bundle_copy / "users/ana") as work:
            inside.set()
            done.wait(0.5)
            (work.parent / "ana").mkdir()
            (work.parent / "ana/user.json").write_text("{}")

    trains = threading.Thread(target=person)
    trains.start()
    inside.wait()
    write_general(
        bundle, projector.state_dict(), read_rehearsal(bundle.replay)[:4], bundle.speech_tokens()
    )
    trains.join()
    assert (bundle_copy / "users/ana/user.json").exists() and not (
        bundle_copy / "users/.ana.align"
    ).exists()
    assert "another process is training ana" in capfd.readouterr().err
