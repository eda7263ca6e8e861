"""Long pauses are left out, sounds never: known answers, pieces of any size, real speech."""

import numpy as np
import pytest

from tiny_align.runtime.audio.pauses import PAD_S
from tiny_align.runtime.windows import Cutter, WindowSpec, cut

RATE = 16_000
WINDOWS = WindowSpec(n_vectors=48, margin=8, vector_samples=1280, n_features=96)  # 3.84 s


def room_noise(seconds, db=-60.0, seed=0):
    rng = np.random.default_rng(seed)
    return (10 ** (db / 20) * rng.standard_normal(round(seconds * RATE))).astype(np.float32)


def voice(seconds, db=-20.0, seed=0):
    """Noise that rises and falls four times a second, as a voice does."""
    audio = room_noise(seconds, db, seed)
    return audio * (1 + np.sin(8 * np.pi * np.arange(len(audio)) / RATE)).astype(np.float32)


def shortened(audio, windows=None):
    """What remains of an utterance, its windows one after another (they do not overlap)."""
    return np.concatenate([window for window, _ in cut(audio, windows, RATE)])


def seconds(audio):
    return len(audio) / RATE


@pytest.mark.parametrize("db", [-80, -60, -45])
@pytest.mark.parametrize("length", [1, 2, 5, 12])
def test_noise_before_inside_and_after_speech_is_left_out(length, db):
    speech = [voice(1.5, seed=1), voice(1.5, seed=2)]
    before, inside, after = (room_noise(length, db, seed) for seed in (3, 4, 5))
    left = seconds(shortened(np.concatenate([before, speech[0], inside, speech[1], after])))
    assert 3 <= left < 3 + 4 * PAD_S + 0.3


@pytest.mark.parametrize("gain_db", [-45, 0, 15])
def test_the_level_does_not_matter(gain_db):
    audio = np.concatenate([room_noise(2), voice(1.5), room_noise(2)])
    assert len(shortened(audio * np.float32(10 ** (gain_db / 20)))) == len(shortened(audio))


def test_an_offset_does_not_matter():
    audio = np.concatenate([room_noise(2), voice(1.5), room_noise(2)])
    assert len(shortened(audio + np.float32(0.2))) == len(shortened(audio))


def test_digital_silence_is_left_out():
    audio = np.concatenate(
        [np.zeros(3 * RATE, np.float32), voice(1.5), np.zeros(3 * RATE, np.float32)]
    )
    assert seconds(shortened(audio)) < 1.5 + 2 * PAD_S + 0.1


@pytest.mark.parametrize("pause", [0.1, 0.4])
def test_a_short_pause_is_unchanged(pause):
    audio = np.concatenate([voice(1), room_noise(pause), voice(1)])
    assert np.array_equal(shortened(audio), audio)


def test_speech_in_loud_noise_is_unchanged():
    audio = voice(3, -20) + room_noise(3, -22, 1)
    assert np.array_equal(shortened(audio), audio)


def test_a_voice_that_gets_soft_is_unchanged():
    audio = np.concatenate([voice(1.5, -15), voice(1.5, -40, 1), room_noise(3, -75)])
    assert np.array_equal(shortened(audio)[: 3 * RATE], audio[: 3 * RATE])


@pytest.mark.parametrize("length", [0.02, 0.3, 3])
def test_noise_alone_is_unchanged(length):
    audio = room_noise(length)
    assert np.array_equal(shortened(audio), audio)


def test_minutes_of_noise_do_not_accumulate():
    cutter = Cutter(WINDOWS, RATE)
    for _ in range(60):
        assert not cutter.push(room_noise(1))
    [(window, _)] = cutter.finish()
    assert len(window) <= WINDOWS.samples


@pytest.mark.parametrize("seed", range(8))
def test_pieces_of_any_size_give_the_same_windows(seed):
    rng = np.random.default_rng(seed)
    parts = []
    for i, make in enumerate(rng.choice([room_noise, voice], 6)):
        parts.append(make(rng.uniform(0.2, 5), seed=i))
    audio = np.concatenate(parts)
    cutter = Cutter(WINDOWS, RATE)
    windows = []
    for piece in np.split(audio, np.sort(rng.integers(0, len(audio), 40))):
        windows += cutter.push(piece)
    windows += cutter.finish()
    expected = cut(audio, WINDOWS, RATE)
    for (window, vectors), (expected_window, expected_vectors) in zip(
        windows, expected, strict=True
    ):
        assert vectors == expected_vectors and np.array_equal(window, expected_window)


def test_finish_does_not_change_the_windows_that_follow():
    audio = np.concatenate([room_noise(2), voice(3), room_noise(1), voice(2)])
    watched, quiet = Cutter(WINDOWS, RATE), Cutter(WINDOWS, RATE)
    for piece in np.array_split(audio, 20):
        ours, others = watched.push(piece), quiet.push(piece)
        watched.finish()
        assert [len(window) for window, _ in ours] == [len(window) for window, _ in others]
    assert np.array_equal(watched.finish()[-1][0], quiet.finish()[-1][0])


@pytest.mark.parametrize("db", [-80, -70, -60])
@pytest.mark.parametrize("length", [0.5, 2, 2.503])
def test_noise_around_a_recording_does_not_change_what_remains(speech, db, length):
    alone = shortened(speech)
    noise = room_noise(length, db)
    amid_noise = shortened(np.concatenate([noise, speech, noise]))
    assert speech.tobytes().find(alone.tobytes()) >= 0  # its ends only are left out
    assert len(speech) - len(alone) < 0.5 * RATE
    assert abs(len(amid_noise) - len(alone)) <= 0.01 * RATE
    inner = alone[RATE // 4 : -RATE // 4]
    assert amid_noise.tobytes().find(inner.tobytes()) >= 0
