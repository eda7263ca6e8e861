"""Where speech begins and ends: known answers, chunks of any size, real speech and noise."""

import json

import numpy as np
import pytest

from tiny_align.align.data.non_speech import non_speech
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.listening.endpoint import (
    FRAME_S,
    FRAME_SAMPLES,
    SAMPLE_RATE,
    Endpointer,
    Endpointing,
    Speech,
    SpeechBegan,
    SpeechEnded,
    SpeechPaused,
)

LIMITS = Endpointing(
    min_speech_s=4 * FRAME_S,
    pre_roll_s=3 * FRAME_S,
    post_roll_s=2 * FRAME_S,
    hangover_s=10 * FRAME_S,
)
LOUD = 0.1  # level that the detector below takes for speech
SOFT = 1e-2  # and one that it does not; both pass the gate


class LoudOnly:
    """A detector with a known answer, which counts its calls."""

    def __init__(self):
        self.n_calls = 0

    def __call__(self, frame):
        self.n_calls += 1
        return float(np.sqrt((frame**2).mean()) > (LOUD + SOFT) / 2)

    def reset(self):
        self.n_calls = 0


def make_frames(*plan):
    """(level, n_frames) pairs -> noise of these levels, every sample another."""
    rng = np.random.default_rng(0)
    levels = np.concatenate([np.full(n * FRAME_SAMPLES, level) for level, n in plan])
    signs = rng.choice([-1, 1], len(levels))
    return (levels * signs * rng.uniform(0.9, 1, len(levels))).astype(np.float32)


@pytest.fixture
def detector():
    return LoudOnly()


@pytest.fixture
def endpointer(detector):
    return Endpointer(SAMPLE_RATE, LIMITS, detector)


@pytest.fixture(scope="module")
def silero():
    return Endpointer(SAMPLE_RATE)


def find_turns(endpointer, audio, cuts=()):
    """[(first sample, audio, end)] of the audio, pushed in chunks."""
    endpointer.reset()
    events = []
    for chunk in np.split(audio, cuts):
        events += endpointer.push(chunk)
    return turns(events + endpointer.flush())


def turns(events):
    """[(first sample, audio, end)] of events, which must be well formed."""
    found = []
    parts = []
    first = None
    for event in events:
        if isinstance(event, SpeechBegan):
            assert first is None
            first = event.at_sample
            parts = [event.audio]
        elif isinstance(event, Speech):
            assert first is not None
            parts.append(event.audio)
        elif isinstance(event, SpeechPaused):
            assert first is not None
        else:
            assert first is not None and isinstance(event, SpeechEnded)
            found.append((first, np.concatenate(parts), event))
            first = None
    assert first is None
    return found


def in_frames(samples):
    return samples / FRAME_SAMPLES


# --- known answers ---


def test_a_turn_is_the_speech_with_pre_roll_and_post_roll(endpointer):
    audio = make_frames((SOFT, 20), (LOUD, 12), (SOFT, 30))
    [(first, speech, ended)] = find_turns(endpointer, audio)
    assert (in_frames(first), in_frames(ended.at_sample), in_frames(ended.noticed_at_sample)) == (
        20 - 3,
        32,
        42,
    )
    assert ended.hangover_s == pytest.approx(LIMITS.hangover_s)
    assert np.array_equal(speech, audio[first : (32 + 2) * FRAME_SAMPLES])


def test_speech_at_the_very_beginning_has_no_pre_roll(endpointer):
    [(first, speech, ended)] = find_turns(endpointer, make_frames((LOUD, 12), (SOFT, 30)))
    assert first == 0 and in_frames(len(speech)) == 12 + 2 and in_frames(ended.at_sample) == 12


def test_a_turn_begins_once_the_minimum_of_speech_is_there(endpointer):
    audio = make_frames((SOFT, 20), (LOUD, 12))
    assert not endpointer.push(audio[: 24 * FRAME_SAMPLES - 1])
    [began] = endpointer.push(audio[24 * FRAME_SAMPLES - 1 : 24 * FRAME_SAMPLES])
    assert isinstance(began, SpeechBegan) and in_frames(len(began.audio)) == 3 + 4


@pytest.mark.parametrize("loud", [1, 2, 3])
def test_short_sounds_begin_no_turn(endpointer, loud):
    assert not find_turns(
        endpointer, make_frames((SOFT, 20), *[(LOUD, loud), (SOFT, 4)] * 9, (SOFT, 20))
    )


def test_a_gap_of_a_frame_does_not_delay_the_beginning(endpointer):
    [(first, _, _)] = find_turns(
        endpointer, make_frames((SOFT, 20), (LOUD, 3), (SOFT, 1), (LOUD, 12), (SOFT, 20))
    )
    assert in_frames(first) == 20 - 3


@pytest.mark.parametrize("pause", [1, 2, 3, 9])
def test_a_pause_within_the_hangover_is_part_of_the_turn(endpointer, pause):
    audio = make_frames((SOFT, 20), (LOUD, 12), (SOFT, pause), (LOUD, 6), (SOFT, 30))
    [(first, speech, ended)] = find_turns(endpointer, audio)
    assert in_frames(ended.at_sample) == 38 + pause
    assert np.array_equal(speech, audio[first : (38 + pause + 2) * FRAME_SAMPLES])


@pytest.mark.parametrize("pause", [10, 11, 12, 13, 40])
def test_a_hangover_ends_the_turn_and_turns_share_no_sample(endpointer, pause):
    audio = make_frames((SOFT, 20), (LOUD, 12), (SOFT, pause), (LOUD, 6), (SOFT, 30))
    (one, speech, _), (two, more, _) = find_turns(endpointer, audio)
    assert np.array_equal(speech, audio[one : 34 * FRAME_SAMPLES])
    assert in_frames(two) == 32 + pause - 3 >= 34
    assert np.array_equal(more, audio[two : (38 + pause + 2) * FRAME_SAMPLES])


def test_flush_ends_the_turn(endpointer):
    audio = np.concatenate([make_frames((SOFT, 20), (LOUD, 12)), make_frames((LOUD, 1))[:100]])
    [(first, speech, ended)] = find_turns(endpointer, audio)
    assert np.array_equal(speech, audio[first:]) and in_frames(ended.at_sample) == 32
    [(first, speech, _)] = find_turns(endpointer, make_frames((SOFT, 20), (LOUD, 12), (SOFT, 7)))
    assert in_frames(len(speech)) == 3 + 12 + 2


def test_below_the_gate_the_detector_is_not_asked(endpointer, detector):
    audio = make_frames((LOUD, 60)) * 10 ** (-60 / 20)  # -80 dBFS
    assert not find_turns(endpointer, audio) and detector.n_calls == 0
    assert endpointer.level_db == pytest.approx(-80, abs=1)
    assert not find_turns(
        endpointer, np.full(60 * FRAME_SAMPLES, 0.5, np.float32)
    )  # an offset is no sound


def test_silence_does_not_accumulate(endpointer):
    endpointer.reset()
    for _ in range(200):
        endpointer.push(
            make_frames((LOUD, 2), (SOFT, 1), (LOUD, 1), (SOFT, 1), (LOUD, 1), (SOFT, 3))
        )
    assert (
        len(endpointer._recent) <= 3 + 2 * 4 and not endpointer._paused and not endpointer.speaking
    )


# --- what cannot be find_turns ---


def test_a_rate_other_than_the_detectors_is_refused():
    with pytest.raises(AudioError, match="16000 Hz only and the bundle's encoder takes 8000 Hz"):
        Endpointer(8_000, detector=LoudOnly())


@pytest.mark.parametrize(
    "chunk", [[0.0], np.zeros(9), np.zeros((9, 1), np.float32), np.array([0, np.nan], np.float32)]
)
def test_a_chunk_that_is_no_audio_is_refused(endpointer, chunk):
    with pytest.raises(AudioError):
        endpointer.push(chunk)


# --- speech ---


@pytest.fixture(scope="module")
def recordings(voice_path):
    rows = [json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()]
    return [read_audio(voice_path / row["file_name"], SAMPLE_RATE) for row in rows[::20]]


def room_noise(seconds, rng):
    """A quiet room_noise."""
    return (2e-3 * rng.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def test_each_recording_is_one_turn_with_hardly_any_silence(silero, recordings):
    rng = np.random.default_rng(0)
    parts = []
    for recording in recordings:
        parts += [room_noise(rng.uniform(1.2, 3), rng), recording]
    audio = np.concatenate([*parts, room_noise(2, rng)])
    starts = np.cumsum([0, *map(len, parts)])[1::2]
    found = find_turns(silero, audio)
    assert len(found) == len(recordings)
    for (first, speech, ended), start, recording in zip(found, starts, recordings):
        assert (
            start - 0.5 * SAMPLE_RATE < first < start + 0.5 * SAMPLE_RATE
        )  # a recording begins with silence too
        assert abs(ended.at_sample - (start + len(recording))) < 0.5 * SAMPLE_RATE
        assert ended.hangover_s == pytest.approx(Endpointing().hangover_s, abs=FRAME_S)
        assert np.array_equal(speech, audio[first : first + len(speech)])


@pytest.mark.parametrize("gain_db", [-42, -30, -15, 0])  # to an RMS of -57 dBFS
def test_a_quiet_microphone_gives_the_turns_of_a_loud_one(silero, recordings, gain_db):
    rng = np.random.default_rng(0)
    parts = []
    for recording in recordings:
        parts += [recording, 0.1 * room_noise(2, rng)]
    audio = np.concatenate(parts)
    loud = [(first, len(speech)) for first, speech, _ in find_turns(silero, audio)]
    quiet = find_turns(silero, audio * np.float32(10 ** (gain_db / 20)))
    assert len(loud) == len(recordings)
    for (first, length), (start, speech, _) in zip(loud, quiet, strict=True):
        assert (
            abs(first - start) < 0.3 * SAMPLE_RATE and abs(length - len(speech)) < 0.5 * SAMPLE_RATE
        )


def test_quiet_speech_after_a_bang_is_found(silero, recordings):
    quiet, bang = recordings[0] * 0.02, np.float32(0.9) * np.sign(recordings[0][:1600])
    audio = np.concatenate([bang, np.zeros(4 * SAMPLE_RATE, np.float32), quiet])
    assert any(first > 2 * SAMPLE_RATE for first, _, _ in find_turns(silero, audio))


@pytest.mark.parametrize("max_chunk", [40, 700, 50_000])
def test_chunks_of_any_size_give_the_same_turns(silero, recordings, max_chunk):
    rng = np.random.default_rng(max_chunk)
    audio = np.concatenate(
        [room_noise(1, rng), recordings[0], room_noise(1.5, rng), recordings[1][:20_001]]
    )
    cuts = np.cumsum(rng.integers(0, max_chunk, 2 * len(audio) // max_chunk))
    whole, cut = find_turns(silero, audio), find_turns(silero, audio, cuts[cuts < len(audio)])
    assert len(whole) == len(cut) == 2
    for (first, speech, ended), (other_first, other, other_ended) in zip(whole, cut):
        assert (first, ended) == (other_first, other_ended) and np.array_equal(speech, other)


def test_noise_rarely_begins_a_turn(silero):
    """In the rest the projector finds no word (test_listen.py)."""
    n_turns = 0
    for seed in range(20):
        clip = non_speech(np.random.default_rng(seed), SAMPLE_RATE)
        n_turns += len(find_turns(silero, clip))
    assert n_turns < 6


def test_a_pause_gives_one_event_before_the_end():
    sound, quiet = (level * np.ones(FRAME_SAMPLES * 40, np.float32) for level in (0.3, 0.0))
    sound[::2] *= -1
    endpointer = Endpointer(SAMPLE_RATE, detector=LoudOnly())
    events = endpointer.push(np.concatenate([sound, quiet, sound, quiet]))
    kinds = [type(event) for event in events if not isinstance(event, Speech)]
    assert kinds == [SpeechBegan, SpeechPaused, SpeechEnded] * 2
