"""Every container and codec that libsndfile writes: a whole file is read, a cut one refused.

If a format cannot tell whether its end is missing, that is noted.
"""

import io
import struct
import sys

import numpy as np
import pytest
import soundfile

from tiny_align.runtime.audio import streams
from tiny_align.runtime.audio.samples import read_audio, read_recording, read_segment
from tiny_align.runtime.errors import AudioError

RATE = 16_000  # Hz
NOISE = 0.1 * np.random.default_rng(0).standard_normal(4_800).astype(np.float32)
# no length in their headers: that their end is missing cannot be noticed
WITHOUT_LENGTH = {"IRCAM", "PAF", "PVF", "XI"}
WITHOUT_HEADER = {"RAW", "SD2"}  # SD2 keeps its header in another file
NOTE = "does not say how long it is"


def encoded(format_, subtype, audio=NOISE, rate=RATE, **options):
    """A file's bytes."""
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=format_, subtype=subtype, **options)
    return file.getvalue()


def can_be_written(format_, subtype, n_channels=1):
    """Whether this libsndfile writes it."""
    try:
        return bool(encoded(format_, subtype, np.zeros((RATE // 100, n_channels))))
    except soundfile.SoundFileError:
        return False


KINDS = [
    (format_, subtype)
    for format_ in soundfile.available_formats()
    if format_ not in WITHOUT_HEADER
    for subtype in soundfile.available_subtypes(format_)
    if can_be_written(format_, subtype)
]
STEREO = [kind for kind in KINDS if can_be_written(*kind, n_channels=2)]


def cut_lengths(size: int) -> list[int]:
    """Lengths to cut a file to: in and after its header, anywhere, and by its last bytes."""
    anywhere = np.random.default_rng(size).integers(1, size, 8).tolist()
    return sorted({1, 10, 21, 44, 60, size // 3, size // 2, *anywhere, *range(size - 5, size)})


def write_part(path, content, n_bytes):
    path.write_bytes(content[:n_bytes])
    return path


@pytest.mark.parametrize(
    ("format_", "subtype", "n_channels"),
    [*((*kind, 1) for kind in KINDS), *((*kind, 2) for kind in STEREO)],
)
def test_a_cut_file_is_refused_or_has_all_its_samples(tmp_path, format_, subtype, n_channels):
    content = encoded(format_, subtype, np.stack([NOISE] * n_channels, axis=1))
    path = tmp_path / "a"
    whole = read_recording(write_part(path, content, None), RATE)
    has_length = format_ not in WITHOUT_LENGTH
    assert has_length == (NOTE not in "".join(whole.notes))
    for n_bytes in cut_lengths(len(content)):
        try:
            recording = read_recording(write_part(path, content, n_bytes), RATE)
        except AudioError as error:
            assert str(error).startswith(f"{path}: ")
            continue
        if has_length:
            np.testing.assert_array_equal(
                recording.samples, whole.samples, f"cut to {n_bytes} bytes"
            )
        assert recording.notes == whole.notes


@pytest.mark.parametrize(("format_", "subtype"), KINDS)
def test_a_segment_equals_that_part_of_the_whole(tmp_path, format_, subtype):
    path = write_part(tmp_path / "a", encoded(format_, subtype), None)
    rate = soundfile.info(path).samplerate
    segment = read_segment(path, rate, 100 / rate, 4_700 / rate)
    tolerance = 1e-3 if format_ in ("MP3", "OGG") else 0.0  # their decoders run in
    np.testing.assert_allclose(segment, read_audio(path, rate)[100:4_700], atol=tolerance)


@pytest.mark.parametrize(
    ("format_", "subtype"), [("FLAC", None), ("OGG", None), ("WAV", "GSM610"), ("AIFF", None)]
)
def test_a_segment_of_a_file_cut_off_after_it_is_refused(tmp_path, format_, subtype):
    content = encoded(format_, subtype, np.tile(NOISE, 5))
    with pytest.raises(AudioError, match="cut off"):
        read_segment(write_part(tmp_path / "a", content, -1_000), RATE, 0.0, 0.2)


def test_a_wav_of_gsm_has_as_many_samples_as_were_written(tmp_path):
    audio = NOISE[:4_160]  # 13 blocks: an odd number of bytes, to be filled up
    content = encoded("WAV", "GSM610", audio)
    assert len(read_audio(write_part(tmp_path / "a", content, None), RATE)) == len(audio)


def test_gsm_without_a_header_is_recognised_by_its_frames(tmp_path):
    content = encoded("RAW", "GSM610", rate=8_000)
    recording = read_recording(write_part(tmp_path / "a.gsm", content, None), 8_000)
    assert len(recording.samples) == len(NOISE) and NOTE in recording.notes[0]
    with pytest.raises(AudioError, match="its last frame is incomplete"):
        read_audio(write_part(tmp_path / "a.gsm", content, -1), 8_000)


# --- lengths that were left open ---


def overwrite(content, mark, after, size):
    """The file with other bytes `after` bytes behind the beginning of a mark."""
    at = content.index(mark) + after
    return content[:at] + size + content[at + len(size) :]


@pytest.mark.parametrize("size", [b"\0", b"\xff"])
@pytest.mark.parametrize(
    ("format_", "mark", "after", "width"),
    [
        ("WAV", b"data", 4, 4),
        ("AIFF", b"SSND", 4, 4),
        ("AU", b".snd", 8, 4),
        ("CAF", b"data", 4, 8),
        ("W64", b"data", 16, 8),
        ("RF64", b"ds64", 16, 8),
    ],
)
def test_a_file_with_an_open_length_is_read_to_its_end_with_a_note(
    tmp_path, format_, mark, after, width, size
):
    endian = "BIG" if format_ == "AU" else "FILE"
    content = encoded(format_, "PCM_16", endian=endian)
    whole = read_audio(write_part(tmp_path / "a", content, None), RATE)
    recording = read_recording(
        write_part(tmp_path / "a", overwrite(content, mark, after, size * width), None), RATE
    )
    np.testing.assert_array_equal(recording.samples, whole)
    assert NOTE in recording.notes[0]


# --- around the audio ---


def id3(n_bytes):
    return b"ID3\x04\0\0" + bytes([0, 0, n_bytes >> 7, n_bytes & 127]) + bytes(n_bytes)


@pytest.mark.parametrize("format_", ["WAV", "AIFF", "FLAC", "MP3", "OGG", "W64", "CAF"])
def test_tags_in_front_do_not_change_the_samples(tmp_path, format_):
    content = encoded(format_, soundfile.default_subtype(format_))
    whole = read_audio(write_part(tmp_path / "a", content, None), RATE)
    np.testing.assert_array_equal(
        read_audio(write_part(tmp_path / "a", id3(300) + content, None), RATE), whole
    )
    np.testing.assert_array_equal(
        read_audio(write_part(tmp_path / "a", id3(9) + bytes(99) + content, None), RATE), whole
    )
    with pytest.raises(AudioError):
        read_audio(write_part(tmp_path / "a", id3(300) + content, -20), RATE)


@pytest.mark.parametrize(
    "junk", [bytes(1_001), b"TAG" + bytes(125), b"LIST\xff\xff\0\0INFO", b"some words"]
)
@pytest.mark.parametrize("format_", ["WAV", "AIFF", "MP3", "OGG", "CAF"])
def test_bytes_after_the_audio_do_not_change_the_samples(tmp_path, format_, junk):
    content = encoded(format_, soundfile.default_subtype(format_))
    whole = read_audio(write_part(tmp_path / "a", content, None), RATE)
    np.testing.assert_array_equal(
        read_audio(write_part(tmp_path / "a", content + junk, None), RATE), whole
    )


def test_an_odd_chunk_without_padding_is_read(tmp_path):
    content = encoded("WAV", "PCM_16")
    at = content.index(b"data")
    content = content[:at] + b"LIST" + struct.pack("<I", 5) + b"abcde" + content[at:]
    assert len(read_audio(write_part(tmp_path / "a", content, None), RATE)) == len(NOISE)
    with pytest.raises(AudioError, match="promises 9600 bytes of samples and 9599 are there"):
        read_audio(write_part(tmp_path / "a", content, -1), RATE)


def test_a_caf_without_its_table_of_packets_is_refused(tmp_path):
    content = overwrite(encoded("CAF", "ALAC_16"), b"pakt", 0, b"free")
    with pytest.raises(AudioError, match="its table of packets is missing"):
        read_audio(write_part(tmp_path / "a", content, None), RATE)


# --- Ogg ---


def page_offsets(content):
    return [at for at in range(len(content)) if content[at : at + 4] == b"OggS"]


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_chain_is_read_to_its_end(tmp_path, subtype):
    one = encoded("OGG", subtype)
    two = encoded("OGG", subtype, NOISE[::-1])
    first = read_audio(write_part(tmp_path / "a", one, None), RATE)
    second = read_audio(write_part(tmp_path / "a", two, None), RATE)
    both = np.concatenate([first, second])
    path = write_part(tmp_path / "a", one + two, None)
    np.testing.assert_array_equal(read_audio(path, RATE), both)
    segment = read_segment(path, RATE, 4_000 / RATE, 6_000 / RATE)
    np.testing.assert_allclose(segment, both[4_000:6_000], atol=1e-3)
    for broken in (one + two[:-1], one[:-1] + two, one[: page_offsets(one)[-1]] + two):
        with pytest.raises(AudioError, match=r"cut off|damaged"):
            read_audio(write_part(tmp_path / "a", broken, None), RATE)


def test_a_chain_of_several_rates_is_refused(tmp_path):
    content = encoded("OGG", "VORBIS") + encoded("OGG", "VORBIS", rate=8_000)
    with pytest.raises(AudioError, match=r"several rates.*ffmpeg"):
        read_audio(write_part(tmp_path / "a", content, None), RATE)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_damaged_or_missing_page_is_refused_by_its_place(tmp_path, subtype):
    content = encoded("OGG", subtype, np.tile(NOISE, 20))
    *_, before, last = page_offsets(content)
    damaged = bytearray(content)
    damaged[before + 100] ^= 1
    with pytest.raises(AudioError, match=f"a page at byte {before} has a wrong checksum"):
        read_audio(write_part(tmp_path / "a", bytes(damaged), None), RATE)
    with pytest.raises(AudioError, match="a page is missing"):
        read_audio(write_part(tmp_path / "a", content[:before] + content[last:], None), RATE)
    with pytest.raises(AudioError, match="its last page is missing"):
        read_audio(write_part(tmp_path / "a", content, last), RATE)


# --- MP3 ---


@pytest.fixture(scope="module")
def mp3():
    """Of a variable bit rate, quiet first: what a decoder estimates from it is wrong."""
    return encoded("MP3", None, np.concatenate([np.zeros(RATE, np.float32), np.tile(NOISE, 10)]))


def without_count(content):
    """Without the first frame, which says how many follow."""
    return content[streams.frame_bytes(content[:4]) :]


def test_an_mp3_of_unknown_length_is_read_to_its_end_with_a_note(tmp_path, mp3):
    whole = read_audio(write_part(tmp_path / "a", mp3, None), RATE)
    recording = read_recording(write_part(tmp_path / "a", without_count(mp3), None), RATE)
    n_more = len(recording.samples) - len(whole)
    assert 0 <= n_more < 3_000  # a codec's delay at both ends, which only the count tells
    assert np.abs(recording.samples[-3_000:]).max() > 0.01 and NOTE in recording.notes[0]
    with pytest.raises(AudioError, match="its last frame is incomplete"):
        read_audio(write_part(tmp_path / "a", without_count(mp3), -1), RATE)


def test_an_mp3_without_a_frame_of_sound_is_refused(tmp_path, mp3):
    frame = bytearray(mp3[: streams.frame_bytes(mp3[:4])])
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    frame[at + 4 : at + 8] = bytes(4)  # no number of frames either
    with pytest.raises(AudioError, match="is not audio we can read"):
        read_audio(write_part(tmp_path / "a", bytes(frame), None), RATE)


def test_joined_mp3s_are_all_read(tmp_path, mp3):
    n_samples = len(read_audio(write_part(tmp_path / "a", mp3, None), RATE))
    assert len(read_audio(write_part(tmp_path / "a", mp3 + mp3, None), RATE)) >= 2 * n_samples
    assert (
        len(read_audio(write_part(tmp_path / "a", mp3 + id3(100) + mp3, None), RATE))
        >= 2 * n_samples
    )


def test_an_mp3_with_something_else_between_its_frames_is_refused(tmp_path, mp3):
    half = len(mp3) // 2
    with pytest.raises(AudioError, match="something else between its frames"):
        read_audio(write_part(tmp_path / "a", mp3[:half] + bytes(700) + mp3[half:], None), RATE)


# --- what is no audio ---


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x20ftypM4A " + bytes(100), "M4A"),
        (b"\x30\x26\xb2\x75" + bytes(100), "WMA"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "WebM"),
        (b"RIFF\x70\0\0\0AVI " + bytes(100), "AVI"),
        (b"#!AMR\n" + bytes(100), "AMR"),
        (bytes.fromhex("fff15080017ffc") * 500, "AAC"),
    ],
)
def test_an_unsupported_format_is_refused_with_what_converts_it(tmp_path, content, kind):
    with pytest.raises(
        AudioError, match=rf"is not audio we can read \(.*{kind}.*\); expected WAV.*ffmpeg -i"
    ):
        read_audio(write_part(tmp_path / "a.mp3", content, None), RATE)


@pytest.mark.parametrize("name", ["a.au", "a.snd", "a.vox", "a.gsm", "a.raw", "a.sd2"])
def test_text_with_an_audio_suffix_is_refused(tmp_path, name):
    with pytest.raises(AudioError, match="is not audio we can read"):
        read_audio(write_part(tmp_path / name, b"What is the weather like?\n" * 100, None), RATE)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_bytes_are_refused_or_read_without_a_traceback(tmp_path, monkeypatch, seed):
    unraisable = []  # what a callback of libsndfile raised
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    rng = np.random.default_rng(seed)
    format_ = rng.choice(
        ["WAV", "AIFF", "AU", "CAF", "W64", "RF64", "FLAC", "OGG", "VOC", "NIST", "MAT5", "AVR"]
    )
    content = bytearray(encoded(str(format_), soundfile.default_subtype(str(format_))))
    for at in rng.integers(0, 120, 3):
        content[at] = rng.integers(256)
    try:
        read_audio(write_part(tmp_path / "a", bytes(content), None), RATE)
    except AudioError as error:
        assert str(error).startswith(str(tmp_path))
    assert not unraisable
