"""Fixtures that tests share: the shipped bundle and voice, copies that may be changed, the command.

The shipped files are only read. `threads=1` everywhere gives the same numbers on every machine.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.users import write_user_record

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="session", autouse=True)
def platform_data_folder(tmp_path_factory):
    """Keep users that commands write by default out of the real data folder of the platform."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield


@pytest.fixture
def empty_home(tmp_path, monkeypatch) -> Path:
    """An empty HOME, in which the platform's data folder is, for this test and its processes."""
    for name in list(os.environ):
        if name.startswith("XDG_"):
            monkeypatch.delenv(name)
    home = tmp_path / "empty-home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


class Outcome(NamedTuple):
    """The result of a command."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict:
        """The JSON on the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def bundle_path() -> Path:
    """The shipped bundle; read only."""
    return REFERENCE / "bundle"


@pytest.fixture(scope="session")
def voice_path() -> Path:
    """The shipped recordings with their metadata.jsonl; read only."""
    return REFERENCE / "voice"


class Watched(NamedTuple):
    """The result of a process, and what it attempted."""

    outcome: Outcome
    attempts: list[str]  # lines of strace: sockets and addresses beyond this machine, DNS
    files: list[str]  # in its HOME, which was empty


@pytest.fixture(scope="session")
def offline():
    """The beginning of a command without a network interface, under strace; skips if impossible."""
    for unshare in (["unshare", "-n"], ["unshare", "-rn"]):
        command = [*unshare, "strace", "-f", "-qq", "--seccomp-bpf", "-e", "trace=%network,openat"]
        with contextlib.suppress(OSError):
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
    pytest.skip("needs strace and permission for `unshare -n`")


@pytest.fixture
def watch(offline, tmp_path):
    """Run a program without a network, with an empty HOME: watch(*command, stdin="") -> Watched."""
    from tiny_align.runtime.commands import proof
    from tiny_align.runtime.privacy import telemetry

    home = tmp_path / "home"
    trace = tmp_path / "trace"
    set_by_us = ("ORT_", "HF_", "XDG_", "MPL", *telemetry.OFF)
    # in continuous integration ONNX Runtime reports nothing
    ci = ("CI", "GITHUB_", "GITLAB_", "JENKINS_", "BUILDKITE", "TF_BUILD")
    env = {k: v for k, v in os.environ.items() if not k.startswith((*set_by_us, *ci))}
    env["HOME"] = str(home)
    home.mkdir()

    def run(*command, stdin: str = "") -> Watched:
        watched_command = [*offline, "-o", trace, *map(str, command)]
        done = subprocess.run(
            watched_command, env=env, input=stdin, capture_output=True, text=True, timeout=300
        )
        lines = trace.read_text(errors="replace").splitlines()
        files = sorted(path.relative_to(home).as_posix() for path in home.rglob("*"))
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        return Watched(outcome, [line for line in lines if proof.is_network(line)], files)

    return run


@pytest.fixture
def bundle_copy(bundle_path, tmp_path):
    """A bundle that may be changed, without users and engines."""
    target = tmp_path / "bundle"
    shutil.copytree(bundle_path, target, ignore=shutil.ignore_patterns("users", "engines"))
    yield target
    shutil.rmtree(target)  # pytest keeps temporary files, 20 MB for each test


@pytest.fixture(scope="session")
def assistant(bundle_path):
    """The shipped bundle, loaded once. A test that changes it must load another."""
    from tiny_align.runtime import Assistant

    with Assistant.load(bundle_path, threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def speech(voice_path) -> np.ndarray:
    """(S,) float32 at 16 kHz: a recording of about two seconds."""
    from tiny_align.runtime.audio.samples import read_audio

    return read_audio(voice_path / "train-000.flac", 16_000)


@pytest.fixture
def run_cli(capsys):
    """Call the command in this process: run_cli("run", path, ...) -> Outcome."""

    def run(*arguments) -> Outcome:
        from tiny_align.runtime.commands.cli import main

        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stopped:  # argparse
            status = stopped.code
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def run_python():
    """Run a script in an interpreter of its own: run_python(script, *arguments) -> Outcome."""

    def run(script: str, *arguments) -> Outcome:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def make_user():
    """Write a user with another projector than the general: make_user(bundle, folder) -> folder."""

    def make(bundle: Bundle, folder: Path, shift: float = 0.3) -> Path:
        graph = bundle.graph("projector")
        folder.mkdir(parents=True)
        for path in (graph, graph.with_name(f"{graph.name}.data")):
            shutil.copyfile(path, folder / path.name)
        _shift_weights(folder / f"{graph.name}.data", bundle.manifest.projector_weights, shift)
        write_user_record(folder, bundle.manifest, {"steps": 0})
        return folder

    return make


def _shift_weights(data: Path, weights, shift: float) -> None:
    blob = bytearray(data.read_bytes())
    for spec in weights:
        values = np.frombuffer(blob, "<f4", count=int(np.prod(spec.shape)), offset=spec.offset)
        values += np.float32(shift) * np.float32(values.std())
    data.write_bytes(blob)


@pytest.fixture(scope="session")
def edit_json():
    """Change a JSON file: edit_json(path, change), where `change` alters the value it is given."""

    def edit(path: Path, change) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    return edit


@pytest.fixture(scope="session")
def full_disk():
    """A disk on which no file grows beyond `n_bytes`: with full_disk(n_bytes): ..."""
    resource = pytest.importorskip("resource", reason="the limit is Unix's")

    @contextlib.contextmanager
    def limited(n_bytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
