"""Compares a graph with PyTorch, at several lengths, through the runtime's own backend."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiny_align.align.model.projector import BridgeFormer
from tiny_align.export.encoders import LayeredEncoder
from tiny_align.export.llms import embedding_scale, input_embedding, kv_shape, longest_context
from tiny_align.runtime.backends.base import Decoder, Runner
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PROJECTOR_FRAMES = (3, 25, 75, 250)
LLM_LENGTHS = ((1, 0), (24, 0), (1, 24), (9, 40), (64, 128))  # (tokens, past)
TOLERANCE = 1e-3  # largest absolute difference of an FP32 graph

Differences = dict[str, float]  # by length


def check(name: str, differences: Differences) -> None:
    """Refuse a graph that differs from PyTorch by TOLERANCE or more, or by NaN.

    Raises:
        TinyAlignError: it does.
    """
    worst = np.max(list(differences.values()))  # NaN if any is
    if not worst < TOLERANCE:
        raise TinyAlignError(
            f"the exported {name} differs from PyTorch by {worst:.2g}: expected less than "
            f"{TOLERANCE}, got by length {differences}. Nothing was written; report the model and "
            "the versions of torch and transformers"
        )


def _difference(got: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.abs(got - expected.numpy()).max())


def _cosine(got: np.ndarray, expected: torch.Tensor) -> float:
    a = torch.from_numpy(got).flatten()
    return float(torch.nn.functional.cosine_similarity(a, expected.flatten(), dim=0))


# --- encoder and projector ---


@torch.no_grad()
def encoder_parity(
    runner: Runner,
    encoder: LayeredEncoder,
    measure: Callable[[np.ndarray, torch.Tensor], float] = _difference,
) -> Differences:
    """Input rows (frames or samples) -> largest absolute difference of the features.

    Args:
        measure: what is computed instead of the difference.
    """
    min_rows, opt_rows, max_rows = encoder.row_range
    lengths = {
        min_rows,
        (min_rows + opt_rows) // 2,
        opt_rows,
        (opt_rows + max_rows) // 2,
        max_rows,
    }
    differences = {}
    for n_rows in sorted(lengths):
        rows = encoder.example(n_rows, seed=n_rows)
        features = runner({encoder.input.name: rows.numpy()})["features"]
        differences[str(n_rows)] = measure(features, encoder(rows))
    return differences


def encoder_cosine(runner: Runner, encoder: LayeredEncoder) -> dict[str, float]:
    """Input rows (frames or samples) -> cosine of all features, flattened."""
    return encoder_parity(runner, encoder, _cosine)


@torch.no_grad()
def projector_parity(runner: Runner, projector: BridgeFormer, seed: int = 0) -> Differences:
    """Encoder frames -> largest absolute difference of the soft tokens."""
    rng = np.random.default_rng(seed)
    differences = {}
    for n_frames in PROJECTOR_FRAMES:
        shape = (1, n_frames, projector.config.feature_size)
        features = rng.standard_normal(shape).astype(np.float32)
        soft_tokens = runner({"features": features})["soft_tokens"]
        expected = projector(torch.from_numpy(features))
        differences[str(n_frames)] = _difference(soft_tokens, expected)
    return differences


# --- LLM ---


def llm_lengths(config: "PreTrainedConfig", max_context: int) -> tuple[tuple[int, int], ...]:
    """(tokens, past) at which an LLM is compared.

    Some are beyond its sliding window if the bundle's context is; none is beyond `longest_context`.
    """
    window = getattr(config, "sliding_window", None) or max_context
    lengths = list(LLM_LENGTHS)
    for tokens in (1, 4):
        if window + tokens <= max_context:
            lengths.append((tokens, window))
    longest = longest_context(config)
    return tuple(length for length in lengths if sum(length) <= longest)


@torch.no_grad()
def llm_parity(
    runner: Runner,
    llm: "PreTrainedModel",
    seed: int = 0,
    lengths: Iterable[tuple[int, int]] = LLM_LENGTHS,
) -> Differences:
    """tokens+past -> largest absolute difference of logits, keys and values."""
    rng = np.random.default_rng(seed)
    differences = {}
    for tokens, past in lengths:
        differences[f"{tokens}+{past}"] = _llm_difference(runner, llm, tokens, past, rng)
    return differences


def _llm_difference(
    runner: Runner, llm: "PreTrainedModel", tokens: int, past: int, rng: np.random.Generator
) -> float:
    from transformers import DynamicCache

    heads, size = kv_shape(llm.config)
    embeds = _random_embeddings(llm, tokens, rng)[None]
    feed = {"inputs_embeds": embeds}
    cache = (
        DynamicCache()
    )  # without the configuration: every layer's past is whole, as in the graph
    for layer in range(llm.config.num_hidden_layers):
        keys = rng.standard_normal((1, heads, past, size)).astype(np.float32)
        values = rng.standard_normal((1, heads, past, size)).astype(np.float32)
        feed[f"past.{layer}.key"] = keys
        feed[f"past.{layer}.value"] = values
        if past:
            cache.update(torch.from_numpy(keys), torch.from_numpy(values), layer)
    expected = llm(
        inputs_embeds=torch.from_numpy(embeds),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    got = runner(feed)
    differences = [_difference(got["logits"], expected.logits)]
    for layer, present in enumerate(expected.past_key_values.layers):
        differences.append(_difference(got[f"present.{layer}.key"], present.keys))
        differences.append(_difference(got[f"present.{layer}.value"], present.values))
    return float(np.max(differences))  # NaN if any is


@torch.no_grad()
def decoder_parity(
    decoder: Decoder,
    llm: "PreTrainedModel",
    seed: int = 0,
    lengths: Iterable[tuple[int, int]] = LLM_LENGTHS,
) -> Differences:
    """tokens+past -> largest absolute difference of the logits; the decoder fills its own cache."""
    rng = np.random.default_rng(seed)
    capacity = max(map(sum, lengths))
    differences = {}
    for tokens, past in lengths:
        embeds = _random_embeddings(llm, past + tokens, rng)
        cache = decoder.open_cache(capacity)
        if past:
            decoder.run(embeds[:past], cache, 0)
        logits = decoder.run(embeds[past:], cache, past).logits
        expected = llm(
            inputs_embeds=torch.from_numpy(embeds)[None], use_cache=False, logits_to_keep=1
        )
        differences[f"{tokens}+{past}"] = _difference(logits, expected.logits[0, 0])
    return differences


def _random_embeddings(llm: "PreTrainedModel", n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, D) float32 of the size of the LLM's own embeddings."""
    scale = float(input_embedding(llm).weight.std()) * embedding_scale(llm)
    return (rng.standard_normal((n, llm.config.hidden_size)) * scale).astype(np.float32)
