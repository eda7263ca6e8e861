"""Every family of encoders: a tiny checkpoint, through the command, to features; against
transformers.

Each family's model (tests/support/tiny_encoders.py) is random and small, and on disk as on the hub:
config.json, weights, and the preprocessor_config.json of its own feature extractor. The LLM and the
projector beside it are traced once.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tiny_align.runtime import Assistant
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.errors import AudioError
from tiny_align.runtime.windows import cut as windows_of

torch = pytest.importorskip("torch", reason="models are exported from torch")
transformers = pytest.importorskip("transformers", reason="models are exported from transformers")
onnx = pytest.importorskip("onnx", reason="exported graphs are read with onnx")

from tests.support.tiny_encoders import (  # noqa: E402  # noqa: E402
    LAYERS,
    MAKERS,
    SIZE,
    features,
    make_encoder,
    save,
    wav2vec2,
    wav2vec2_bert,
    wave,
    whisper,
)
from tiny_align.benchmarks.studies.families import traced_once  # noqa: E402 - needs the packages above
from tiny_align.export.bundle import tensorrt_violations  # noqa: E402
from tiny_align.export.encoders import FAMILIES, MIN_FEATURES, load_encoder  # noqa: E402
from tiny_align.export.graphs import OPSET  # noqa: E402
from tiny_align.export.parity import TOLERANCE  # noqa: E402

RATE = 16_000  # Hz
# Largest absolute difference, of features of size about 3: front end and graph together.
FEATURES_TOLERANCE = 1e-4
PREPROCESSOR = "preprocessor_config.json"
FRAME_S = {"moonshine": 0.024, "parakeet": 0.08}  # all others: 20 ms


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family) -> its folder; made once, read only."""

    @functools.cache
    def make(family: str) -> Path:
        return make_encoder(family, tmp_path_factory.mktemp("encoders") / family)

    return make


class Case(NamedTuple):
    family: str
    folder: Path
    bundle: Bundle


@pytest.fixture(scope="module")
def exported(checkpoint, tiny_llm, export, tmp_path_factory):
    """exported(family) -> Case: its features are those of the first and the last layer."""
    with traced_once("llm_graph", "projector_graph"):  # the same for every encoder of these sizes

        @functools.cache
        def make(family: str) -> Case:
            models = {"encoder": checkpoint(family), "llm": tiny_llm}
            out = tmp_path_factory.mktemp("bundles") / family
            options = ("--precision", "fp32", "--encoder-layers", 1, -1)
            return Case(family, checkpoint(family), export(models, out, *options).bundle)

        yield make


@pytest.fixture(scope="module", params=MAKERS)
def case(request, exported) -> Case:
    return exported(request.param)


@pytest.fixture(scope="module")
def recordings(voice_path) -> list[np.ndarray]:
    """(S,) float32 each, of several lengths: two whole ones, one cut short, three in a row."""
    paths = sorted(voice_path.glob("*.flac"))
    first, second, third = (read_audio(path, RATE) for path in paths[:3])
    return [first, second[:-7], third[8_000:12_321], np.concatenate([first, second, third])]


# --- features ---


def test_features_equal_transformers(case, recordings):
    with Assistant.load(case.bundle, threads=1) as assistant:
        for audio in recordings:
            ours, theirs = assistant.encode_window(audio), features(case.family, case.folder, audio)
            assert ours.shape == theirs.shape and ours.dtype == np.float32
            difference = np.abs(ours - theirs)
            assert difference.max() <= FEATURES_TOLERANCE, (
                f"{case.family}, {len(audio)} samples: max {difference.max():.2g}, "
                f"mean {difference.mean():.2g}"
            )
            changes = np.abs(theirs[1:] - theirs[:-1])
            assert theirs.std() > 0.05 and changes.max() > 0.05  # they tell frames apart


def test_speech_becomes_soft_tokens(case, speech):
    with Assistant.load(case.bundle, threads=1) as assistant:
        rows = assistant.soft_tokens(assistant.features(speech))
    assert rows.ndim == 2 and rows.shape[1] == case.bundle.manifest.llm.hidden_size


def test_tensorrt_takes_the_graphs(case):
    assert tensorrt_violations(case.bundle.path, case.bundle.manifest) == {}


# --- sizes and graphs ---


def test_manifest_has_the_encoders_sizes(case):
    manifest = case.bundle.manifest
    graph = manifest.graphs["encoder"]
    assert manifest.encoder.feature_size == LAYERS * SIZE == graph.outputs[0].shape[2]
    assert manifest.encoder.frame_s == pytest.approx(FRAME_S.get(case.family, 0.02))
    rows = graph.inputs[0].shape[1]
    expected = {"whisper": 3000, "wav2vec2-bert": "frames", "parakeet": "frames"}
    assert rows == expected.get(case.family, "samples")
    max_rows = manifest.dims[rows][2] if isinstance(rows, str) else rows
    assert max_rows * manifest.front_end.row_samples == 30 * RATE


def test_n_features_is_the_encoders_own_for_every_length(checkpoint):
    for family in MAKERS:
        encoder = load_encoder(str(checkpoint(family)))
        min_rows, opt_rows, max_rows = encoder.row_range
        lengths = {min_rows, opt_rows, max_rows}
        if min_rows < max_rows:
            assert encoder.n_features(min_rows) == MIN_FEATURES
            lengths.add(opt_rows + 1)
        for n_rows in lengths:
            expected = (1, encoder.n_features(n_rows), SIZE)
            with torch.no_grad():
                assert encoder(encoder.example(n_rows)).shape == expected, (family, n_rows)


def test_shortest_and_longest_recordings_are_encoded_or_refused(case):
    # Noise of one level would be no speech.
    level = 0.1 * (1 + np.sin(8 * np.pi * np.arange(30 * RATE + 1) / RATE))
    noise = (np.random.default_rng(0).standard_normal(30 * RATE + 1) * level).astype(np.float32)
    max_features = case.bundle.manifest.dims["features"][2]
    with Assistant.load(case.bundle, threads=1) as assistant:
        whole = assistant.encode_window(noise[:-1])
        assert 0 <= max_features - len(whole) <= 1  # a filter bank's last row is not full
        if assistant.windows:
            assert assistant.max_speech_s == np.inf
            assert len(assistant.features(noise)) > len(whole)  # windows overlap
        else:  # an encoder of one length
            assert case.family == "whisper" and assistant.max_speech_s == 30
            with pytest.raises(AudioError, match="at most 30 s"):
                assistant.features(noise)
        if case.family in ("moonshine", "parakeet"):
            with pytest.raises(AudioError, match=r"expected at least .*: record longer"):
                assistant.features(noise[: RATE // 10])


def test_graph_is_standard_onnx_and_equals_pytorch(case):
    model = onnx.load(str(case.bundle.graph("encoder")))
    spec = case.bundle.manifest.graphs["encoder"]
    assert {(o.domain, o.version) for o in model.opset_import} == {("", OPSET)}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    figures = spec.parity["max_diff_over_std"]
    assert len(figures) == (1 if case.family == "whisper" else 5)
    assert all(0 <= figure < TOLERANCE / 2 for figure in figures.values()), figures


# --- parts left out or cut ---


def test_parametrized_weights_are_computed_at_export(checkpoint):
    for family in ("wav2vec2", "hubert", "wavlm"):
        encoder = load_encoder(str(checkpoint(family)))
        names = {name for name, _ in encoder.named_parameters() if "pos_conv_embed" in name}
        parts = [n for n in names if "parametrizations" in n or n.endswith(("_g", "_v"))]
        assert len(names) == 2 and not parts


@pytest.mark.parametrize("make", [wav2vec2, wav2vec2_bert])
def test_adapter_is_left_out(make, tmp_path):
    folder = save(tmp_path / "adapted", make(add_adapter=True, output_hidden_size=SIZE))
    encoder = load_encoder(str(folder))
    with torch.no_grad():
        n_rows = encoder.row_range[1]
        assert encoder(encoder.example(n_rows)).shape[1] == encoder.n_features(n_rows)


def test_whisper_window_is_that_of_the_checkpoint(checkpoint, edit_json, tmp_path):
    folder = shutil.copytree(checkpoint("whisper"), tmp_path / "short")
    edit_json(folder / "preprocessor_config.json", lambda v: v.update(chunk_length=5))
    whole = load_encoder(str(checkpoint("whisper")))
    short = load_encoder(str(folder))
    assert short.front_end.padded_samples == 5 * RATE and short.input.shape == (1, 500, 80)
    positions = whole.encoder.embed_positions.weight
    assert torch.equal(short.encoder.embed_positions.weight, positions[:250])
    with torch.no_grad():
        assert short(short.example(500)).shape == (1, 250, SIZE)


def test_mel_bins_are_those_of_the_checkpoint(tmp_path):
    encoder = load_encoder(str(save(tmp_path / "large", whisper(n_mels=128))))
    assert encoder.front_end.n_mels == 128 and encoder.input.shape == (1, 3000, 128)


def test_front_end_in_processor_config_is_found(checkpoint, tmp_path):
    """As newer checkpoints have it: one processor_config.json."""
    folder = shutil.copytree(checkpoint("whisper"), tmp_path / "nested")
    value = json.loads((folder / PREPROCESSOR).read_text()) | {"chunk_length": 10}
    (folder / PREPROCESSOR).unlink()
    (folder / "processor_config.json").write_text(json.dumps({"feature_extractor": value}))
    assert load_encoder(str(folder)).front_end.padded_samples == 10 * RATE


def test_older_checkpoints_give_the_same_features(checkpoint, tmp_path):
    """pytorch_model.bin, and the names that normalised weights had."""
    from safetensors.torch import load_file

    folder = shutil.copytree(checkpoint("hubert"), tmp_path / "old")
    names = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }
    weights = load_file(folder / "model.safetensors")
    for new, old in names.items():
        weights = {key.replace(new, old): value for key, value in weights.items()}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    now, then = load_encoder(str(checkpoint("hubert"))), load_encoder(str(folder))
    with torch.no_grad():
        assert torch.equal(now(now.example(16_000)), then(then.example(16_000)))


# --- refused before anything is exported ---


def test_every_family_is_tested(checkpoint):
    covered = {
        json.loads((checkpoint(family) / "config.json").read_text())["model_type"]
        for family in MAKERS
    }
    assert covered == set(FAMILIES) - {"parakeet_encoder"}  # a part of parakeet_ctc


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1_000])


def another_models_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"student.{k}": v for k, v in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def a_layer_less(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = {
        k: v for k, v in load_file(folder / "model.safetensors").items() if "layers.1." not in k
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change(file: str, **values):
    def do(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        (folder / file).write_text(
            json.dumps({k: v for k, v in (value | values).items() if v is not None})
        )

    return do


DAMAGES = {
    "cut off": ("wav2vec2", lambda f: cut(f / "model.safetensors"), "cannot be loaded"),
    "without weights": ("hubert", lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "another model's weights": ("wavlm", another_models_weights, "lacks the weights of"),
    "a part of the weights": (
        "data2vec-audio",
        a_layer_less,
        "lacks the weights of encoder.layers.1.",
    ),
    "a part of the encoder's weights": (
        "whisper",
        a_layer_less,
        "lacks the weights of encoder.layers.1.",
    ),
    "other sizes": (
        "moonshine",
        change("config.json", hidden_size=64),
        "belong to different models",
    ),
    "no front end": (
        "whisper",
        lambda f: (f / PREPROCESSOR).unlink(),
        "has no readable preprocessor_config.json",
    ),
    "damaged front end": (
        "hubert",
        lambda f: cut(f / PREPROCESSOR) or (f / PREPROCESSOR).write_text("{"),
        "readable",
    ),
    "another family's front end": (
        "whisper",
        lambda f: wave().save_pretrained(f),
        "is a Wav2Vec2FeatureExtractor's, its encoder needs a WhisperFeatureExtractor's",
    ),
    "another family's, unnamed": (
        "wav2vec2",
        change(PREPROCESSOR, feature_extractor_type=None, feature_size=80),
        "its preprocessor_config.json lacks 'feature_size' 1",
    ),
    "a value less": ("wav2vec2-bert", change(PREPROCESSOR, stride=None), "lacks 'stride'"),
    "a text for a number": (
        "whisper",
        change(PREPROCESSOR, chunk_length="30"),
        "lacks 'chunk_length'",
    ),
    "other mel bins": (
        "whisper",
        change(PREPROCESSOR, feature_size=128),
        "makes 128 values per frame",
    ),
    "other rows": (
        "wav2vec2-bert",
        change(PREPROCESSOR, num_mel_bins=40),
        "makes 80 values per frame",
    ),
    "too long a window": ("whisper", change(PREPROCESSOR, chunk_length=60), "needs 3000 positions"),
}


@pytest.mark.parametrize(("family", "damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_refused(
    refused, checkpoint, tiny_llm, tmp_path, family, damage, sentence
):
    folder = shutil.copytree(checkpoint(family), tmp_path / "checkpoint")
    damage(folder)
    assert sentence in refused({"encoder": folder, "llm": tiny_llm}, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("layers", [(3,), (-3,), (1, 9)])
def test_unknown_layer_is_refused(refused, checkpoint, tiny_llm, tmp_path, layers):
    models = {"encoder": checkpoint("moonshine"), "llm": tiny_llm}
    assert "has 2 layers" in refused(models, tmp_path / "out", "--encoder-layers", *layers)
    assert not list(tmp_path.iterdir())


def test_features_are_split_into_those_of_each_window(case, speech):
    with Assistant.load(case.bundle, threads=1) as assistant:
        if (spec := assistant.windows) is None:
            assert case.family == "whisper"
            return
        audio = np.tile(speech, 1 + 8 * RATE // len(speech))[: 8 * RATE]
        parts = spec.split(assistant.features(audio))
        cuts = [window for window, _ in windows_of(audio, spec, RATE)]
        [(without_pauses, _)] = windows_of(audio, None, RATE)
        assert [len(part) for part in parts] == [
            len(assistant.encode_window(window)) for window in cuts
        ]
        n_vectors = 0
        for part, which in zip(parts, spec.keep_slices(len(parts))):
            n_vectors += len(assistant.project(part)[which])
        expected = len(without_pauses) / spec.vector_samples
        assert expected - 2 <= n_vectors <= expected + 1
