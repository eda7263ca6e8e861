"""Getting to know a person: which sentences, which recordings, and the training they lead to."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from tiny_align.align.commands.enroll import _keep, drawn
from tiny_align.align.data.recording import check_recording
from tiny_align.align.data.sentences import choose, coverage, units
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.listening import microphone as microphone_module

RATE = 16_000
TEXTS = [
    "stop the music",
    "call my mother",
    "stop the music now",
    "seven",
    "one two three",
    "what is the time",
]
QUICK = ("--steps", 2, "--threads", 1)


def letters(text):
    return [ord(c) for c in text]


# --- sentences ---


def test_units_are_tokens_and_letter_triples_of_words():
    assert units("go on", lambda text: [1, 2]) == {1, 2, " go", "go ", " on", "on "}


def test_the_next_sentence_is_the_one_that_brings_most():
    chosen = choose(TEXTS, 3, letters)
    gains = {t: len(units(t, letters)) for t in TEXTS}
    assert chosen[0] == max(TEXTS, key=gains.get) and len(set(chosen)) == 3


@pytest.mark.parametrize("n", [1, 2, 4])
def test_chosen_sentences_cover_more_than_others(n):
    best = coverage(choose(TEXTS, n, letters), TEXTS, letters)
    others = [coverage(list(some), TEXTS, letters) for some in itertools.combinations(TEXTS, n)]
    assert best >= np.median(others) and best >= 0.9 * max(others)


def test_all_sentences_cover_everything_and_no_more_are_chosen_than_there_are():
    assert sorted(choose(TEXTS, 99, letters)) == sorted(TEXTS)
    assert coverage(TEXTS, TEXTS, letters) == 1


# --- recordings ---


@pytest.fixture(scope="module")
def good(voice_path):
    row = json.loads((voice_path / "metadata.jsonl").read_text().splitlines()[0])
    return read_audio(voice_path / row["file_name"], RATE), row["transcription"]


def test_a_good_recording_needs_no_remedy(good):
    report = check_recording(good[0], RATE, good[1])
    assert (
        not report.remedy
        and report.snr_db > 20
        and report.seconds == pytest.approx(len(good[0]) / RATE)
    )


@pytest.mark.parametrize(
    ("spoil", "remedy"),
    [
        (lambda a: a * 0.002, "too quiet"),
        (lambda a: np.clip(a * 40, -1, 1), "clipped"),
        (lambda a: a + 0.1 * np.random.default_rng(0).standard_normal(len(a)), "noise is only"),
        (
            lambda a: np.concatenate(
                [a, 1e-4 * np.random.default_rng(0).standard_normal(RATE * 30)]
            ),
            "stop right after",
        ),
        (lambda a: a[RATE // 2 : RATE], "read all of it"),
        (lambda a: a[:0], "empty"),
    ],
)
def test_a_bad_recording_says_what_to_do(good, spoil, remedy):
    assert remedy in check_recording(spoil(good[0]).astype(np.float32), RATE, good[1] * 2).remedy


# --- the command ---


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


def test_list_shows_the_sentences_to_read(run_cli, bundle_path, texts):
    done = run_cli(
        "enroll",
        "--bundle",
        bundle_path,
        "--user",
        "ana",
        "--list",
        "--sentences",
        3,
        "--texts",
        texts,
    )
    assert (
        done.status == 0
        and len(done.document["sentences"]) == 3
        and 0 < done.document["coverage"] < 1
    )
    assert all(sentence in done.stdout for sentence in done.document["sentences"])


def test_no_sentences_to_choose_from_is_an_error(run_cli, bundle_path, tmp_path):
    done = run_cli(
        "enroll",
        "--bundle",
        bundle_path,
        "--user",
        "ana",
        "--list",
        "--texts",
        tmp_path / "none.txt",
    )
    assert done.status == 2 and "--texts" in done.stderr


@pytest.fixture
def recordings(voice_path, tmp_path):
    """Twelve of the shipped recordings, two of them spoilt."""
    folder, rows = tmp_path / "recordings", []
    folder.mkdir()
    for i, line in enumerate((voice_path / "metadata.jsonl").read_text().splitlines()[:12]):
        row = json.loads(line)
        audio, rate = soundfile.read(voice_path / row["file_name"], dtype="float32")
        audio = audio * 0.02 if i == 0 else np.clip(audio * 99, -1, 1) if i == 1 else audio
        soundfile.write(folder / f"{i}.wav", audio, rate, subtype="FLOAT")
        rows.append({**row, "file_name": f"{i}.wav", "split": "test" if i > 8 else "train"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_recordings_are_checked_and_learnt_from(run_cli, bundle_path, recordings, tmp_path):
    out = tmp_path / "out"
    done = run_cli(
        "enroll",
        "--bundle",
        bundle_path,
        "--user",
        "ana",
        "--data",
        recordings,
        "--out",
        out,
        *QUICK,
    )
    assert done.status == 0, done.stderr
    assert (
        "left out 0.wav: it is too quiet" in done.stdout
        and "left out 1.wav: it is clipped" in done.stdout
    )
    data = done.document["data"]
    assert (data["train"], data["test"], data["left_out"]) == (7, 3, 2)
    assert [(e["reason"], e["count"]) for e in data["reasons"]] == [
        ("it is too quiet", 1),
        ("it is clipped", 1),
    ]
    assert done.document["utterances"] == 7 and "held-out error" in done.stdout
    assert (out / "users/ana/curve.png").read_bytes()[:4] == b"\x89PNG"


class Played:
    """A microphone that hears the shipped voice; the first time it is muted."""

    def __init__(self, recordings):
        self.recordings, self.asked = recordings, 0
        self.sample_rate = RATE

    def __call__(self, sample_rate, device):
        assert sample_rate == RATE and device is None
        return self

    def record(self, wait):
        wait()
        self.asked += 1
        return self.recordings[self.asked - 2] if self.asked > 1 else np.zeros(RATE, np.float32)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def mic(voice_path, monkeypatch):
    rows = [
        json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()[:8]
    ]
    played = Played([read_audio(voice_path / row["file_name"], RATE) for row in rows])
    played.texts = [row["transcription"] for row in rows]
    monkeypatch.setattr(microphone_module, "Microphone", played)
    monkeypatch.setattr("builtins.input", lambda: "")
    return played


def test_a_microphone_is_asked_until_each_recording_is_good(
    run_cli, bundle_path, mic, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "tiny_align.align.commands.enroll.sentences", lambda bundle, texts, n: (mic.texts[:n], 1.0)
    )
    out = tmp_path / "out"
    done = run_cli(
        "enroll", "--bundle", bundle_path, "--user", "ana", "--out", out, "--sentences", 8, *QUICK
    )
    assert done.status == 0, done.stderr
    assert "once more, please: it is too quiet" in done.stderr and mic.asked == 9
    rows = (out / "users/ana.recordings/metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["transcription"] for row in rows] == mic.texts


def test_recordings_are_kept_where_nobody_can_press_enter_any_more(
    run_cli, bundle_path, mic, tmp_path, monkeypatch
):
    """The input ends after four times Enter: one that is muted and one that is good."""
    presses = iter([""] * 4)

    def enter():
        for press in presses:
            return press
        raise EOFError

    monkeypatch.setattr("builtins.input", enter)
    call = ("enroll", "--bundle", bundle_path, "--user", "ana", "--out", tmp_path / "out", *QUICK)
    done = run_cli(*call)
    assert (done.status, done.stdout) == (
        2,
        "",
    ) and "waits for Enter, and standard input has ended" in done.stderr
    kept = tmp_path / "out/users/ana.recordings"
    assert [p.name for p in sorted(kept.iterdir())] == ["0000.flac", "metadata.jsonl"]


@pytest.mark.parametrize("line", [b'{"file_name": "0001.fl', b"[]", b"{}", b"\xff", b"null"])
def test_a_damaged_line_of_earlier_recordings_is_named(run_cli, bundle_path, mic, tmp_path, line):
    kept = tmp_path / "out/users/ana.recordings"
    kept.mkdir(parents=True)
    whole = b'{"file_name": "0000.flac", "transcription": "hello"}\n'
    (kept / "metadata.jsonl").write_bytes(whole + line)
    done = run_cli(
        "enroll", "--bundle", bundle_path, "--user", "ana", "--out", tmp_path / "out", *QUICK
    )
    assert (done.status, done.stdout, mic.asked) == (2, "", 0)
    assert "metadata.jsonl, line 2 is damaged (" in done.stderr and "delete the line" in done.stderr


def test_a_recording_that_does_not_fit_leaves_the_earlier_ones(good, tmp_path, full_disk):
    """And a line that was removed by hand frees no name that is in use."""
    for text in ("one", "two"):
        _keep(tmp_path, text, good[0], RATE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with full_disk(1_000), pytest.raises(TinyAlignError, match="cannot be written"):
        _keep(tmp_path, "three", good[0], RATE)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    first, second = before["metadata.jsonl"].splitlines(keepends=True)
    (tmp_path / "metadata.jsonl").write_bytes(second)
    _keep(tmp_path, "one", good[0], RATE)
    rows = [json.loads(row) for row in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["0001.flac", "0002.flac"]


def test_the_curve_is_drawn_from_worst_to_best():
    line = drawn([{"step": i, "held_out": loss} for i, loss in enumerate([4.0, 2.0, 0.5])])
    assert "█▄▁" in line and "4.000" in line and "0.500" in line
