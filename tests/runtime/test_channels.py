"""runtime/audio/channels.py: whatever a second channel carries, whoever speaks on the first is heard as without it."""

import numpy as np
import pytest

from tiny_align.runtime.audio.channels import mix
from tiny_align.runtime.audio.samples import read_recording

RATE = 16_000


def late(audio, seconds):
    n_samples = round(seconds * RATE)
    return np.concatenate([np.zeros(n_samples, np.float32), audio])[: len(audio)]


def hiss(audio, level):
    return level * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)


def mixed(*channels):
    return mix(np.stack(channels, axis=1).astype(np.float32), RATE)


def assert_heard_as(audio, expected):
    """The same but for its level, and for which side is up: nobody hears that."""
    similarity = np.dot(audio, expected) / np.sqrt(
        np.dot(audio, audio) * np.dot(expected, expected)
    )
    assert abs(similarity) > 0.9999


SECOND = {  # what the other channel carries -> it, and what is said of it
    "silence": (lambda a: 0 * a, "silent"),
    "a hum of its own far below": (lambda a: hiss(a, 2e-4), "silent"),
    "a constant": (lambda a: 0 * a + 0.4, "constant offset of 0.40"),
    "the same": (lambda a: a, None),
    "the same at another level": (lambda a: 0.3 * a, None),
    "the same with an offset": (lambda a: a + 0.2, "constant offset of 0.20"),
    "inverted": (lambda a: -a, "inverted"),
    "inverted at another level, with an offset": (lambda a: 0.1 - 0.5 * a, "inverted"),
    "inverted and late": (lambda a: -late(a, 0.02), "inverted and 20.0 ms late"),
    **{
        f"{ms} ms late": (lambda a, ms=ms: late(a, ms / 1000), f"{ms:.1f} ms late")
        for ms in (1, 5, 40, 200, 500)
    },
    "0.1 ms late": (lambda a: late(a, 1e-4), "0.1 ms late"),
    "late, in hiss": (lambda a: late(a, 0.01) + hiss(a, 0.01), "10.0 ms late"),
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("make", "note"), SECOND.values(), ids=SECOND)
def test_a_second_channel_changes_nothing(speech, make, note, first):
    channels = [speech, make(speech)]
    audio, notes = mixed(channels[first], channels[1 - first])
    assert_heard_as(audio, speech)
    assert (not notes) if note is None else note in " ".join(notes)


def test_two_people_on_two_channels_are_both_heard(speech):
    other = np.roll(speech[::-1], 3_000)
    audio, notes = mixed(speech, other)
    np.testing.assert_allclose(audio, (speech + other) / 2, atol=1e-6)
    assert not notes


def test_of_many_channels_those_that_agree_count(speech):
    audio, notes = mixed(speech, -speech, 0 * speech, late(speech, 0.1), speech)
    np.testing.assert_array_equal(audio, speech)
    assert len(notes) == 3 and notes[0] == "channel 2 of 5 is left out: it is channel 1, inverted"


def test_the_end_is_not_lost_with_a_late_channel_that_is_as_loud(speech):
    audio, _ = mixed(1.1 * late(speech, 0.5), speech)
    np.testing.assert_array_equal(audio, speech)


def test_one_channel_stays_as_it_is_but_for_its_offset(speech):
    np.testing.assert_array_equal(mixed(speech)[0], speech)
    audio, notes = mixed(speech + np.float32(0.3))
    np.testing.assert_allclose(audio, speech - speech.mean(), atol=1e-5)
    assert "constant offset of 0.30" in notes[0]


def test_what_was_done_is_noted_with_the_file(tmp_path, speech):
    import soundfile

    soundfile.write(tmp_path / "a.flac", np.stack([speech, -speech], axis=1), RATE)
    assert read_recording(tmp_path / "a.flac", RATE).notes == (
        f"{tmp_path / 'a.flac'}: channel 2 of 2 is left out: it is channel 1, inverted",
    )
