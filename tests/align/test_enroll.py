"""Enrolling a user: which sentences, which recordings, and the training that follows."""

import itertools
import json

import numpy as np
import pytest
import soundfile

from tiny_align.align.commands.enroll import add_recording, curve_line
from tiny_align.align.data.recording import check_recording
from tiny_align.align.data.sentences import choose, coverage, units
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.user_folders import platform_users
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
N_PLAYED = 8  # recordings of the played microphone


def letters(text):
    return [ord(c) for c in text]


# --- sentences ---


def test_units_are_tokens_and_letter_triples_of_words():
    assert units("go on", lambda text: [1, 2]) == {1, 2, " go", "go ", " on", "on "}


def test_the_first_sentence_has_the_largest_number_of_units():
    chosen = choose(TEXTS, 3, letters)
    gains = {t: len(units(t, letters)) for t in TEXTS}
    assert chosen[0] == max(TEXTS, key=gains.get) and len(set(chosen)) == 3


@pytest.mark.parametrize("n", [1, 2, 4])
def test_chosen_sentences_cover_more_than_others(n):
    best = coverage(choose(TEXTS, n, letters), TEXTS, letters)
    others = [coverage(list(some), TEXTS, letters) for some in itertools.combinations(TEXTS, n)]
    assert best >= np.median(others) and best >= 0.9 * max(others)


def test_all_sentences_cover_all_units():
    assert sorted(choose(TEXTS, 99, letters)) == sorted(TEXTS)
    assert coverage(TEXTS, TEXTS, letters) == 1


# --- recordings ---


def first_rows(voice_path, n):
    lines = (voice_path / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:n]]


@pytest.fixture(scope="module")
def good(voice_path):
    """A recording and its text."""
    (row,) = first_rows(voice_path, 1)
    return read_audio(voice_path / row["file_name"], RATE), row["transcription"]


def test_a_good_recording_needs_no_remedy(good):
    audio, text = good
    report = check_recording(audio, RATE, text)
    assert not report.remedy and report.snr_db > 20
    assert report.seconds == pytest.approx(len(audio) / RATE)


def noise(level, n_samples):
    return level * np.random.default_rng(0).standard_normal(n_samples)


@pytest.mark.parametrize(
    ("spoil", "remedy"),
    [
        (lambda a: a * 0.002, "too quiet"),
        (lambda a: np.clip(a * 40, -1, 1), "clipped"),
        (lambda a: a + noise(0.1, len(a)), "noise is only"),
        (lambda a: np.concatenate([a, noise(1e-4, RATE * 30)]), "stop right after"),
        (lambda a: a[RATE // 2 : RATE], "read all of it"),
        (lambda a: a[:0], "empty"),
    ],
)
def test_the_remedy_of_a_bad_recording_names_the_problem(good, spoil, remedy):
    assert remedy in check_recording(spoil(good[0]).astype(np.float32), RATE, good[1] * 2).remedy


# --- the command ---


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n\n")
    return path


def test_list_shows_the_sentences_to_read(run_cli, bundle_path, texts):
    options = ("--list", "--sentences", 3, "--texts", texts)
    done = run_cli("enroll", "--bundle", bundle_path, "--user", "ana", *options)
    assert done.status == 0 and len(done.document["sentences"]) == 3
    assert 0 < done.document["coverage"] < 1
    assert all(sentence in done.stdout for sentence in done.document["sentences"])


def test_no_sentences_to_choose_from_is_an_error(run_cli, bundle_path, tmp_path):
    options = ("--list", "--texts", tmp_path / "none.txt")
    done = run_cli("enroll", "--bundle", bundle_path, "--user", "ana", *options)
    assert done.status == 2 and "--texts" in done.stderr


@pytest.fixture
def recordings(voice_path, tmp_path):
    """Twelve of the shipped recordings, the first too quiet, the second clipped."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    rows = []
    for i, row in enumerate(first_rows(voice_path, 12)):
        audio, rate = soundfile.read(voice_path / row["file_name"], dtype="float32")
        if i == 0:
            audio = audio * 0.02
        elif i == 1:
            audio = np.clip(audio * 99, -1, 1)
        soundfile.write(folder / f"{i}.wav", audio, rate, subtype="FLOAT")
        rows.append({**row, "file_name": f"{i}.wav", "split": "test" if i > 8 else "train"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_bad_recordings_are_left_out_and_the_others_trained_on(
    run_cli, bundle_path, recordings, tmp_path
):
    out = tmp_path / "out"
    options = ("--data", recordings, "--out", out, *QUICK)
    done = run_cli("enroll", "--bundle", bundle_path, "--user", "ana", *options)
    assert done.status == 0, done.stderr
    assert "left out 0.wav: it is too quiet" in done.stdout
    assert "left out 1.wav: it is clipped" in done.stdout
    data = done.document["data"]
    assert (data["train"], data["test"], data["left_out"]) == (7, 3, 2)
    reasons = {entry["reason"]: entry["count"] for entry in data["reasons"]}
    assert reasons == {"it is too quiet": 1, "it is clipped": 1}
    assert done.document["utterances"] == 7 and "held-out error" in done.stdout
    assert (out / "users/ana/curve.png").read_bytes()[:4] == b"\x89PNG"


class PlayedMicrophone:
    """A microphone that plays recordings, one for each request; the first time it is muted."""

    sample_rate = RATE

    def __init__(self, recordings):
        self.recordings = recordings
        self.n_requests = 0

    def __call__(self, sample_rate, device):
        assert sample_rate == RATE and device is None
        return self

    def record(self, wait):
        wait()
        self.n_requests += 1
        if self.n_requests == 1:
            return np.zeros(RATE, np.float32)
        return self.recordings[self.n_requests - 2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def microphone(voice_path, monkeypatch):
    rows = first_rows(voice_path, N_PLAYED)
    recordings = [read_audio(voice_path / row["file_name"], RATE) for row in rows]
    played = PlayedMicrophone(recordings)
    monkeypatch.setattr(microphone_module, "Microphone", played)
    monkeypatch.setattr("builtins.input", lambda: "")
    return played


def test_each_sentence_is_recorded_until_it_is_good(
    run_cli, bundle_path, voice_path, microphone, tmp_path
):
    rows = first_rows(voice_path, N_PLAYED)
    by_text = dict(zip([row["transcription"] for row in rows], microphone.recordings))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(by_text))
    sentences = ("--sentences", N_PLAYED, "--texts", texts)
    where = ("--bundle", bundle_path, "--user", "ana", "--out", tmp_path / "out")
    chosen = run_cli("enroll", *where, *sentences, "--list").document["sentences"]
    microphone.recordings = [by_text[text] for text in chosen]

    done = run_cli("enroll", *where, *sentences, *QUICK)
    assert done.status == 0, done.stderr
    assert "once more, please: it is too quiet" in done.stderr
    assert microphone.n_requests == N_PLAYED + 1
    lines = (tmp_path / "out/users/ana.recordings/metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["transcription"] for line in lines] == chosen


def test_recordings_remain_if_standard_input_ends(
    run_cli, bundle_path, microphone, empty_home, monkeypatch
):
    """The input ends after four times Enter: one muted recording and one that is good.

    They are where the user would be.
    """
    presses = iter([""] * 4)

    def enter():
        for press in presses:
            return press
        raise EOFError

    monkeypatch.setattr("builtins.input", enter)
    done = run_cli("enroll", "--bundle", bundle_path, "--user", "ana", *QUICK)
    assert (done.status, done.stdout) == (2, "")
    assert "waits for Enter, and standard input has ended" in done.stderr
    folder = platform_users(Bundle.open(bundle_path)) / "ana.recordings"
    files = [path for path in sorted(empty_home.rglob("*")) if path.is_file()]
    assert files == [folder / "0000.flac", folder / "metadata.jsonl"]


@pytest.mark.parametrize("line", [b'{"file_name": "0001.fl', b"[]", b"{}", b"\xff", b"null"])
def test_a_damaged_line_of_earlier_recordings_is_named(
    run_cli, bundle_path, microphone, tmp_path, line
):
    folder = tmp_path / "out/users/ana.recordings"
    folder.mkdir(parents=True)
    whole = b'{"file_name": "0000.flac", "transcription": "hello"}\n'
    (folder / "metadata.jsonl").write_bytes(whole + line)
    where = ("--bundle", bundle_path, "--user", "ana", "--out", tmp_path / "out")
    done = run_cli("enroll", *where, *QUICK)
    assert (done.status, done.stdout, microphone.n_requests) == (2, "", 0)
    assert "metadata.jsonl, line 2 is damaged (" in done.stderr and "delete the line" in done.stderr


def test_a_recording_that_does_not_fit_leaves_the_earlier_ones(good, tmp_path, full_disk):
    """And a name stays taken if its line was removed by hand."""
    for text in ("one", "two"):
        add_recording(tmp_path, text, good[0], RATE)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with full_disk(1_000), pytest.raises(TinyAlignError, match="cannot be written"):
        add_recording(tmp_path, "three", good[0], RATE)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    first, second = before["metadata.jsonl"].splitlines(keepends=True)
    (tmp_path / "metadata.jsonl").write_bytes(second)
    add_recording(tmp_path, "one", good[0], RATE)
    rows = [json.loads(row) for row in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["0001.flac", "0002.flac"]


def test_the_curve_line_has_a_block_for_each_error():
    line = curve_line([{"held_out": error} for error in (4.0, 2.0, 0.5)])
    assert "█▄▁" in line and "4.000" in line and "0.500" in line
