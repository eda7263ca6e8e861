"""Where speech begins and ends: against known answers, whatever the chunks, and on real speech and noise."""

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
LOUD, SOFT = 0.1, 1e-2  # a detector that hears the one only; the gate lets both pass


class LoudOnly:
    """A detector with a known answer; counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self, frame):
        self.asked += 1
        return float(np.sqrt((frame**2).mean()) > (LOUD + SOFT) / 2)

    def reset(self):
        self.asked = 0


def frames(*plan):
    """(level, n_frames) pairs -> noise of these levels; every sample differs, so that equal audio is the same audio."""
    rng = np.random.default_rng(0)
    levels = np.concatenate([np.full(n * FRAME_SAMPLES, level) for level, n in plan])
    return (levels * rng.choice([-1, 1], len(levels)) * rng.uniform(0.9, 1, len(levels))).astype(
        np.float32
    )


@pytest.fixture
def endpointer():
    return Endpointer(SAMPLE_RATE, LIMITS, LoudOnly())


@pytest.fixture(scope="module")
def silero():
    return Endpointer(SAMPLE_RATE)


def heard(endpointer, audio, cuts=()):
    endpointer.reset()
    events = [
        e for chunk in np.split(audio, cuts) for e in endpointer.push(chunk)
    ] + endpointer.flush()
    return turns(events)


def turns(events):
    """[(first sample, audio, end)] of a sequence of events that is well formed."""
    found, parts, first = [], [], None
    for event in events:
        if isinstance(event, SpeechBegan):
            assert first is None
            first, parts = event.at_sample, [event.audio]
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


def at(samples):
    return samples / FRAME_SAMPLES


# --- known answers ---


def test_a_turn_is_the_speech_with_a_little_before_and_after(endpointer):
    audio = frames((SOFT, 20), (LOUD, 12), (SOFT, 30))
    [(first, speech, ended)] = heard(endpointer, audio)
    assert (at(first), at(ended.at_sample), at(ended.noticed_at_sample)) == (20 - 3, 32, 42)
    assert ended.hangover_s == pytest.approx(LIMITS.hangover_s)
    assert np.array_equal(speech, audio[first : (32 + 2) * FRAME_SAMPLES])


def test_speech_at_the_very_beginning_has_no_pre_roll(endpointer):
    [(first, speech, ended)] = heard(endpointer, frames((LOUD, 12), (SOFT, 30)))
    assert first == 0 and at(len(speech)) == 12 + 2 and at(ended.at_sample) == 12


def test_the_first_event_comes_with_the_least_speech(endpointer):
    audio = frames((SOFT, 20), (LOUD, 12))
    assert not endpointer.push(audio[: 24 * FRAME_SAMPLES - 1])
    [began] = endpointer.push(audio[24 * FRAME_SAMPLES - 1 : 24 * FRAME_SAMPLES])
    assert isinstance(began, SpeechBegan) and at(len(began.audio)) == 3 + 4


@pytest.mark.parametrize("loud", [1, 2, 3])
def test_a_short_sound_is_no_speech(endpointer, loud):
    assert not heard(endpointer, frames((SOFT, 20), *[(LOUD, loud), (SOFT, 4)] * 9, (SOFT, 20)))


def test_a_beginning_may_have_a_gap(endpointer):
    [(first, _, _)] = heard(
        endpointer, frames((SOFT, 20), (LOUD, 3), (SOFT, 1), (LOUD, 12), (SOFT, 20))
    )
    assert at(first) == 20 - 3


@pytest.mark.parametrize("pause", [1, 2, 3, 9])
def test_a_pause_belongs_to_the_turn_and_is_whole(endpointer, pause):
    audio = frames((SOFT, 20), (LOUD, 12), (SOFT, pause), (LOUD, 6), (SOFT, 30))
    [(first, speech, ended)] = heard(endpointer, audio)
    assert at(ended.at_sample) == 38 + pause
    assert np.array_equal(speech, audio[first : (38 + pause + 2) * FRAME_SAMPLES])


@pytest.mark.parametrize("pause", [10, 11, 12, 13, 40])
def test_a_hangover_ends_the_turn_and_no_sample_is_in_two(endpointer, pause):
    audio = frames((SOFT, 20), (LOUD, 12), (SOFT, pause), (LOUD, 6), (SOFT, 30))
    (one, speech, _), (two, more, _) = heard(endpointer, audio)
    assert np.array_equal(speech, audio[one : 34 * FRAME_SAMPLES])
    assert at(two) == 32 + pause - 3 >= 34
    assert np.array_equal(more, audio[two : (38 + pause + 2) * FRAME_SAMPLES])


def test_a_stream_that_ends_ends_the_turn(endpointer):
    audio = np.concatenate([frames((SOFT, 20), (LOUD, 12)), frames((LOUD, 1))[:100]])
    [(first, speech, ended)] = heard(endpointer, audio)
    assert np.array_equal(speech, audio[first:]) and at(ended.at_sample) == 32
    [(first, speech, _)] = heard(endpointer, frames((SOFT, 20), (LOUD, 12), (SOFT, 7)))
    assert at(len(speech)) == 3 + 12 + 2


def test_below_the_gate_the_detector_is_not_asked(endpointer):
    audio = frames((LOUD, 60)) * 10 ** (-60 / 20)  # -80 dBFS
    assert not heard(endpointer, audio) and endpointer._detector.asked == 0
    assert endpointer.level_db == pytest.approx(-80, abs=1)
    assert not heard(
        endpointer, np.full(60 * FRAME_SAMPLES, 0.5, np.float32)
    )  # an offset is no sound


def test_nothing_grows_while_nobody_speaks(endpointer):
    endpointer.reset()
    for _ in range(200):
        endpointer.push(frames((LOUD, 2), (SOFT, 1), (LOUD, 1), (SOFT, 1), (LOUD, 1), (SOFT, 3)))
    assert len(endpointer._recent) <= 3 + 2 * 4 and not endpointer._held and not endpointer.speaking


# --- what cannot be heard ---


def test_another_rate_is_refused():
    with pytest.raises(AudioError, match="16000 Hz only and the bundle's encoder hears 8000 Hz"):
        Endpointer(8_000, detector=LoudOnly())


@pytest.mark.parametrize(
    "chunk", [[0.0], np.zeros(9), np.zeros((9, 1), np.float32), np.array([0, np.nan], np.float32)]
)
def test_what_is_no_audio_is_refused(endpointer, chunk):
    with pytest.raises(AudioError):
        endpointer.push(chunk)


# --- speech ---


@pytest.fixture(scope="module")
def recordings(voice_path):
    rows = [json.loads(line) for line in (voice_path / "metadata.jsonl").read_text().splitlines()]
    return [read_audio(voice_path / row["file_name"], SAMPLE_RATE) for row in rows[::20]]


def room(seconds, rng):
    """A quiet room."""
    return (2e-3 * rng.standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def test_each_recording_is_one_turn_and_hardly_any_silence_is_passed_on(silero, recordings):
    rng = np.random.default_rng(0)
    parts = [
        part for recording in recordings for part in (room(rng.uniform(1.2, 3), rng), recording)
    ]
    audio = np.concatenate([*parts, room(2, rng)])
    starts = np.cumsum([0, *map(len, parts)])[1::2]
    found = heard(silero, audio)
    assert len(found) == len(recordings)
    for (first, speech, ended), start, recording in zip(found, starts, recordings):
        assert (
            start - 0.5 * SAMPLE_RATE < first < start + 0.5 * SAMPLE_RATE
        )  # a recording begins with silence too
        assert abs(ended.at_sample - (start + len(recording))) < 0.5 * SAMPLE_RATE
        assert ended.hangover_s == pytest.approx(Endpointing().hangover_s, abs=FRAME_S)
        assert np.array_equal(speech, audio[first : first + len(speech)])


@pytest.mark.parametrize("gain_db", [-42, -30, -15, 0])  # to an RMS of -57 dBFS
def test_a_quiet_microphone_is_heard_as_a_loud_one(silero, recordings, gain_db):
    rng = np.random.default_rng(0)
    audio = np.concatenate(
        [part for recording in recordings for part in (recording, 0.1 * room(2, rng))]
    )
    loud = [(first, len(speech)) for first, speech, _ in heard(silero, audio)]
    quiet = heard(silero, audio * np.float32(10 ** (gain_db / 20)))
    assert len(loud) == len(recordings)
    for (first, length), (start, speech, _) in zip(loud, quiet, strict=True):
        assert (
            abs(first - start) < 0.3 * SAMPLE_RATE and abs(length - len(speech)) < 0.5 * SAMPLE_RATE
        )


def test_speech_after_a_bang_is_heard(silero, recordings):
    quiet, bang = recordings[0] * 0.02, np.float32(0.9) * np.sign(recordings[0][:1600])
    audio = np.concatenate([bang, np.zeros(4 * SAMPLE_RATE, np.float32), quiet])
    assert any(first > 2 * SAMPLE_RATE for first, _, _ in heard(silero, audio))


@pytest.mark.parametrize("largest", [40, 700, 50_000])
def test_how_the_audio_is_cut_changes_nothing(silero, recordings, largest):
    rng = np.random.default_rng(largest)
    audio = np.concatenate([room(1, rng), recordings[0], room(1.5, rng), recordings[1][:20_001]])
    cuts = np.cumsum(rng.integers(0, largest, 2 * len(audio) // largest))
    whole, cut = heard(silero, audio), heard(silero, audio, cuts[cuts < len(audio)])
    assert len(whole) == len(cut) == 2
    for (first, speech, ended), (other_first, other, other_ended) in zip(whole, cut):
        assert (first, ended) == (other_first, other_ended) and np.array_equal(speech, other)


def test_noise_hardly_ever_begins_a_turn(silero):
    """What does is refused by the projector (test_listen.py)."""
    clips = [non_speech(np.random.default_rng(seed), SAMPLE_RATE) for seed in range(20)]
    assert len([turn for clip in clips for turn in heard(silero, clip)]) < 6


def test_a_pause_is_told_once_before_its_end_is():
    sound, quiet = (level * np.ones(FRAME_SAMPLES * 40, np.float32) for level in (0.3, 0.0))
    sound[::2] *= -1
    endpointer = Endpointer(SAMPLE_RATE, detector=LoudOnly())
    events = endpointer.push(np.concatenate([sound, quiet, sound, quiet]))
    kinds = [type(event) for event in events if not isinstance(event, Speech)]
    assert kinds == [SpeechBegan, SpeechPaused, SpeechEnded] * 2
