"""BridgeFormer's pooling, shapes, masks and configuration, on untrained weights."""

from dataclasses import asdict

import pytest
import torch

from tiny_align.align.model import projector as module
from tiny_align.align.model.projector import (
    PROJECTORS,
    REACH,
    BridgeFormer,
    ProjectorConfig,
    build_projector,
    pooling_weights,
)

CONFIG = ProjectorConfig(
    feature_size=10, embedding_size=6, soft_tokens=5, hidden_size=16, n_layers=2, n_heads=4
)


@pytest.fixture
def projector():
    torch.manual_seed(0)
    return BridgeFormer(CONFIG).eval()


@pytest.fixture
def features():
    """(1, N, Da), N no multiple of T."""
    return torch.randn(1, 13, CONFIG.feature_size, generator=torch.Generator().manual_seed(1))


def difference(one, other):
    return (one - other).abs().max().item()


@pytest.mark.parametrize("n_frames", [1, 2, 4, 5, 7, 10, 64, 751])
def test_every_soft_token_is_a_weighted_mean_of_frames(n_frames):
    weights = pooling_weights(torch.tensor([n_frames]), n_frames, 5)
    assert weights.shape == (1, 5, n_frames) and (weights >= 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(1, 5), atol=1e-4)


@pytest.mark.parametrize("soft_tokens", [1, 4, 24])
@pytest.mark.parametrize("times", [1, 2, 7])
def test_pooling_is_adaptive_average_pooling_where_spans_have_whole_borders(soft_tokens, times):
    n = soft_tokens * times
    x = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(0))  # (B, N, C)
    pooled = pooling_weights(torch.tensor([n]), n, soft_tokens) @ x
    library = torch.nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), soft_tokens)
    assert difference(pooled, library.transpose(1, 2)) < 1e-5


def test_fractional_borders_share_a_frame():
    """3 frames in 2 spans: the middle frame belongs to both by half."""
    weights = pooling_weights(torch.tensor([3]), 3, 2)
    assert torch.allclose(weights[0], torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]))


def test_fewer_frames_than_spans_are_repeated_in_order():
    weights = pooling_weights(torch.tensor([2]), 2, 4)
    assert torch.allclose(weights[0], torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))


def test_padding_has_no_weight():
    weights = pooling_weights(torch.tensor([3, 8]), 8, 4)
    assert not weights[0, :, 3:].any()
    assert torch.equal(weights[0, :, :3], pooling_weights(torch.tensor([3]), 3, 4)[0])


@pytest.mark.parametrize("n_frames", [1, 3, 5, 13, 200])
def test_any_number_of_frames_gives_t_soft_tokens(projector, n_frames):
    soft_tokens = projector(torch.randn(2, n_frames, CONFIG.feature_size))
    assert soft_tokens.shape == (2, CONFIG.soft_tokens, CONFIG.embedding_size)
    assert soft_tokens.isfinite().all()


def test_a_padded_batch_equals_its_rows_one_by_one(projector):
    """Whatever the padding holds."""
    rows = [torch.randn(n, CONFIG.feature_size) for n in (13, 3, 8)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=50.0)
    together = projector(padded, torch.tensor([len(row) for row in rows]))
    alone = torch.cat([projector(row[None]) for row in rows])
    assert difference(together, alone) < 1e-5


def test_layers_have_no_positional_encoding(projector, features):
    """Reordered frames come out reordered, until they are pooled."""
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(2))

    def before_pooling(x):
        x = projector.enter(x)
        for layer in projector.layers:
            x = layer(x, None)
        return x

    assert difference(before_pooling(features[:, order]), before_pooling(features)[:, order]) < 1e-5


def test_only_pooling_depends_on_the_order(projector, features, monkeypatch):
    def same_weights(n_frames, max_frames, soft_tokens):
        return torch.full((len(n_frames), soft_tokens, max_frames), 1 / max_frames)

    backwards = features.flip(1)
    assert difference(projector(backwards), projector(features)) > 1e-3
    monkeypatch.setattr(module, "pooling_weights", same_weights)
    assert difference(projector(backwards), projector(features)) < 1e-5


def test_a_configuration_builds_the_same_projector_again(projector, features):
    again = build_projector(asdict(projector.config)).eval()
    again.load_state_dict(projector.state_dict())
    assert again.config == CONFIG
    assert torch.equal(again(features), projector(features))


def test_the_shortcut_size_of_an_old_manifest_is_its_near_size():
    entry = {"feature_size": 10, "embedding_size": 6, "kind": "bridgeformer"}
    old = build_projector({**entry, "near_size": 6})
    new = build_projector({**entry, "shortcut_size": 6})
    assert old.config == new.config and old.config.shortcut_size == 6
    assert list(old.state_dict()) == list(new.state_dict())
    assert "near_size" not in asdict(old.config)


def test_parameters_have_the_names_of_weights_on_disk():
    projector = unpooled(shortcut_size=CONFIG.feature_size, hidden_size=8, n_layers=1)
    assert list(projector.state_dict()) == [
        "enter.0.weight",
        "enter.0.bias",
        "enter.1.weight",
        "enter.1.bias",
        "enter.3.weight",
        "enter.3.bias",
        "stack.weight",
        "stack.bias",
        "layers.0.norm_attention.weight",
        "layers.0.norm_attention.bias",
        "layers.0.norm_mlp.weight",
        "layers.0.norm_mlp.bias",
        "layers.0.qkv.weight",
        "layers.0.qkv.bias",
        "layers.0.out.weight",
        "layers.0.out.bias",
        "layers.0.mlp.0.weight",
        "layers.0.mlp.0.bias",
        "layers.0.mlp.2.weight",
        "layers.0.mlp.2.bias",
        "leave.0.weight",
        "leave.0.bias",
        "leave.1.weight",
        "leave.1.bias",
        "leave.3.weight",
        "leave.3.bias",
        "shortcut.narrow.weight",
        "shortcut.patterns.weight",
        "shortcut.patterns.bias",
    ]


def unpooled(kind="bridgeformer", **changes):
    """A projector that pools nothing, every weight of it random."""
    torch.manual_seed(0)
    config = {**asdict(CONFIG), "soft_tokens": None, "kind": kind, **changes}
    projector = build_projector(config).eval()
    for value in projector.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return projector


@pytest.fixture(params=PROJECTORS)
def kind(request):
    return request.param


@pytest.fixture(params=[0, 6], ids="shortcut_size={}".format)
def framed(request, kind):
    """Each kind, not pooled, without a shortcut and with one."""
    return unpooled(kind, shortcut_size=request.param)


def test_without_pooling_length_follows_the_speech(framed):
    for n_frames in (2, 3, 13, 40):
        frames = framed(torch.randn(1, n_frames, CONFIG.feature_size))
        assert frames.shape == (1, n_frames // 2, CONFIG.embedding_size + 1)
        assert framed.output_lengths(torch.tensor([n_frames])).tolist() == [frames.shape[1]]


def test_a_padded_batch_that_is_not_pooled_equals_its_rows_one_by_one(framed):
    rows = [torch.randn(n, CONFIG.feature_size) for n in (13, 3, 8)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=50.0)
    together = framed(padded, torch.tensor([len(row) for row in rows]))
    for row, got in zip(rows, together):
        assert difference(got[: len(row) // 2], framed(row[None])[0]) < 1e-5


@pytest.mark.parametrize("shortcut_size", [6, CONFIG.feature_size])
@pytest.mark.parametrize("hidden_size", [8, 16])  # below and above the shortcut's size
def test_an_untrained_shortcut_changes_nothing(features, shortcut_size, hidden_size):
    with_shortcut = unpooled(shortcut_size=shortcut_size, hidden_size=hidden_size)
    torch.nn.init.zeros_(with_shortcut.shortcut.patterns.weight)
    torch.nn.init.zeros_(with_shortcut.shortcut.patterns.bias)
    without = unpooled(hidden_size=hidden_size)
    without.load_state_dict(with_shortcut.state_dict(), strict=False)
    assert torch.equal(with_shortcut(features), without(features))


def test_an_untrained_projector_has_an_untrained_shortcut():
    projector = BridgeFormer(ProjectorConfig(feature_size=10, embedding_size=6, shortcut_size=6))
    assert not any(value.any() for value in projector.shortcut.parameters())


def test_a_pooled_projector_has_no_shortcut():
    config = ProjectorConfig(feature_size=10, embedding_size=6, soft_tokens=5, shortcut_size=6)
    assert BridgeFormer(config).shortcut is None


def test_the_shortcut_is_a_linear_map_of_the_frames_within_reach_of_a_pair():
    projector = unpooled("mlp", shortcut_size=6)
    features = torch.randn(1, 60, CONFIG.feature_size, dtype=torch.double)
    shortcut = projector.double().shortcut
    output = shortcut(features, None)[0]  # (30, size)
    inputs = torch.nn.functional.layer_norm(features[0, :, :6], (6,))
    for pair in (10, 17):
        first = 2 * pair - (REACH // 2 - 1)
        frames = inputs[first : first + REACH]  # five frames, the pair, five frames
        weight, bias = shortcut.patterns.weight, shortcut.patterns.bias
        expected = torch.einsum("nf,cfn->c", frames, weight) + bias
        assert torch.allclose(output[pair], expected)


def test_the_shortcut_reads_the_first_features_only(features):
    shortcut = unpooled(shortcut_size=6).shortcut
    changed = features.clone()
    changed[..., 6:] += 1
    assert torch.equal(shortcut(changed, None), shortcut(features, None))


@pytest.mark.parametrize("config", [{"kind": "perceiver", "feature_size": 3}, {"feature_size": 3}])
def test_the_error_of_an_unknown_kind_names_the_known_ones(config):
    with pytest.raises(ValueError, match=r"unknown projector .*bridgeformer"):
        build_projector(config)
