"""Faults of the machine: one sentence, the conventional exit status and no traceback."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import pytest

from tiny_align.runtime.bundle.manifest import MANIFEST
from tiny_align.runtime.checks import RANGES
from tiny_align.runtime.commands import cli
from tiny_align.runtime.commands import run as run_module

if os.name != "posix":
    pytest.skip("the faults are Unix's", allow_module_level=True)

COMMAND = [sys.executable, "-m", "tiny_align.runtime.commands.cli"]
NO_RIGHTS = [
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-all",
]  # root may read everything
QUICK = ("--threads", "1", "--max-tokens", "6")


def call(
    *arguments, shell: str = '"$@"', prefix=(), stdin: bytes = b"", **environment
) -> subprocess.CompletedProcess:
    """Run the command within a line of bash, in which "$@" is its call."""
    line = ["bash", "-c", shell, "bash", *prefix, *COMMAND, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(line, input=stdin, capture_output=True, timeout=120, check=False, env=env)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
    return done


def assert_refused(done, *sentences) -> None:
    last = done.stderr.decode().splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, b"") and last.startswith("tiny-align: "), done
    assert all(sentence in last for sentence in sentences), last


@pytest.fixture
def answer(bundle_path, voice_path):
    return ("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK)


# --- standard streams ---


@pytest.mark.parametrize("command", ["run", "chat", "listen"])
def test_a_reader_that_closes_the_pipe_ends_the_command_silently(bundle_path, voice_path, command):
    wav = voice_path / "train-000.flac"
    arguments = {"run": (wav,), "chat": (), "listen": ("--fast", "--wav", wav)}[command]
    shell = '"$@" | head -c 0; exit ${PIPESTATUS[0]}'
    typed = b"call my mother\n" * 3
    done = call(command, *arguments, "--bundle", bundle_path, *QUICK, shell=shell, stdin=typed)
    assert done.returncode == 141 and b"error" not in done.stderr.lower()


def test_a_reader_that_closes_the_pipe_after_a_line_ends_the_command(bundle_path):
    shell = '"$@" | head -n 1; exit ${PIPESTATUS[0]}'
    done = call(
        "chat", "--bundle", bundle_path, *QUICK, shell=shell, stdin=b"call my mother\n" * 2_000
    )
    assert done.returncode == 141 and done.stdout.count(b"\n") == 1


def test_a_closed_stdout_is_refused_before_anything_is_loaded(answer):
    assert_refused(call(*answer, shell='"$@" >&-'), "standard output is closed")


def test_a_full_stdout_is_one_sentence(answer):
    assert_refused(call(*answer, shell='"$@" >/dev/full'), "No space left on device", "make room")


def test_without_stderr_stdout_holds_the_document(answer):
    done = call(*answer, "--json", shell='"$@" 2>&-')
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert json.loads(done.stdout)["text"]
    assert call("run", "none.wav", "--bundle", "none", shell='"$@" 2>&-').stdout == b""


@pytest.mark.parametrize("shell", ['"$@" <&-', '"$@" </dev/null'])
def test_a_chat_without_input_has_no_turns(bundle_path, shell):
    done = call("chat", "--bundle", bundle_path, *QUICK, "--json", shell=shell)
    assert done.returncode == 0 and json.loads(done.stdout)["turns"] == []


def test_a_chat_whose_input_cannot_be_read_is_refused(bundle_path):
    done = call("chat", "--bundle", bundle_path, *QUICK, "--json", shell='"$@" 0>/dev/null')
    assert_refused(done, "standard input cannot be read", "Bad file descriptor")


# --- bytes that are no text ---

ODD_LINES = {
    "not UTF-8": (b"\xff\xfe hello", "line 2 is not UTF-8 (byte 0xff at 0)"),
    "cut in a character": ("café".encode()[:-1], "line 2 is not UTF-8 (byte 0xc3 at 3)"),
    "a NUL byte": (b"turn \0 off", "outside the LLM's tokenizer: '\\x00'"),
    "control characters": (b"\x1b\x07", "outside the LLM's tokenizer: '\\x07' '\\x1b'"),
    "10 MB": (b"a" * 10_000_000, "line 2 is too long: expected at most 100000 characters"),
    "as long as a line may be": (b"a " * 50_000, "positions"),
}
LOCALES = {
    "UTF-8": {"PYTHONUTF8": "1"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C"},
}


@pytest.mark.parametrize(("line", "sentence"), ODD_LINES.values(), ids=ODD_LINES)
def test_a_line_that_is_no_text_is_refused_and_the_next_is_answered(bundle_path, line, sentence):
    lines = b"\n".join([b"call my mother", line, b"call my mother\n"])
    done = call("chat", "--bundle", bundle_path, *QUICK, "--json", stdin=lines)
    first, odd, last = json.loads(done.stdout)["turns"]
    assert done.returncode == 0 and first["text"] == last["text"] != ""
    assert sentence in odd["error"] and odd["error"] in done.stderr.decode()
    assert len(odd["asked"]) <= 200


@pytest.mark.parametrize("environment", LOCALES.values(), ids=LOCALES)
def test_typed_lines_are_utf8_whatever_the_locale(bundle_path, environment):
    typed = "\ufeffcall my mother\n∆\n".encode()
    done = call("chat", "--bundle", bundle_path, *QUICK, stdin=typed, **environment)
    answered, odd = json.loads(done.stdout.splitlines()[-1])["turns"]
    assert done.returncode == 0 and answered["asked"] == "call my mother" and "'∆'" in odd["error"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_answer_is_printed_where_a_terminal_lacks_its_letters(
    monkeypatch, bundle_path, encoding
):
    """And the document is still JSON."""
    text = "Zürich ∆ \udcff"
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(run_module, "run", lambda args: print(text) or {"text": text})
    assert cli.main(["run", "a.wav", "--bundle", "b"]) == 0
    assert json.loads(stdout.buffer.getvalue().decode(encoding).splitlines()[-1]) == {"text": text}


@pytest.mark.parametrize("option", ["--instruction", "--user", "--backend"])
def test_an_argument_that_is_not_utf8_is_refused(answer, option):
    assert_refused(call(*answer, option, b"a\xff"), f"{option} is 'a\\udcff': expected UTF-8 text")


def test_a_bundle_whose_path_is_not_utf8_is_refused(voice_path, bundle_copy):
    path = os.fsencode(bundle_copy) + b"\xff"
    os.rename(bundle_copy, path)
    try:
        done = call("run", voice_path / "train-000.flac", "--bundle", path)
        assert_refused(done, "is not UTF-8", "rename")
    finally:
        os.rename(path, bundle_copy)


# --- permissions ---


@pytest.fixture
def unprivileged():
    """The beginning of a command that may read and write only what the modes of files allow."""
    if os.geteuid():
        return []
    if (
        shutil.which("setpriv") is None
        or subprocess.run([*NO_RIGHTS, "true"], check=False).returncode
    ):
        pytest.skip("as root every file can be read, and there is no setpriv")
    return NO_RIGHTS


@contextlib.contextmanager
def mode(path, bits: int):
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        yield
    finally:
        path.chmod(before)


FILES = [MANIFEST, "llm.onnx", "encoder.onnx.data", "tokenizer.json", "token_embeddings.npy", "."]


@pytest.mark.parametrize("name", FILES)
def test_a_bundle_that_may_not_be_read_is_one_sentence(unprivileged, bundle_copy, voice_path, name):
    arguments = ("run", voice_path / "train-000.flac", "--bundle", bundle_copy)
    with mode(bundle_copy / name, 0):
        done = call(*arguments, prefix=unprivileged)
    assert_refused(done, "" if name == "." else name, "cannot be read (Permission denied)")


@pytest.mark.parametrize("name", [".", "ana", "ana/user.json", "ana/projector.onnx.data"])
def test_a_user_that_may_not_be_read_is_one_sentence(
    unprivileged, bundle_path, make_user, answer, tmp_path, name
):
    from tiny_align.runtime.bundle.bundle import Bundle

    make_user(Bundle.open(bundle_path), tmp_path / "users/ana")
    with mode(tmp_path / "users" / name, 0):
        done = call(*answer, "--user", "ana", "--users", tmp_path / "users", prefix=unprivileged)
    assert_refused(done, str(tmp_path / "users"), "cannot be read (Permission denied)")


@pytest.mark.parametrize("place", ["a file", "a folder that may not be written"])
def test_a_user_that_cannot_be_written_is_refused_before_the_training(
    unprivileged, bundle_path, voice_path, tmp_path, place
):
    pytest.importorskip("torch")
    out = tmp_path / "out"
    out.write_text("") if place == "a file" else out.mkdir()
    data = ("--bundle", bundle_path, "--data", voice_path)
    with mode(out, 0o500):
        done = call("align", *data, "--user", "ana", "--out", out, "--json", prefix=unprivileged)
    refusal = f"{out}/users/.ana.align cannot be written ("
    assert_refused(done, refusal, "make room, or give a folder")
    assert list(tmp_path.iterdir()) == [out] and (out.is_file() or not list(out.iterdir()))


# --- limits of memory ---


@pytest.mark.parametrize(("option", "kib"), [("-v", 400_000), ("-d", 150_000)])
@pytest.mark.parametrize("threads", [1, 8])
def test_a_bundle_that_ulimit_leaves_no_room_for_is_refused(answer, option, kib, threads):
    threads = min(threads, RANGES["threads"].max)
    done = call(*answer, "--threads", str(threads), shell=f'ulimit {option} {kib}; "$@"')
    assert_refused(done, "the bundle takes about ", f"under ulimit {option} ", "raise that limit")


# --- faults in this process ---


def raising(error):
    def run(_):
        raise error

    return run


REFUSED = {
    "no memory": (MemoryError(), "memory ran out"),
    "no memory in C++": (RuntimeError("std::bad_alloc"), "memory ran out"),
    "no memory in PyTorch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        "memory ran out",
    ),
    "no threads": (RuntimeError("can't start new thread"), "starts no more threads"),
    "a file": (
        PermissionError(13, "Permission denied", "/data/x"),
        "/data/x cannot be used (Permission denied)",
    ),
    "a library's": (OSError("PortAudio library not found"), "PortAudio library not found"),
    "a path": (
        UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates"),
        "'a\\udcff' cannot be written in utf-8",
    ),
}


@pytest.mark.parametrize(("error", "sentence"), REFUSED.values(), ids=REFUSED)
def test_a_limit_of_the_machine_is_one_sentence(run_cli, monkeypatch, error, sentence):
    monkeypatch.setattr(run_module, "run", raising(error))
    done = run_cli("run", "a.wav", "--bundle", "b")
    assert (done.status, done.stdout) == (2, "")
    assert sentence in done.stderr and done.stderr.count("\n") == 1


class Panic(BaseException):
    """As libraries written in Rust raise."""


@pytest.mark.parametrize(
    "error", [KeyError("surprise"), ZeroDivisionError("surprise"), Panic("sur\nprise")]
)
def test_an_internal_error_is_one_sentence_and_with_debug_a_traceback_too(
    run_cli, monkeypatch, error
):
    monkeypatch.setattr(run_module, "run", raising(error))
    done = run_cli("run", "a.wav", "--bundle", "b")
    assert (done.status, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"tiny-align: internal error: {type(error).__name__}: ")
    assert done.stderr.endswith("; run it again with --debug and report it\n")
    for debugged in (
        ("--debug", "run", "a.wav", "--bundle", "b"),
        ("run", "a.wav", "--bundle", "b", "--debug"),
    ):
        done = run_cli(*debugged)
        assert done.status == 1 and "Traceback" in done.stderr and "internal error" in done.stderr


def test_debug_shows_the_traceback_of_a_refusal(run_cli):
    done = run_cli("--debug", "run", "a.wav", "--bundle", "nowhere")
    assert done.status == 2
    assert "Traceback" in done.stderr and "nowhere is not a bundle" in done.stderr


def test_an_interruption_keeps_its_status(run_cli, monkeypatch):
    monkeypatch.setattr(run_module, "run", raising(KeyboardInterrupt()))
    assert run_cli("run", "a.wav", "--bundle", "b").status == 130
