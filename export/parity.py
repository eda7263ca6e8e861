"""Does a graph compute what PyTorch does? Each at several lengths, through the runtime's own backend."""

import numpy as np
import torch

from tiny_align.export.llms import embedding_scale, kv_shape, longest_context

PROJECTOR_FRAMES = (3, 25, 75, 250)
LLM_LENGTHS = ((1, 0), (24, 0), (1, 24), (9, 40), (64, 128))  # (tokens, past)
TOLERANCE = 1e-3  # largest absolute difference of an FP32 graph


def _difference(got: np.ndarray, want: torch.Tensor) -> float:
    return float(np.abs(got - want.numpy()).max())


def _cosine(got: np.ndarray, want: torch.Tensor) -> float:
    return float(
        torch.nn.functional.cosine_similarity(
            torch.from_numpy(got).flatten(), want.flatten(), dim=0
        )
    )


@torch.no_grad()
def encoder_parity(runner, encoder, measure=_difference) -> dict[str, float]:
    """input rows (frames or samples) -> largest absolute difference of the features, or another measure."""
    out = {}
    for n in _lengths(*encoder.row_range):
        x = encoder.example(n, seed=n)
        out[str(n)] = measure(runner({encoder.input.name: x.numpy()})["features"], encoder(x))
    return out


def encoder_cosine(runner, encoder) -> dict[str, float]:
    """input rows (frames or samples) -> cosine between the features of all frames."""
    return encoder_parity(runner, encoder, _cosine)


def _lengths(least: int, usual: int, greatest: int) -> tuple[int, ...]:
    """The lengths to compare at, from the least to the greatest; one where there is only one."""
    return tuple(sorted({least, (least + usual) // 2, usual, (usual + greatest) // 2, greatest}))


@torch.no_grad()
def projector_parity(runner, projector, seed: int = 0) -> dict[str, float]:
    """encoder frames -> largest absolute difference of the soft tokens."""
    rng, size = np.random.default_rng(seed), projector.config.feature_size
    out = {}
    for n in PROJECTOR_FRAMES:
        x = rng.standard_normal((1, n, size)).astype(np.float32)
        out[str(n)] = _difference(
            runner({"features": x})["soft_tokens"], projector(torch.from_numpy(x))
        )
    return out


def llm_lengths(config, max_context: int) -> tuple[tuple[int, int], ...]:
    """(tokens, past) that the LLM can read, some beyond its sliding window where the bundle reaches so far."""
    window = getattr(config, "sliding_window", None) or max_context
    beyond = tuple((tokens, window) for tokens in (1, 4) if window + tokens <= max_context)
    return tuple(n for n in (*LLM_LENGTHS, *beyond) if sum(n) <= longest_context(config))


@torch.no_grad()
def llm_parity(runner, llm, seed: int = 0, lengths=LLM_LENGTHS) -> dict[str, float]:
    """tokens+past -> largest absolute difference over logits, keys and values."""
    rng = np.random.default_rng(seed)
    return {
        f"{tokens}+{past}": _llm_difference(runner, llm, tokens, past, rng)
        for tokens, past in lengths
    }


def _llm_difference(runner, llm, tokens: int, past: int, rng) -> float:
    from transformers import DynamicCache

    (heads, size), layers = kv_shape(llm.config), range(llm.config.num_hidden_layers)
    scale = float(llm.get_input_embeddings().weight.std()) * embedding_scale(llm)
    embeds = (rng.standard_normal((1, tokens, llm.config.hidden_size)) * scale).astype(np.float32)
    feed = {"inputs_embeds": embeds}
    cache = (
        DynamicCache()
    )  # without the configuration: every layer's past is whole, as in the graph
    for layer in layers:
        pair = [rng.standard_normal((1, heads, past, size)).astype(np.float32) for _ in range(2)]
        feed |= {f"past.{layer}.key": pair[0], f"past.{layer}.value": pair[1]}
        if past:
            cache.update(*map(torch.from_numpy, pair), layer)
    want = llm(
        inputs_embeds=torch.from_numpy(embeds),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    got = runner(feed)
    differences = [_difference(got["logits"], want.logits)]
    for layer in layers:
        kept = want.past_key_values.layers[layer]
        differences += [_difference(got[f"present.{layer}.key"], kept.keys)]
        differences += [_difference(got[f"present.{layer}.value"], kept.values)]
    return float(np.max(differences))  # NaN if any is


@torch.no_grad()
def decoder_parity(decoder, llm, seed: int = 0, lengths=LLM_LENGTHS) -> dict[str, float]:
    """tokens+past -> largest absolute difference of the logits, the cache being what the decoder itself read before."""
    rng, capacity = np.random.default_rng(seed), max(map(sum, lengths))
    scale = float(llm.get_input_embeddings().weight.std()) * embedding_scale(llm)
    out = {}
    for tokens, past in lengths:
        embeds = (rng.standard_normal((past + tokens, llm.config.hidden_size)) * scale).astype(
            np.float32
        )
        cache = decoder.open_cache(capacity)
        if past:
            decoder.run(embeds[:past], cache, 0)
        got = decoder.run(embeds[past:], cache, past).logits
        want = llm(
            inputs_embeds=torch.from_numpy(embeds)[None], use_cache=False, logits_to_keep=1
        ).logits
        out[f"{tokens}+{past}"] = _difference(got, want[0, 0])
    return out
