"""LLMs of the supported families: loading, what the manifest says of them, and their graph.

A family is not known by its name: what it does differently is in its configuration, its tokenizer or its modules, and
the graph is traced from transformers' own code.
"""

import contextlib
from pathlib import Path

import numpy as np

from tiny_align.export.graphs import Graph, export_program
from tiny_align.export.model_folder import model_folder
from tiny_align.export.packing import pack_products
from tiny_align.export.pretrained import load_pretrained, load_whole
from tiny_align.export.prompts import choose_template, turn_end
from tiny_align.runtime.bundle.manifest import LlmSpec, TensorSpec
from tiny_align.runtime.errors import TinyAlignError

LLMS = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "stablelm",
    "smollm3",
)  # SmolLM2 is a llama
EXAMPLE_PAST, EXAMPLE_TOKENS = 5, 7  # sizes that no other dimension has


def load_llm(path: str, chat_template: str | None = None):
    """The LLM in FP32 and its tokenizer.

    Raises:
        TinyAlignError: as `model_folder`, `load_tokenizer` and `load_model`.
    """
    folder = model_folder(path, "LLM", LLMS)
    tokenizer = load_tokenizer(folder, chat_template)
    return load_model(folder, tokenizer), tokenizer


def load_model(folder: Path, tokenizer):
    """The LLM of a `model_folder` in FP32.

    Raises:
        TinyAlignError: as `load_whole`, or a tokenizer of another model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = load_whole(AutoModelForCausalLM, folder, dtype=torch.float32)
    _check_rows(folder, tokenizer, len(model.get_input_embeddings().weight))
    return model


def load_tokenizer(folder: Path, chat_template: str | None = None):
    """The tokenizer of a `model_folder`, with one chat template; no text is cut.

    Args:
        chat_template: the name of one of its templates, or a file; None: its default or only fitting one.
    Raises:
        TinyAlignError: no such template, or a damaged or slow tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, folder)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise TinyAlignError(
            f"{folder} has a tokenizer without a tokenizer.json: convert it with transformers first"
        )
    tokenizer.backend_tokenizer.no_truncation()  # some files keep the lengths of their training
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.chat_template = choose_template(tokenizer, chat_template)
    return tokenizer


def _check_rows(path: Path, tokenizer, rows: int) -> None:
    """Every token of a text must have its row in the embedding table.

    More rows than tokens are padding. Added special tokens may be beyond it, as Gemma 3's of an image is: they stand
    in no words, and the runtime refuses them.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if (largest := max(set(tokenizer.get_vocab().values()) - special, default=-1)) >= rows:
        raise TinyAlignError(
            f"{path}: its tokenizer goes up to token {largest}, its embedding table has {rows} rows: "
            "they belong to different models"
        )


def llm_spec(llm, tokenizer, max_context: int) -> LlmSpec:
    """What the runtime must know of the LLM."""
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


def end_tokens(llm, tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: the generation configuration's, the tokenizer's and the chat template's.

    Raises:
        TinyAlignError: there is none, so that no answer would ever end.
    """
    listed = llm.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    found = [i for i in (*listed, tokenizer.eos_token_id, *turn_end(tokenizer)) if i is not None]
    if not found:
        raise TinyAlignError(
            "the LLM has no end token: name one in its generation_config.json (eos_token_id)"
        )
    return tuple(dict.fromkeys(found))


def longest_context(config) -> int:
    """Positions that one set of rotary frequencies is for.

    Longrope (Phi-3.5) changes to another set beyond its original context, for the keys in the cache as well: the
    graph keeps to the first.
    """
    ropes = config.rope_parameters
    ropes = (
        [ropes] if "rope_type" in ropes else ropes.values()
    )  # one for all layers, or one per kind of layer
    original = [
        r["original_max_position_embeddings"] for r in ropes if r["rope_type"] == "longrope"
    ]
    return min([config.max_position_embeddings, *original])


def embedding_scale(llm) -> float:
    """What the LLM multiplies a row of its table by when it looks a token up (Gemma: the root of D)."""
    import torch

    embedding = llm.get_input_embeddings()
    scale = float(getattr(embedding, "embed_scale", 1.0))
    ids = torch.arange(min(8, len(embedding.weight)))
    with torch.no_grad():
        if not torch.allclose(embedding(ids), embedding.weight[ids] * scale, atol=0, rtol=1e-5):
            raise TinyAlignError(
                "the LLM's embedding is not its table times a number: it cannot be exported"
            )
    return scale


def embedding_table(llm) -> np.ndarray:
    """(V, D) float16: the rows as they are kept, before `embedding_scale`.

    Raises:
        TinyAlignError: a value that float16 cannot hold.
    """
    with np.errstate(over="ignore"):
        table = llm.get_input_embeddings().weight.detach().numpy().astype(np.float16)
    if not np.isfinite(table).all():
        raise TinyAlignError(
            "the LLM's embedding table has values beyond float16, or none: download it again"
        )
    return table


def kv_shape(config) -> tuple[int, int]:
    """(key-value heads, head size) of an LLM's configuration."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head


def llm_graph(llm) -> Graph:
    """inputs_embeds (1, tokens, D) and past keys and values -> the last position's logits, and all of them.

    The past of every layer is whole, also where the layer looks through a sliding window: the mask applies it.
    """
    import torch
    from transformers import DynamicCache

    config, cache = llm.config, DynamicCache()  # without the configuration: no layer forgets
    heads, size = kv_shape(config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 1, heads, EXAMPLE_PAST, size), layer)
    embeds = torch.randn(1, EXAMPLE_TOKENS, config.hidden_size)
    inputs = {
        "inputs_embeds": embeds,
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    with fixed_frequencies(llm):
        program = export_program(llm, inputs)
    pack_products(program)
    return Graph(
        program,
        (
            TensorSpec("inputs_embeds", "float32", (1, "tokens", config.hidden_size)),
            *kv_specs(config, "past", "past"),
        ),
        (
            TensorSpec("logits", "float32", (1, 1, config.vocab_size)),
            *kv_specs(config, "present", "total"),
        ),
    )


@contextlib.contextmanager
def fixed_frequencies(llm):
    """Within `longest_context` no rotary frequency changes with the length: do not trace the question whether."""
    modules = [m for m in llm.modules() if hasattr(m, "rope_type")]
    kinds = [m.rope_type for m in modules]
    for module, kind in zip(modules, kinds):
        module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    try:
        yield
    finally:
        for module, kind in zip(modules, kinds):
            module.rope_type = kind


def kv_specs(config, prefix: str, length: str) -> tuple[TensorSpec, ...]:
    heads, size = kv_shape(config)
    return tuple(
        TensorSpec(f"{prefix}.{layer}.{part}", "float32", (1, heads, length, size))
        for layer in range(config.num_hidden_layers)
        for part in ("key", "value")
    )
