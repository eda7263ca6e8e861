"""runtime/audio/samples.py on real files: every rate, channel count and format is read.

Every bad input is refused in one clear sentence.
"""

import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tiny_align.runtime.audio.samples import (
    MIN_SECONDS,
    check_audio,
    read_audio,
    read_recording,
    read_segment,
)
from tiny_align.runtime.errors import AudioError

RATE = 16_000  # Hz


def tone(seconds=0.5, rate=RATE, hz=440.0, level=0.3):
    """(S,) float32."""
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def write_audio(path, audio=None, rate=RATE, **options):
    soundfile.write(path, tone(rate=rate) if audio is None else audio, rate, **options)
    return path


def set_data_size(path, size):
    """Overwrite a WAV file's data size, as a recorder that writes to a pipe leaves it."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"data") + 4, size)
    path.write_bytes(content)
    return path


def dominant_hz(audio):
    return np.argmax(np.abs(np.fft.rfft(audio))) * RATE / len(audio)


# --- reading ---


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 96_000])
def test_any_rate_is_resampled_to_the_wanted_one(tmp_path, rate):
    audio = read_audio(write_audio(tmp_path / "a.wav", rate=rate), RATE)
    assert audio.dtype == np.float32 and audio.ndim == 1 and audio.flags.c_contiguous
    assert abs(len(audio) - RATE // 2) <= 1
    assert dominant_hz(audio) == pytest.approx(440, abs=3)
    assert np.abs(audio[1000:-1000]).max() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {"subtype": "PCM_U8"}),
        ("a.wav", {"subtype": "PCM_24"}),
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.wav", {"subtype": "ULAW"}),
        ("a.wav", {"endian": "BIG"}),
        ("a.wav", {"format": "RF64"}),
        ("a.flac", {}),
        ("a.ogg", {}),
        ("a.mp3", {}),
        ("a.aiff", {}),
    ],
)
def test_formats_are_read_alike(tmp_path, name, options):
    if name.rpartition(".")[2].upper() not in soundfile.available_formats():
        pytest.skip("this libsndfile does not write it")
    audio = read_audio(write_audio(tmp_path / name, **options), RATE)
    assert abs(len(audio) - RATE // 2) < 10
    assert dominant_hz(audio) == pytest.approx(440, abs=3)


def test_samples_at_the_same_rate_are_unchanged(tmp_path):
    audio = tone()
    np.testing.assert_array_equal(
        read_audio(write_audio(tmp_path / "a.wav", audio, subtype="FLOAT"), RATE), audio
    )


def test_channels_are_averaged(tmp_path):
    left, right = tone(level=0.4), tone(level=0.1)
    path = write_audio(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    np.testing.assert_allclose(read_audio(path, RATE), (left + right) / 2, atol=1e-6)


def test_a_string_is_a_path(tmp_path):
    assert len(read_audio(str(write_audio(tmp_path / "a.wav")), RATE)) == RATE // 2


def test_the_suffix_does_not_matter(tmp_path):
    path = write_audio(tmp_path / "a.wav").rename(tmp_path / "a.txt")
    assert len(read_audio(path, RATE)) == RATE // 2


# --- segments ---


def test_a_segment_equals_that_part_of_the_whole(tmp_path):
    audio = np.concatenate([tone(0.5, hz=300), tone(0.5, hz=600), tone(0.5, hz=900)])
    path = write_audio(tmp_path / "a.flac", audio)
    np.testing.assert_array_equal(
        read_segment(path, RATE, 0.5, 1.0), read_audio(path, RATE)[8000:16000]
    )
    assert dominant_hz(read_segment(path, RATE, 1.0, None)) == pytest.approx(900, abs=3)
    assert len(read_segment(path, RATE, 0.0, None)) == len(audio)


def test_a_segment_is_resampled(tmp_path):
    path = write_audio(tmp_path / "a.wav", tone(1.0, rate=44_100), rate=44_100)
    assert len(read_segment(path, RATE, 0.25, 0.75)) == RATE // 2


def test_only_the_segment_is_read(tmp_path):
    audio = tone(2.0)
    audio[RATE:] = np.nan
    path = write_audio(tmp_path / "a.wav", audio, subtype="FLOAT")
    assert len(read_segment(path, RATE, 0.0, 0.5)) == RATE // 2
    with pytest.raises(AudioError, match="NaN"):
        read_audio(path, RATE)


def test_an_end_rounded_past_the_file_is_its_end(tmp_path):
    path = write_audio(tmp_path / "a.wav", tone(1.0))
    assert len(read_segment(path, RATE, 0.5, 1.02)) == RATE // 2


@pytest.mark.parametrize(
    ("start_s", "end_s", "message"),
    [
        (0.8, 0.2, "expected 0 <= start < end"),
        (0.2, 0.2, "expected 0 <= start < end"),
        (-0.1, 0.2, "expected 0 <= start < end"),
        (float("nan"), 0.2, "expected 0 <= start < end"),
        (1.0, 1.2, "reaches past the end"),
        (0.0, 9.0, "reaches past the end, the file lasts 1.00 s"),
        (0.5, 0.55, "expected at least 0.1 s"),
    ],
)
def test_an_impossible_segment_is_refused(tmp_path, start_s, end_s, message):
    path = write_audio(tmp_path / "a.wav", tone(1.0))
    with pytest.raises(AudioError, match=message):
        read_segment(path, RATE, start_s, end_s)


def test_a_silent_segment_is_refused_by_its_marks(tmp_path):
    path = write_audio(
        tmp_path / "a.wav", np.concatenate([tone(0.5), np.zeros(RATE // 2, np.float32)])
    )
    with pytest.raises(AudioError, match=r"a\.wav \[0\.5 s to 1\.0 s\]: nothing was heard"):
        read_segment(path, RATE, 0.5, 1.0)


# --- pipes ---


def pipe_with(path, content):
    """A named pipe into which the bytes are write_audio."""
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=[content], daemon=True).start()
    return path


def test_a_pipe_is_read_like_the_file(tmp_path):
    for name in ("a.wav", "a.flac", "a.ogg", "a.mp3"):
        path = write_audio(tmp_path / name)
        pipe = pipe_with(tmp_path / f"pipe-{name}", path.read_bytes())
        np.testing.assert_array_equal(read_audio(pipe, RATE), read_audio(path, RATE))


def test_a_pipe_with_a_cut_or_empty_file_is_refused(tmp_path):
    content = write_audio(tmp_path / "a.wav").read_bytes()
    with pytest.raises(AudioError, match="is cut off"):
        read_audio(pipe_with(tmp_path / "half", content[:9_000]), RATE)
    with pytest.raises(AudioError, match="is an empty file"):
        read_audio(pipe_with(tmp_path / "nothing", b""), RATE)


@pytest.mark.parametrize("size", [None, 0, 0xFFFF_FFFF])
def test_standard_input_is_read(tmp_path, monkeypatch, size):
    path = write_audio(tmp_path / "a.wav")
    whole = read_audio(path, RATE)
    path = path if size is None else set_data_size(path, size)
    monkeypatch.setattr(sys, "stdin", path.open())
    np.testing.assert_array_equal(read_audio("-", RATE), whole)
    with pytest.raises(AudioError, match=r"standard input: is an empty file \(0 bytes\)"):
        read_audio("-", RATE)  # nothing is left


def test_a_closed_standard_input_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(AudioError, match="standard input: is closed"):
        read_audio("-", RATE)


# --- bad files ---


@pytest.mark.parametrize(
    "read", [read_audio, lambda path, rate: read_segment(path, rate, 0.0, 0.2)]
)
def test_absent_files_folders_and_empty_files_are_refused(tmp_path, read):
    with pytest.raises(AudioError, match="no such file"):
        read(tmp_path / "absent.wav", RATE)
    with pytest.raises(AudioError, match="is a folder"):
        read(tmp_path, RATE)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty file \(0 bytes\)"):
        read(tmp_path / "empty.wav", RATE)


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = write_audio(tmp_path / "a.wav")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(AudioError, match=r"a\.wav: may not be read"):
        read_audio(path, RATE)


def test_impossible_paths_and_devices_are_refused(tmp_path):
    for path in (tmp_path / "a.wav" / "b.wav", tmp_path / ("a" * 300), "a\0b", "/dev/zero"):
        with pytest.raises(AudioError, match=r"no such file|cannot be read|is a device"):
            read_audio(path, RATE)


@pytest.mark.parametrize("rate", [1, 3_999, 1_000_000])
def test_a_rate_out_of_range_is_refused(tmp_path, rate):
    with pytest.raises(AudioError, match=f"its header says {rate} Hz, expected 4000 to 768000 Hz"):
        read_audio(write_audio(tmp_path / "a.wav", tone(), rate=rate), RATE)


@pytest.mark.parametrize("name", ["a.wav", "a.txt", "a.raw", "a.mp3"])
def test_a_file_that_is_not_audio_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"What is the weather like?\n" * 100)
    with pytest.raises(AudioError, match="expected WAV, FLAC, OGG or MP3"):
        read_audio(tmp_path / name, RATE)


@pytest.mark.parametrize("n_bytes", [4, 11, 20, 36, 43, 44])
def test_a_wav_cut_off_in_its_header_is_refused(tmp_path, n_bytes):
    path = write_audio(tmp_path / "a.wav")
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(AudioError, match="is cut off"):
        read_audio(path, RATE)


@pytest.mark.parametrize("endian", ["LITTLE", "BIG"])
def test_a_truncated_wav_is_refused(tmp_path, endian):
    path = write_audio(tmp_path / "a.wav", endian=endian)
    path.write_bytes(path.read_bytes()[:-1000])
    for read in (read_audio, lambda path, rate: read_segment(path, rate, 0.0, 0.2)):
        with pytest.raises(AudioError, match="promises 16000 bytes of samples and 15000 are there"):
            read(path, RATE)


def test_a_truncated_wav_with_other_chunks_before_its_data_is_refused(tmp_path):
    path = write_audio(tmp_path / "a.wav")
    content = path.read_bytes()
    at = content.index(b"data")
    path.write_bytes(
        content[:at] + b"LIST" + struct.pack("<I", 5) + b"data\0\0" + content[at:-1]
    )  # odd size: padded
    with pytest.raises(AudioError, match="promises 16000 bytes of samples and 15999 are there"):
        read_audio(path, RATE)


def test_a_truncated_flac_is_refused(tmp_path):
    path = write_audio(tmp_path / "a.flac", tone(2.0))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(AudioError, match="cut off"):
        read_audio(path, RATE)


def test_a_flac_of_unknown_length_is_read_with_a_note(tmp_path):
    path = write_audio(tmp_path / "a.flac")
    whole, content = read_audio(path, RATE), bytearray(path.read_bytes())
    content[21] &= 0xF0  # STREAMINFO's 36 bits of total samples
    content[22:26] = bytes(4)
    path.write_bytes(content)
    recording = read_recording(path, RATE)
    np.testing.assert_array_equal(recording.samples, whole)
    assert "does not say how long it is" in recording.notes[0]
    path.write_bytes(content[:-1])
    with pytest.raises(AudioError, match="cut off"):
        read_audio(path, RATE)


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x8000_0000, 0x7FFF_FFDB])
def test_a_streamed_wav_is_read_to_its_end(tmp_path, size):
    path = write_audio(tmp_path / "a.wav")
    whole = read_audio(path, RATE)
    np.testing.assert_array_equal(read_audio(set_data_size(path, size), RATE), whole)
    np.testing.assert_array_equal(read_segment(path, RATE, 0.1, 0.3), whole[1600:4800])


def test_a_streamed_wav_that_begins_with_silence_is_read_to_its_end(tmp_path):
    audio = np.concatenate([np.zeros(RATE, np.float32), tone()])
    assert len(read_audio(set_data_size(write_audio(tmp_path / "a.wav", audio), 0), RATE)) == len(
        audio
    )


def test_a_wav_without_samples_is_refused(tmp_path):
    path = write_audio(tmp_path / "a.wav", np.zeros(0, np.float32))
    with pytest.raises(AudioError, match="is empty"):
        read_audio(path, RATE)
    path.write_bytes(path.read_bytes() + b"LIST" + struct.pack("<I", 4) + b"INFO")
    with pytest.raises(AudioError, match="is empty"):
        read_audio(path, RATE)


# --- checks, on files and arrays ---


def test_files_with_bad_samples_are_refused(tmp_path):
    with pytest.raises(AudioError, match=r"0\.050 s, expected at least 0\.1 s"):
        read_audio(write_audio(tmp_path / "short.wav", tone(0.05)), RATE)
    with pytest.raises(AudioError, match="nothing was heard"):
        read_audio(write_audio(tmp_path / "silent.wav", np.zeros(RATE, np.float32)), RATE)
    with pytest.raises(AudioError, match="NaN"):
        read_audio(
            write_audio(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), subtype="FLOAT"),
            RATE,
        )
    with pytest.raises(AudioError, match="NaN or infinite"):
        read_audio(
            write_audio(
                tmp_path / "inf.wav", np.full((RATE, 2), np.inf, np.float32), subtype="FLOAT"
            ),
            RATE,
        )
    with pytest.raises(AudioError, match=r"1\.00 s, expected at most 0\.5 s"):
        read_audio(write_audio(tmp_path / "long.wav", tone(1.0)), RATE, max_s=0.5)


def test_a_long_file_is_refused_before_it_is_decoded(tmp_path):
    path = write_audio(tmp_path / "a.wav", np.full(RATE, np.nan, np.float32), subtype="FLOAT")
    with pytest.raises(AudioError, match="expected at most"):
        read_audio(path, RATE, max_s=0.5)
    with pytest.raises(AudioError, match="expected at most"):
        read_segment(path, RATE, 0.1, 0.9, max_s=0.5)


def test_good_arrays_pass():
    check_audio(tone(), RATE, "microphone", max_s=0.5)
    check_audio(tone(MIN_SECONDS), RATE, "microphone")
    check_audio(tone(level=1.2), RATE, "a little over")
    check_audio(np.stack([tone(), tone()], axis=1)[:, 0], RATE, "a strided view")


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([0.1] * RATE, "got list.*np.asarray"),
        (None, "got NoneType"),
        ((tone() * 32767).astype(np.int16), "got int16 samples.*divide by 32768 as float32"),
        (tone().astype(np.float64), r"got float64 samples.*astype\(np.float32\)"),
        (np.stack([tone(), tone()], axis=1), r"got shape \(8000, 2\).*average the channels"),
        (np.float32(0.5) * np.ones((), np.float32), "float32"),
        (np.zeros(0, np.float32), "is empty"),
        (np.append(tone(), np.float32(np.nan)), "NaN or infinite"),
        (np.append(tone(), np.float32(np.inf)), "NaN or infinite"),
        (tone(0.09), "lasts 0.090 s, expected at least 0.1 s"),
        (tone(1.01), "lasts 1.01 s, expected at most 1 s"),
        (np.zeros(RATE, np.float32), "nothing was heard.*-inf dBFS"),
        (tone(level=0.001), "nothing was heard.*-63 dBFS.*-60"),
        (
            tone(level=0.0001) + np.float32(0.1),
            "nothing was heard",
        ),  # a constant offset is not sound
        (tone() * 32768, r"samples reach 9830, expected \[-1, 1\]; divide"),
    ],
)
def test_a_bad_array_is_refused(audio, message):
    with pytest.raises(AudioError, match=f"microphone: .*{message}"):
        check_audio(audio, RATE, "microphone", max_s=1.0)


def test_25_ms_of_sound_are_enough():
    audio = np.zeros(RATE, np.float32)
    audio[8000:8400] = tone(0.025)
    check_audio(audio, RATE, "microphone")
    check_audio(tone(level=0.002), RATE, "quiet: -57 dBFS")


def test_checking_changes_nothing():
    audio = tone() + np.float32(0.1)
    before = audio.copy()
    check_audio(audio, RATE, "microphone")
    np.testing.assert_array_equal(audio, before)


def test_reading_audio_loads_no_torch():
    code = (
        "import sys, tiny_align.runtime.audio.samples;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
