"""runtime/audio/levels.py: clipped and quiet recordings are noted with their figures."""

import io
import json

import numpy as np
import pytest
import soundfile

from tiny_align.runtime.audio.levels import clipped_share, measure, notes
from tiny_align.runtime.audio.samples import read_recording

RATE = 16_000


def clipped(audio, db):
    """Raised to `db` above full scale, and clipped there."""
    return np.clip(audio / np.abs(audio).max() * 10 ** (db / 20), -1, 1).astype(np.float32)


@pytest.mark.parametrize("gain", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("db", [3, 12, 20])
def test_a_clipped_recording_is_noted_after_a_change_of_gain_too(speech, db, gain):
    loud = clipped(speech, db)
    [note] = notes(gain * loud, RATE)
    share = float((np.abs(loud) == 1).mean())
    assert note.startswith("clipped: ")
    assert float(note.split()[1].rstrip("%")) / 100 == pytest.approx(share, rel=0.3)
    assert ("at full scale" in note) == (gain == 1.0) and ("cut flat at" in note) == (gain != 1.0)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_clipped_file_is_noted(tmp_path, speech, subtype):
    soundfile.write(tmp_path / "a.wav", clipped(speech, 12), RATE, subtype=subtype)
    [note] = read_recording(tmp_path / "a.wav", RATE).notes
    assert "clipped: " in note and "% of the samples are at full scale" in note


def test_a_clipped_recording_at_another_rate_or_from_a_lossy_codec_is_noted(tmp_path, speech):
    for name in ("a.ogg", "a.mp3", "a.wav"):
        soundfile.write(tmp_path / name, clipped(speech, 12), RATE)
        assert "clipped" in read_recording(tmp_path / name, 8_000).notes[0]


@pytest.mark.parametrize(
    "subtype", ["PCM_U8", "PCM_16", "ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610", "FLOAT"]
)
@pytest.mark.parametrize("peak", [0.99, 0.3, 0.1])
def test_a_codec_does_not_count_as_clipping(speech, subtype, peak):
    file = io.BytesIO()
    soundfile.write(file, peak * speech / np.abs(speech).max(), RATE, format="WAV", subtype=subtype)
    file.seek(0)
    assert clipped_share(soundfile.read(file, dtype="float32")[0]) < 1e-3


def test_floats_beyond_full_scale_are_not_clipped(speech):
    assert clipped_share(3 * speech / np.abs(speech).max()) == 0


def test_the_shipped_recordings_have_no_note(voice_path):
    for line in (voice_path / "metadata.jsonl").read_text().splitlines()[::10]:
        assert read_recording(voice_path / json.loads(line)["file_name"], RATE).notes == ()


def test_a_quiet_recording_is_noted_whatever_silence_is_around_it(speech):
    silence = 1e-5 * np.random.default_rng(0).standard_normal(20 * RATE).astype(np.float32)
    good = np.concatenate([speech, silence])
    assert measure(good, RATE).speech_db == pytest.approx(measure(speech, RATE).speech_db, abs=0.1)
    assert not notes(good, RATE)
    [note] = notes(0.01 * good, RATE)
    assert note.startswith("too quiet: the speech is at -54") and "expected at least -40" in note
