"""align/lock.py: one process at a time; another waits and says so; a killed one leaves no lock."""

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
from tiny_align.align.lock import LOCK, training_lock, work_folder
from tiny_align.align.model.users import load_projector, write_general
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import platform_users
from tiny_align.runtime.bundle.users import check_user
from tiny_align.runtime.errors import TinyAlignError

HOLDER = """
import sys, time
from pathlib import Path
from tiny_align.align.lock import training_lock
with training_lock(Path(sys.argv[1])) as work:
    print("in", flush=True)
    (work / "features").mkdir(exist_ok=True)
    time.sleep(float(sys.argv[2]))
print("out", flush=True)
"""

MANY = """
import sys, time
from pathlib import Path
from tiny_align.align.lock import training_lock
for _ in range(20):
    with training_lock(Path(sys.argv[1])) as work:
        (work / "here").touch(exist_ok=False)
        time.sleep(0.001)
        (work / "here").unlink()
"""


@pytest.fixture
def user_folder(tmp_path):
    return tmp_path / "users/ana"


@pytest.fixture
def holder(user_folder):
    """Another process that holds the lock for some seconds: holder(seconds)."""
    started = []

    def hold(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(user_folder), str(seconds)]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_folders_made_for_the_lock_are_removed_with_it(tmp_path, user_folder):
    with training_lock(user_folder) as work:
        assert work == work_folder(user_folder) == tmp_path / "users/.ana.align"
        assert (work / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_other_files_in_the_work_folder_stay(user_folder):
    with pytest.raises(KeyboardInterrupt), training_lock(user_folder) as work:
        (work / "features").mkdir()
        raise KeyboardInterrupt
    assert [p.name for p in work_folder(user_folder).iterdir()] == ["features"]


def test_a_process_may_take_the_lock_twice(user_folder):
    with training_lock(user_folder) as work:
        with training_lock(user_folder):
            pass
        assert (work / LOCK).exists()
    assert not work.exists()


def test_waiting_for_another_process_is_printed(user_folder, holder, capfd):
    other = holder(1.0)
    assert other.stdout.readline() == "in\n"
    with training_lock(user_folder) as work:
        assert other.communicate()[0] == "out\n"  # it has left
        assert [p.name for p in sorted(work.iterdir())] == ["features", LOCK]
    assert (
        capfd.readouterr().err
        == "tiny-align: another process is training ana: waiting until it has finished\n"
    )


def test_a_killed_process_leaves_no_lock(user_folder, holder, capfd):
    other = holder(60.0)
    assert other.stdout.readline() == "in\n"
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    began = time.monotonic()
    with training_lock(user_folder):
        assert time.monotonic() - began < 5
    assert not capfd.readouterr().err


def test_of_many_processes_only_one_holds_the_lock(user_folder):
    """Although each removes the work folder and the lock file when it leaves."""
    processes = [subprocess.Popen([sys.executable, "-c", MANY, str(user_folder)]) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert not work_folder(user_folder).exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(TinyAlignError, match=r"\.ana\.align cannot be written \(.*: make room")
    with refused, training_lock(tmp_path / "file/ana"):
        pass


# --- two commands at once ---


def start_command(*arguments) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", *map(str, arguments)]
    command += ["--threads", "1", "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finish(*processes: subprocess.Popen) -> tuple[list[dict], str]:
    """Their documents, and the stderr of all."""
    documents = []
    stderr = ""
    for process in processes:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-500:]
        documents.append(json.loads(out))
        stderr += err
    return documents, stderr


def test_two_trainings_of_one_user_both_succeed(
    bundle_copy, write_recordings, tmp_path, empty_home
):
    write_recordings(tmp_path / "few", 3, 1)
    call = ("--bundle", bundle_copy, "--data", tmp_path / "few", "--user", "ana", "--steps", 2)
    documents, stderr = finish(start_command("align", *call), start_command("enroll", *call))
    assert stderr.count("another process is training ana: waiting until it has finished") == 1
    assert all(document["steps"] == 2 for document in documents)
    bundle = Bundle.open(bundle_copy)
    users = platform_users(bundle)
    assert check_user(users / "ana", bundle.manifest)["training"]["steps"] == 2
    assert [p.name for p in sorted(users.iterdir())] == [".ana.align", "ana"]
    assert [p.name for p in (users / ".ana.align").iterdir()] == ["features"]


def test_two_general_trainings_of_one_bundle_both_succeed(bundle_copy, voice_path):
    """The second opens the bundle that the first has written."""
    call = ("align", "--general", "--bundle", bundle_copy, "--data", voice_path, "--steps", 1)
    documents, stderr = finish(start_command(*call), start_command(*call))
    assert stderr.count("another process is training bundle: waiting until it has finished") == 1
    assert all(document["steps"] == 1 for document in documents)
    Bundle.open(bundle_copy)
    names = [p.name for p in sorted(bundle_copy.parent.iterdir())]
    assert names == [f".{bundle_copy.name}.align", bundle_copy.name]


def test_a_bundle_is_not_replaced_while_a_user_is_trained_in_it(bundle_copy, capfd):
    """The new user would be lost with the old folder."""
    bundle = Bundle.open(bundle_copy)
    inside = threading.Event()
    done = threading.Event()
    projector = load_projector(bundle, bundle.graph("projector"))

    def train_user():
        with training_lock(bundle_copy / "users/ana") as work:
            inside.set()
            done.wait(0.5)
            (work.parent / "ana").mkdir()
            (work.parent / "ana/user.json").write_text("{}")

    training = threading.Thread(target=train_user)
    training.start()
    inside.wait()
    rehearsal = read_rehearsal(bundle.replay)[:4]
    write_general(bundle, projector.state_dict(), rehearsal, bundle.speech_tokens())
    training.join()
    assert (bundle_copy / "users/ana/user.json").exists()
    assert not (bundle_copy / "users/.ana.align").exists()
    assert "another process is training ana" in capfd.readouterr().err
