"""LLMs of the supported families: loading, what the manifest records of them, and their graph.

No family is known by its name: what it does differently is in its configuration, its tokenizer or
its modules, and the graph is traced from transformers' own code.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from tiny_align.export.gguf_llm import GgufLlm
from tiny_align.export.gguf_tokenizer import read_tokenizer
from tiny_align.export.graphs import Graph, export_program
from tiny_align.export.model_folder import model_folder
from tiny_align.export.packing import pack_products
from tiny_align.export.pretrained import load_pretrained, load_whole
from tiny_align.export.program_weights import name_weights
from tiny_align.export.prompts import choose_template, turn_end
from tiny_align.runtime.bundle.manifest import LlmSpec, TensorSpec
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LLMS = (
    "llama",  # SmolLM2 too
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "stablelm",
    "smollm3",
)
# Sizes that no other dimension has.
EXAMPLE_PAST = 5
EXAMPLE_TOKENS = 7


# --- loading ---


def load_llm(
    path: str, chat_template: str | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """The LLM in FP32 and its tokenizer.

    Raises:
        TinyAlignError: as `model_folder`, `load_tokenizer` and `load_model`.
    """
    folder = model_folder(path, "LLM", LLMS)
    tokenizer = load_tokenizer(folder, chat_template)
    return load_model(folder, tokenizer), tokenizer


def load_model(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """The LLM of a `model_folder`, which may be a GGUF file, in FP32.

    Raises:
        TinyAlignError: as `load_whole` or `GgufLlm`, or a tokenizer of another model.
    """
    from transformers import AutoModelForCausalLM

    if folder.is_file():
        model = GgufLlm(folder).load_model()
    else:
        model = load_whole(AutoModelForCausalLM, folder, dtype=torch.float32)
    # Every token of a text needs its row; more rows are padding. Added special tokens may be beyond
    # the table, as Gemma 3's of an image is: no text contains them, and the runtime refuses them.
    rows = input_embedding(model).num_embeddings
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = max(set(tokenizer.get_vocab().values()) - special, default=-1)
    if largest >= rows:
        raise TinyAlignError(
            f"{folder}: its tokenizer goes up to token {largest}, its embedding table has {rows} "
            "rows: they belong to different models"
        )
    return model


def load_tokenizer(folder: Path, chat_template: str | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a `model_folder` or GGUF file, with one chat template.

    It truncates no text.

    Args:
        chat_template: the name of one of its templates, or a file; None: its default or only
            fitting one.
    Raises:
        TinyAlignError: no such template, or a damaged or slow tokenizer.
    """
    from transformers import AutoTokenizer

    if folder.is_file():
        tokenizer = read_tokenizer(GgufLlm(folder))
    else:
        tokenizer = load_pretrained(AutoTokenizer, folder)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TinyAlignError(
            f"{folder} has a tokenizer without a tokenizer.json: convert it with transformers first"
        )
    tokenizer.backend_tokenizer.no_truncation()  # some files keep the lengths of their training
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.chat_template = choose_template(tokenizer, chat_template)
    return tokenizer


# --- what the manifest records ---


def llm_spec(
    llm: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", max_context: int
) -> LlmSpec:
    """What the runtime needs to know of the LLM."""
    heads, size = kv_shape(llm.config)
    return LlmSpec(
        vocabulary=llm.config.vocab_size,
        hidden_size=llm.config.hidden_size,
        n_layers=llm.config.num_hidden_layers,
        n_kv_heads=heads,
        head_size=size,
        end_tokens=end_tokens(llm, tokenizer),
        max_context=min(max_context, longest_context(llm.config)),
        embedding_scale=embedding_scale(llm),
    )


def listed_end_tokens(llm: "PreTrainedModel") -> list[int]:
    """The end tokens of the generation configuration, which names one, several or none."""
    assert llm.generation_config is not None
    listed = llm.generation_config.eos_token_id
    if listed is None:
        return []
    return listed if isinstance(listed, list) else [listed]


def end_tokens(llm: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """Tokens that end an answer: of the generation configuration, tokenizer and chat template.

    Raises:
        TinyAlignError: there is none, so that no answer would ever end.
    """
    found = listed_end_tokens(llm)
    if tokenizer.eos_token_id is not None:
        found = [*found, tokenizer.eos_token_id]
    found = [*found, *turn_end(tokenizer)]
    if not found:
        raise TinyAlignError(
            "the LLM has no end token: name one in its generation_config.json (eos_token_id)"
        )
    return tuple(dict.fromkeys(found))


def longest_context(config: "PreTrainedConfig") -> int:
    """Positions for which one set of rotary frequencies holds.

    Longrope (Phi-3.5) changes to another set beyond its original context, for the keys in the cache
    as well. The graph keeps to the first.
    """
    ropes = config.rope_parameters
    if "rope_type" in ropes:  # one for all layers; else one per kind of layer
        ropes = {"all": ropes}
    longest = config.max_position_embeddings
    for rope in ropes.values():
        if rope["rope_type"] == "longrope":
            longest = min(longest, rope["original_max_position_embeddings"])
    return longest


def input_embedding(llm: "PreTrainedModel") -> torch.nn.Embedding:
    """The module that looks up tokens; its weight is the embedding table."""
    embedding = llm.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    return embedding


def embedding_scale(llm: "PreTrainedModel") -> float:
    """The factor of a row of the table when the LLM looks a token up (Gemma: the root of D)."""
    embedding = input_embedding(llm)
    scale = float(getattr(embedding, "embed_scale", 1.0))
    ids = torch.arange(min(8, len(embedding.weight)))
    with torch.no_grad():
        if not torch.allclose(embedding(ids), embedding.weight[ids] * scale, atol=0, rtol=1e-5):
            raise TinyAlignError(
                "the LLM's embedding is not its table times a number: it cannot be exported"
            )
    return scale


def embedding_table(llm: "PreTrainedModel") -> np.ndarray:
    """(V, D) float16: the rows as stored, before `embedding_scale`.

    Raises:
        TinyAlignError: a value that float16 cannot hold.
    """
    with np.errstate(over="ignore"):
        # Row by row, though the weight may be a view of its transpose.
        table = input_embedding(llm).weight.detach().numpy().astype(np.float16, order="C")
    if not np.isfinite(table).all():
        raise TinyAlignError(
            "the LLM's embedding table has values beyond float16, or none: download it again"
        )
    return table


# --- the graph ---


def kv_shape(config: "PreTrainedConfig") -> tuple[int, int]:
    """(key-value heads, head size) of an LLM's configuration."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head


def kv_specs(config: "PreTrainedConfig", prefix: str, length: str) -> tuple[TensorSpec, ...]:
    """Keys and values (1, heads, length, size) of every layer.

    Args:
        prefix: "past" or "present".
        length: the name of the dimension.
    """
    heads, size = kv_shape(config)
    specs = []
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            name = f"{prefix}.{layer}.{part}"
            specs.append(TensorSpec(name, "float32", (1, heads, length, size)))
    return tuple(specs)


def llm_graph(llm: "PreTrainedModel") -> Graph:
    """inputs_embeds (1, tokens, D) and past keys and values -> logits (1, 1, V) and present ones.

    The logits are the last position's. The past of every layer is whole, also where the layer
    attends to a sliding window: the mask applies it.
    """
    from transformers import DynamicCache

    config = llm.config
    heads, size = kv_shape(config)
    cache = DynamicCache()  # without the configuration, so that no layer drops its past
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn(2, 1, heads, EXAMPLE_PAST, size)
        cache.update(keys, values, layer)
    inputs = {
        "inputs_embeds": torch.randn(1, EXAMPLE_TOKENS, config.hidden_size),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    with fixed_frequencies(llm):
        program = export_program(llm, inputs)
    name_weights(program.graph, llm.named_parameters())
    pack_products(program)
    return Graph(
        program,
        inputs=(
            TensorSpec("inputs_embeds", "float32", (1, "tokens", config.hidden_size)),
            *kv_specs(config, "past", "past"),
        ),
        outputs=(
            TensorSpec("logits", "float32", (1, 1, config.vocab_size)),
            *kv_specs(config, "present", "total"),
        ),
    )


@runtime_checkable
class _Rotary(Protocol):
    """A module with rotary frequencies; of one kind, or of one for each kind of layer."""

    rope_type: str | dict[str, str]


@contextlib.contextmanager
def fixed_frequencies(llm: "PreTrainedModel") -> Iterator[None]:
    """Keep the test whether rotary frequencies change with the length out of a trace.

    Within `longest_context` they do not.
    """
    modules = [module for module in llm.modules() if isinstance(module, _Rotary)]
    types = [module.rope_type for module in modules]
    for module, rope_type in zip(modules, types):
        if isinstance(rope_type, dict):
            module.rope_type = dict.fromkeys(rope_type, "default")
        else:
            module.rope_type = "default"
    try:
        yield
    finally:
        for module, rope_type in zip(modules, types):
            module.rope_type = rope_type
