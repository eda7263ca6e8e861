"""The feature cache with a stand-in for the encoder, which counts what it encodes."""

import hashlib
import io
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import soundfile

from tiny_align.align.data.datasets import Utterance
from tiny_align.align.data.feature_cache import cached_features, non_speech_files, utterance_key
from tiny_align.runtime.bundle.bundle import Bundle

RATE = 16_000  # Hz


@dataclass
class CountingAssistant:
    """A stand-in whose features are the highest and the lowest sample of the audio."""

    bundle: Bundle
    sample_rate: int = RATE
    encoded: list = field(default_factory=list)

    def features(self, audio):
        self.encoded.append(len(audio))
        return np.array([[audio.max(), audio.min()]], np.float32)


@pytest.fixture
def assistant(bundle_path):
    return CountingAssistant(Bundle.open(bundle_path, verify=False))


@pytest.fixture
def utterance(tmp_path):
    soundfile.write(tmp_path / "a.wav", 0.1 * np.sin(np.arange(RATE)), RATE)
    return Utterance(tmp_path / "a.wav", "hello", "train")


def with_manifest(assistant, **changes):
    bundle = replace(assistant.bundle, manifest=replace(assistant.bundle.manifest, **changes))
    return CountingAssistant(bundle)


def test_features_are_encoded_once(assistant, utterance, tmp_path):
    first = cached_features(assistant, [utterance], tmp_path / "cache", quiet=True)
    second = cached_features(assistant, [utterance], tmp_path / "cache", quiet=True)
    assert len(assistant.encoded) == 1
    assert np.array_equal(first[0], second[0]) and first[0].dtype == np.float32


def test_features_come_in_the_order_of_the_utterances(assistant, utterance, tmp_path):
    soundfile.write(tmp_path / "b.wav", 0.2 * np.sin(np.arange(RATE)), RATE)
    other = replace(utterance, audio=tmp_path / "b.wav")
    cached_features(assistant, [other], tmp_path / "cache", quiet=True)
    quiet, loud = cached_features(assistant, [utterance, other], tmp_path / "cache", quiet=True)
    assert quiet.max() < 0.15 < loud.max()


def test_the_key_does_not_depend_on_the_text(assistant, utterance):
    """A corrected transcript costs no encoding."""
    corrected = replace(utterance, text="hullo")
    assert utterance_key(assistant, corrected) == utterance_key(assistant, utterance)


@pytest.mark.parametrize("change", [{"start_s": 0.1}, {"end_s": 0.5}])
def test_another_part_of_the_recording_has_another_key(assistant, utterance, change):
    part = replace(utterance, **change)
    assert utterance_key(assistant, part) != utterance_key(assistant, utterance)


def test_another_recording_in_the_same_file_has_another_key(assistant, utterance):
    before = utterance_key(assistant, utterance)
    soundfile.write(utterance.audio, np.zeros(RATE), RATE)
    assert utterance_key(assistant, utterance) != before


@pytest.mark.parametrize("suffix", ["", ".data"])
def test_another_encoder_has_another_key(assistant, utterance, suffix):
    """Its graph, or only the weights beside it."""
    manifest = assistant.bundle.manifest
    name = manifest.graphs["encoder"].file + suffix
    assert name in manifest.files
    other = with_manifest(assistant, files={**manifest.files, name: "0" * 64})
    assert utterance_key(other, utterance) != utterance_key(assistant, utterance)


def test_another_front_end_has_another_key(assistant, utterance):
    front_end = replace(assistant.bundle.manifest.front_end, preemphasis=0.5)
    other = with_manifest(assistant, front_end=front_end)
    assert utterance_key(other, utterance) != utterance_key(assistant, utterance)


def test_another_llm_has_the_same_key(assistant, utterance):
    manifest = assistant.bundle.manifest
    files = {**manifest.files, manifest.graphs["llm"].file: "0" * 64}
    other = with_manifest(assistant, files=files)
    assert utterance_key(other, utterance) == utterance_key(assistant, utterance)


def test_files_have_the_names_that_earlier_versions_gave_them(assistant, utterance, tmp_path):
    """Otherwise every user's features would be encoded again."""
    encoder_key = assistant.bundle.manifest.encoder_key
    content = encoder_key.encode() + utterance.audio.read_bytes() + b"None None 2"
    key = hashlib.sha256(content).hexdigest()[:32]
    cache = tmp_path / "cache"
    for augmentation in (0, 3):
        cached_features(assistant, [utterance], cache, quiet=True, augmentation=augmentation)
    non_speech_files(assistant, 1, 7, cache)
    names = {path.name for path in cache.iterdir()}
    assert names == {f"{key}.npy", f"{key}-3.npy", f"nothing-{encoder_key[:16]}-7-0.npy"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def zeros(path):
    """As a power cut leaves what was not yet on the disk."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "empty": lambda p: p.write_bytes(b""),
    "cut": cut,
    "cut in the header": lambda p: p.write_bytes(p.read_bytes()[:20]),
    "zeros": zeros,
    "garbage": lambda p: p.write_bytes(np.random.default_rng(0).bytes(999)),
    "text": lambda p: p.write_text("features"),
    "a zip": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)),
    "an archive": lambda p: p.write_bytes(archive()),
    "a huge shape": lambda p: p.write_bytes(
        p.read_bytes().replace(b"(1, 2), ", b"(9999999999, 9), ")
    ),
}


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(2))
    return file.getvalue()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_again(assistant, utterance, tmp_path, caplog, damage):
    [whole] = cached_features(assistant, [utterance], tmp_path / "cache", quiet=True)
    [path] = (tmp_path / "cache").iterdir()
    damage(path)
    [again] = cached_features(assistant, [utterance], tmp_path / "cache", quiet=True)
    assert np.array_equal(whole, again) and len(assistant.encoded) == 2
    assert f"{path} is damaged" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == [path]
    cached_features(assistant, [utterance], tmp_path / "cache", quiet=True)
    assert len(assistant.encoded) == 2


def test_damaged_features_of_a_sound_are_made_again(assistant, tmp_path):
    path, other = non_speech_files(assistant, 2, 0, tmp_path)
    whole = path.read_bytes()
    cut(path)
    assert non_speech_files(assistant, 2, 0, tmp_path) == [path, other]
    assert path.read_bytes() == whole and len(assistant.encoded) == 3
