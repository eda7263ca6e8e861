"""The front_end ends in numpy against the feature extractors of transformers.

NeMo's has a file of its own, test_nemo.py. Here: several lengths of real speech and of noise,
every option that a checkpoint sets, and the manifest's form.
"""

import dataclasses
import json

import numpy as np
import pytest

from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.front_ends.base import KINDS, front_end_from
from tiny_align.runtime.front_ends.nemo import NemoMel
from tiny_align.runtime.front_ends.seamless import FilterBank
from tiny_align.runtime.front_ends.wav2vec2 import Waveform
from tiny_align.runtime.front_ends.whisper import WhisperMel

RATE = 16_000  # Hz
# samples: around the edges of frames and rows
LENGTHS = (1_600, 3_999, 16_000, 16_001, 16_239, 16_240, 48_080)
# the references compute partly in float32
TOLERANCE = {"waveform": 0.0, "whisper": 1e-4, "filter_bank": 1e-4}


def reference(front_end, audio: np.ndarray) -> np.ndarray:
    """What transformers makes of the audio, without what it masks."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rate = front_end.sample_rate
    options = {"sampling_rate": rate, "return_tensors": "np"}
    if isinstance(front_end, Waveform):
        extract = transformers.Wav2Vec2FeatureExtractor(
            sampling_rate=rate, do_normalize=front_end.normalise
        )
        return extract(audio, **options)["input_values"][0]
    if isinstance(front_end, WhisperMel):
        window_s = front_end.padded_samples // rate
        extract = transformers.WhisperFeatureExtractor(
            front_end.n_mels, rate, front_end.hop_samples, window_s, front_end.n_fft
        )
        return extract(audio, **options)["input_features"][0].T
    extract = transformers.SeamlessM4TFeatureExtractor(
        front_end.n_mels,
        rate,
        num_mel_bins=front_end.n_mels,
        padding_value=1.0,
        stride=front_end.stride,
    )
    made = extract(audio, **options)
    return made["input_features"][0][made["attention_mask"][0] == 1]


def assert_same(front_end, audio: np.ndarray) -> None:
    ours = front_end(audio)
    theirs = reference(front_end, audio)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.float32
    difference = np.abs(ours - theirs)
    assert difference.max() <= TOLERANCE[front_end.kind], (
        f"max {difference.max():.2g}, mean {difference.mean():.2g}"
    )


FRONT_ENDS = {
    "waveform": Waveform(),
    "waveform as it is": Waveform(normalise=False),
    "whisper": WhisperMel(),
    "whisper large": WhisperMel(n_mels=128),
    "whisper, 10 s": WhisperMel(padded_samples=160_000),
    "filter bank": FilterBank(),
    "filter bank, 40 bins": FilterBank(n_mels=40),
}


@pytest.fixture(params=FRONT_ENDS.values(), ids=FRONT_ENDS)
def front_end(request):
    return request.param


def test_real_speech_equals_transformers(front_end, voice_path):
    for path in sorted(voice_path.glob("*.flac"))[:3]:
        assert_same(front_end, read_audio(path, RATE))


def test_noise_of_any_length_equals_transformers(front_end):
    rng = np.random.default_rng(0)
    for n_samples in LENGTHS:
        assert_same(front_end, (0.1 * rng.standard_normal(n_samples)).astype(np.float32))


def test_speech_between_silences_equals_transformers(front_end, speech):
    """Digital silence reaches the floors."""
    pause = np.zeros(RATE, np.float32)
    assert_same(front_end, np.concatenate([pause, speech, pause]))


@pytest.mark.parametrize("missing", [0, 1, 39, 40, 41, 200, 361])
def test_an_almost_full_window_of_whisper_equals_transformers(missing, speech):
    """The end of the window is mirrored into its last frames."""
    front_end = WhisperMel(padded_samples=5 * RATE)
    assert_same(front_end, np.resize(speech, 5 * RATE - missing))


def test_the_number_of_rows_follows_row_samples(front_end, speech):
    rows = front_end(speech)
    if isinstance(front_end, WhisperMel):
        assert len(rows) == front_end.n_rows == front_end.padded_samples / front_end.row_samples
    else:
        assert (
            len(speech) / front_end.row_samples - 3
            < len(rows)
            <= len(speech) / front_end.row_samples
        )
    assert rows.shape[1:] == (() if isinstance(front_end, Waveform) else (front_end.row_size,))


# --- the manifest's form ---


def test_a_front_end_equals_itself_after_json(front_end):
    value = json.loads(json.dumps(dataclasses.asdict(front_end)))
    assert value["kind"] == front_end.kind and front_end_from(value) == front_end


def test_a_manifest_without_a_kind_gives_nemo_mel(bundle_path):
    value = json.loads((bundle_path / "manifest.json").read_text())["front_end"]
    value.pop("kind", None)
    made = front_end_from(value)
    assert type(made) is NemoMel and made.n_mels == value["n_mels"]


@pytest.mark.parametrize(
    "value", [{"kind": "cochlea"}, {"kind": "waveform", "n_mels": 80}, {"kind": None}]
)
def test_an_unknown_kind_or_parameter_is_refused(value):
    with pytest.raises((KeyError, TypeError)):
        front_end_from(value)


def test_kinds_are_unique():
    assert len(KINDS) == 4
    for name, front_end in KINDS.items():
        assert front_end().kind == name
