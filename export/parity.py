"""Compares a graph with PyTorch, at several lengths, through the runtime's own backend.

Every output is compared relative to its own spread: the largest absolute difference over the
standard deviation of what PyTorch computes. Logits of tens may then differ by more than keys of
hundredths, and a wrong layer shows in its own keys and values.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiny_align.align.model.projector import BridgeFormer
from tiny_align.export.encoders import LayeredEncoder
from tiny_align.export.llms import embedding_scale, input_embedding, longest_context
from tiny_align.runtime.backends.base import Arrays, Decoder, Runner
from tiny_align.runtime.backends.onnxruntime import OrtCache
from tiny_align.runtime.bundle.manifest import GraphSpec
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PROJECTOR_FRAMES = (3, 25, 75, 250)
LLM_LENGTHS = ((1, 0), (24, 0), (1, 24), (9, 40), (64, 128))  # (tokens, past)
# Largest difference of an FP32 graph, in standard deviations of the output. Right graphs give less
# than half of it, SmolLM2's .00005; wrong ones ten times it and more. The tests hold both.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Differences:
    """How far a graph is from PyTorch, by length."""

    absolute: dict[str, float] = field(default_factory=dict)  # largest of any output
    relative: dict[str, float] = field(default_factory=dict)  # in standard deviations of its output
    outputs: dict[str, str] = field(default_factory=dict)  # the output of `relative`

    def add(self, length: str, got: Arrays, expected: Arrays) -> None:
        """Compare the outputs of one length: name -> array, the same names and shapes in both."""
        absolute = []
        relative = {}
        for name, array in expected.items():
            difference = np.abs(got[name] - array).max()
            absolute.append(difference)
            with np.errstate(divide="ignore", invalid="ignore"):
                relative[name] = float(difference / array.std()) if difference != 0 else 0.0
        # argmax of numpy takes the first NaN for the largest
        worst = list(relative)[int(np.argmax(list(relative.values())))]
        self.absolute[length] = float(np.max(absolute))
        self.relative[length] = relative[worst]
        self.outputs[length] = worst

    def figures(self) -> dict[str, Any]:
        """What the manifest records of an FP32 graph."""
        return {
            "max_abs_diff_to_pytorch": self.absolute,
            "max_diff_over_std": self.relative,
            "max_diff_over_std_allowed": TOLERANCE,
        }


def check(name: str, differences: Differences) -> None:
    """Refuse a graph that differs from PyTorch by TOLERANCE or more, or by NaN.

    Raises:
        TinyAlignError: it does.
    """
    lengths = list(differences.relative)
    worst = lengths[int(np.argmax(list(differences.relative.values())))]  # the first NaN if any is
    if not differences.relative[worst] < TOLERANCE:
        raise TinyAlignError(
            f"the exported {name} differs from PyTorch by {differences.relative[worst]:.2g} "
            f"standard deviations of {differences.outputs[worst]} at length {worst}: expected less "
            f"than {TOLERANCE}, got by length {differences.relative}. Nothing was written; report "
            "the model and the versions of torch and transformers"
        )


def checked(spec: GraphSpec, differences: Differences) -> GraphSpec:
    """A graph's specification with its differences in FP32.

    Raises:
        TinyAlignError: see `check`.
    """
    check(Path(spec.file).stem, differences)
    return dataclasses.replace(spec, parity=differences.figures())


# --- encoder and projector ---


def encoder_parity(runner: Runner, encoder: LayeredEncoder) -> Differences:
    """The features, each layer's by itself, by number of input rows (frames or samples)."""
    differences = Differences()
    for rows, expected in _encoded(encoder):
        got = runner({encoder.input.name: rows})["features"]
        differences.add(str(rows.shape[1]), _by_layer(got, encoder), _by_layer(expected, encoder))
    return differences


def encoder_cosine(runner: Runner, encoder: LayeredEncoder) -> dict[str, float]:
    """Input rows (frames or samples) -> cosine of all features, flattened."""
    cosines = {}
    for rows, expected in _encoded(encoder):
        got = runner({encoder.input.name: rows})["features"]
        a, b = torch.from_numpy(got).flatten(), torch.from_numpy(expected).flatten()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
        cosines[str(rows.shape[1])] = float(cosine)
    return cosines


def _encoded(encoder: LayeredEncoder) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Input rows of several lengths, and PyTorch's features (1, N, Da) of them."""
    min_rows, opt_rows, max_rows = encoder.row_range
    lengths = {
        min_rows,
        (min_rows + opt_rows) // 2,
        opt_rows,
        (opt_rows + max_rows) // 2,
        max_rows,
    }
    for n_rows in sorted(lengths):
        rows = encoder.example(n_rows, seed=n_rows)
        with torch.no_grad():
            yield rows.numpy(), encoder(rows).numpy()


def _by_layer(features: np.ndarray, encoder: LayeredEncoder) -> Arrays:
    """Layers differ in scale: a large one would hide a wrong one beside it."""
    parts = np.split(features, len(encoder.layers), axis=-1)
    return {f"features of layer {layer}": part for layer, part in zip(encoder.layers, parts)}


@torch.no_grad()
def projector_parity(runner: Runner, projector: BridgeFormer, seed: int = 0) -> Differences:
    """The soft tokens, by number of encoder frames."""
    rng = np.random.default_rng(seed)
    differences = Differences()
    for n_frames in PROJECTOR_FRAMES:
        shape = (1, n_frames, projector.config.feature_size)
        features = rng.standard_normal(shape).astype(np.float32)
        expected = projector(torch.from_numpy(features)).numpy()
        differences.add(str(n_frames), runner({"features": features}), {"soft_tokens": expected})
    return differences


# --- LLM ---


@dataclass(frozen=True)
class Prompt:
    """What PyTorch computes of one prompt, its first positions being in the cache already."""

    embeds: np.ndarray  # (past + tokens, D) float32
    past: int
    outputs: Arrays  # logits (1, 1, V) of the last position; present.N.key, .value of all of them

    @property
    def length(self) -> str:
        return f"{len(self.embeds) - self.past}+{self.past}"


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
def llm_prompts(
    llm: "PreTrainedModel", seed: int = 0, lengths: Iterable[tuple[int, int]] = LLM_LENGTHS
) -> list[Prompt]:
    """Prompts of random tokens, run by PyTorch as a whole.

    Tokens rather than noise, and keys of tokens rather than noise in the cache: with random keys
    attention is so sharp that rounding alone makes differences of .001.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    rng = np.random.default_rng(seed)
    table = input_embedding(llm).weight.numpy()
    prompts = []
    for tokens, past in lengths:
        ids = rng.integers(0, len(table), tokens + past)
        embeds = (table[ids] * embedding_scale(llm)).astype(np.float32)
        cache = DynamicCache()  # without the configuration, so that no layer drops its past
        computed = llm(
            inputs_embeds=torch.from_numpy(embeds)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        outputs = {"logits": computed.logits.numpy()}
        for layer, present in enumerate(cache.layers):
            assert isinstance(present, DynamicLayer)
            for part, states in (("key", present.keys), ("value", present.values)):
                assert states is not None
                outputs[f"present.{layer}.{part}"] = states.numpy()
        prompts.append(Prompt(embeds, past, outputs))
    return prompts


def llm_parity(runner: Runner, prompts: list[Prompt]) -> Differences:
    """Logits, and every layer's keys and values, by tokens+past."""
    differences = Differences()
    for prompt in prompts:
        feed = {"inputs_embeds": prompt.embeds[None, prompt.past :]}
        for name, array in prompt.outputs.items():
            if name.startswith("present."):
                past = name.replace("present.", "past.")
                feed[past] = np.ascontiguousarray(array[:, :, : prompt.past])
        differences.add(prompt.length, runner(feed), prompt.outputs)
    return differences


def decoder_parity(decoder: Decoder, prompts: list[Prompt]) -> Differences:
    """The same of ONNX Runtime's decoder, which fills its own cache."""
    capacity = max(len(prompt.embeds) for prompt in prompts)
    differences = Differences()
    for prompt in prompts:
        cache = decoder.open_cache(capacity)
        assert isinstance(cache, OrtCache)
        if prompt.past:
            decoder.run(prompt.embeds[: prompt.past], cache, 0)
        logits = decoder.run(prompt.embeds[prompt.past :], cache, prompt.past).logits
        outputs = {"logits": logits[None, None], **cache.present(len(prompt.embeds))}
        differences.add(prompt.length, outputs, prompt.outputs)
    return differences
