"""runtime/audio/channels.py: the mix has the speech of one channel, whatever the second carries."""

import numpy as np
import pytest

from tiny_align.runtime.audio.channels import mix
from tiny_align.runtime.audio.samples import read_recording

RATE = 16_000


def delayed(audio, seconds):
    n_samples = round(seconds * RATE)
    return np.concatenate([np.zeros(n_samples, np.float32), audio])[: len(audio)]


def noise(audio, level):
    return level * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)


def mix_channels(*channels):
    return mix(np.stack(channels, axis=1).astype(np.float32), RATE)


def assert_same_sound(audio, expected):
    """The same but for its level and sign, which make no audible difference."""
    similarity = np.dot(audio, expected) / np.sqrt(
        np.dot(audio, audio) * np.dot(expected, expected)
    )
    assert abs(similarity) > 0.9999


SECOND = {  # what the second channel carries -> how to make it, and the note about it
    "silence": (lambda a: 0 * a, "silent"),
    "a hum of its own far below": (lambda a: noise(a, 2e-4), "silent"),
    "a constant": (lambda a: 0 * a + 0.4, "constant offset of 0.40"),
    "the same": (lambda a: a, None),
    "the same at another level": (lambda a: 0.3 * a, None),
    "the same with an offset": (lambda a: a + 0.2, "constant offset of 0.20"),
    "inverted": (lambda a: -a, "inverted"),
    "inverted at another level, with an offset": (lambda a: 0.1 - 0.5 * a, "inverted"),
    "inverted and delayed": (lambda a: -delayed(a, 0.02), "inverted and 20.0 ms late"),
    **{
        f"{ms} ms delayed": (lambda a, ms=ms: delayed(a, ms / 1000), f"{ms:.1f} ms late")
        for ms in (1, 5, 40, 200, 500)
    },
    "0.1 ms delayed": (lambda a: delayed(a, 1e-4), "0.1 ms late"),
    "delayed, in noise": (lambda a: delayed(a, 0.01) + noise(a, 0.01), "10.0 ms late"),
}


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(("make", "note"), SECOND.values(), ids=SECOND)
def test_a_second_channel_does_not_change_the_speech(speech, make, note, first):
    channels = [speech, make(speech)]
    audio, notes = mix_channels(channels[first], channels[1 - first])
    assert_same_sound(audio, speech)
    assert (not notes) if note is None else note in " ".join(notes)


def test_two_speakers_on_two_channels_are_both_mixed(speech):
    other = np.roll(speech[::-1], 3_000)
    audio, notes = mix_channels(speech, other)
    np.testing.assert_allclose(audio, (speech + other) / 2, atol=1e-6)
    assert not notes


def test_of_many_channels_only_those_that_agree_are_mixed(speech):
    audio, notes = mix_channels(speech, -speech, 0 * speech, delayed(speech, 0.1), speech)
    np.testing.assert_array_equal(audio, speech)
    assert len(notes) == 3 and notes[0] == "channel 2 of 5 is left out: it is channel 1, inverted"


def test_of_equally_loud_channels_the_earlier_is_mixed(speech):
    audio, _ = mix_channels(1.1 * delayed(speech, 0.5), speech)
    np.testing.assert_array_equal(audio, speech)


def test_one_channel_changes_by_its_offset_only(speech):
    np.testing.assert_array_equal(mix_channels(speech)[0], speech)
    audio, notes = mix_channels(speech + np.float32(0.3))
    np.testing.assert_allclose(audio, speech - speech.mean(), atol=1e-5)
    assert "constant offset of 0.30" in notes[0]


def test_a_note_begins_with_the_files_name(tmp_path, speech):
    import soundfile

    soundfile.write(tmp_path / "a.flac", np.stack([speech, -speech], axis=1), RATE)
    assert read_recording(tmp_path / "a.flac", RATE).notes == (
        f"{tmp_path / 'a.flac'}: channel 2 of 2 is left out: it is channel 1, inverted",
    )
