"""An LLM in a GGUF file -> transformers' model in FP32, and the blocks that the file stores.

What a family of llama.cpp's leaves out of the file, because its code knows it, is here. Everything
that can be refused is refused from the header, before a weight is read.
"""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from tiny_align.export.gguf_file import (
    BLOCKS,
    FLOATS,
    TYPES,
    GgufFile,
    StoredBlocks,
    sensible_header,
)
from tiny_align.export.model_folder import GGUF, damaged
from tiny_align.export.pretrained import build_whole
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

MODEL_TYPES = {  # llama.cpp's name of an architecture -> transformers'
    "llama": "llama",  # SmolLM2 too
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "stablelm": "stablelm",
    "smollm3": "smollm3",
}
# llama.cpp rotates rows 0 and 1 of a head together, transformers 0 and d / 2: its converter
# reorders the rows of these.
PAIRED = ("llama", "smollm3")
GEMMAS = ("gemma2", "gemma3")
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}  # layers of the 27B model, which scales otherwise
DEFAULT_THETA = 10_000.0  # of rotary positions
# Tensors that are no weights: what rotary frequencies are divided by.
FREQUENCIES = "rope_freqs.weight"
SHORT_FACTORS = "rope_factors_short.weight"
LONG_FACTORS = "rope_factors_long.weight"
ROPE_TENSORS = (FREQUENCIES, SHORT_FACTORS, LONG_FACTORS)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
END_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")
OTHER_KINDS = {  # general.type -> what it is, and what to do
    "adapter": (
        "a LoRA adapter",
        "merge it into its base model with llama-export-lora, and give the merged file",
    ),
    "mmproj": ("the image or audio encoder beside an LLM", "give the LLM's own file"),
    "imatrix": ("an importance matrix, not a model", "give the model's file"),
}


class GgufLlm:
    """An LLM in a GGUF file, whose header is checked; weights are read as they are asked for.

    Attributes:
        config: transformers' configuration.
        kind: transformers' class of the model.
        parameters: name of each parameter in transformers -> name of its tensor in the file.
    """

    def __init__(self, path: Path):
        """Read the header.

        Raises:
            TinyAlignError: as `GgufFile`; not one whole LLM of a supported architecture with a
                vocabulary, or a tensor that is missing, unknown, of another shape or of a type that
                is not read.
        """
        self.path = path
        self.file = GgufFile(path)
        with sensible_header(path):
            self._read_header()

    def _read_header(self) -> None:
        self.architecture = str(self.get("general.architecture", ""))
        self._refuse_other_kinds()
        self.config = self._config()
        skeleton = self._skeleton()
        self.kind = type(skeleton)
        shapes = {name: tuple(value.shape) for name, value in skeleton.named_parameters()}
        names = get_tensor_name_map(_gguf_architecture(self.architecture), self._n_layers)
        self.parameters = {}
        for name in shapes:
            stem, _, kind = name.rpartition(".")
            self.parameters[name] = f"{names.get_name(stem) or stem}.{kind}"
        self._check_tensors(shapes)

    # --- fields ---

    def get(self, name: str, default: Any = None) -> Any:
        """A field's value; `default` if the file lacks it."""
        return self.file.fields.get(name, default)

    def size(self, name: str) -> Any:
        """A field of the architecture's own; None if the file lacks it."""
        value = self.get(f"{self.architecture}.{name}")
        if isinstance(value, float):
            return float(str(np.float32(value)))  # 1e-06, not 9.99999997e-07
        return value

    def needed_size(self, name: str) -> Any:
        """The same.

        Raises:
            TinyAlignError: the file lacks it, or it differs from layer to layer.
        """
        value = self.size(name)
        if value is None or isinstance(value, np.ndarray | list):
            problem = "it lacks" if value is None else "there is a list of numbers, not one, for"
            raise damaged(self.path, f"{problem} {self.architecture}.{name}")
        return value

    def special_ids(self) -> dict[str, int]:
        """The ids that transformers' configurations name: bos_token_id, eos_token_id, ..."""
        ids = {}
        for name in SPECIAL_IDS:
            field = "padding_token_id" if name == "pad_token_id" else name
            number = self.get(f"tokenizer.ggml.{field}")
            if number is not None:
                ids[name] = int(number)
        return ids

    def end_tokens(self) -> list[int]:
        """The tokens that end an answer, by the file."""
        ends = [self.get(f"tokenizer.ggml.{field}") for field in END_FIELDS]
        return list(dict.fromkeys(int(end) for end in ends if end is not None))

    @property
    def _n_layers(self) -> int:
        return int(self.needed_size("block_count"))

    # --- what is refused ---

    def _refuse_other_kinds(self) -> None:
        """Refuse a part of a model, something beside a model, and an unsupported one."""
        kind = self.get("general.type", "model")
        if self.architecture == "clip":
            kind = "mmproj"
        if kind in OTHER_KINDS:
            what, remedy = OTHER_KINDS[kind]
            raise TinyAlignError(f"{self.path} is {what}: {remedy}")
        n_parts = int(self.get("split.count", 1))
        if n_parts > 1:
            part = int(self.get("split.no", 0)) + 1
            raise TinyAlignError(
                f"{self.path} is part {part} of {n_parts} of a split model: join them with "
                f"`llama-gguf-split --merge FIRST_PART WHOLE{GGUF}`, and give the whole"
            )
        if self.architecture not in MODEL_TYPES:
            encoder = " (an encoder, which writes no text)" if "bert" in self.architecture else ""
            raise TinyAlignError(
                f"{self.path} is a {self.architecture!r}{encoder}; supported LLMs in GGUF files: "
                f"{', '.join(MODEL_TYPES)}"
            )
        if self.size("pooling_type"):
            raise TinyAlignError(
                f"{self.path} is an embedding or reranking model, which writes no text: give a "
                "chat model"
            )
        if self.size("expert_count"):
            raise TinyAlignError(f"{self.path} is a mixture of experts: give a dense model")
        if not self.file.tensors:
            raise TinyAlignError(f"{self.path} holds no weights: give the model's file")
        if not self.get("tokenizer.ggml.tokens"):
            raise damaged(self.path, "its vocabulary has no tokens", "Give a file with a tokenizer")
        if self._n_layers > len(self.file.tensors):
            raise damaged(self.path, f"it lacks the tensors of its {self._n_layers:,} layers")

    def _check_tensors(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse missing, unknown, unread and misshapen tensors by name."""
        tensors = self.file.tensors
        for tensor in tensors.values():
            if tensor.kind.name not in TYPES:
                raise TinyAlignError(
                    f"{self.path}: its tensor {tensor.name} is {tensor.kind.name}, expected one of "
                    f"{', '.join(TYPES)}: give another quantisation of the model, best F16 or Q8_0"
                )
        for name, shape in shapes.items():
            stored = self.parameters[name]
            if stored not in tensors:
                raise damaged(self.path, f"it lacks the tensor {stored}")
            if tensors[stored].shape != shape:
                sizes = f"expected {list(shape)} by its header, got {list(tensors[stored].shape)}"
                raise damaged(self.path, f"its tensor {stored} has another shape: {sizes}")
        for name in sorted(tensors.keys() - {*self.parameters.values(), *ROPE_TENSORS}):
            raise TinyAlignError(
                f"{self.path}: its tensor {name} has no place in a {self.config.model_type!r}, as "
                "transformers computes it: give another conversion, or the folder it was made from"
            )
        n_tokens = len(self.get("tokenizer.ggml.tokens"))
        if n_tokens > self.config.vocab_size:
            raise damaged(
                self.path,
                f"it has {n_tokens} tokens, its embedding table {self.config.vocab_size} rows",
            )

    def _skeleton(self) -> "PreTrainedModel":
        """The model without memory for its weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    # --- configuration ---

    def _config(self) -> "PreTrainedConfig":
        from transformers import AutoConfig

        table = self.file.tensors.get("token_embd.weight")
        if table is None:
            raise damaged(self.path, "it lacks the tensor token_embd.weight")
        n_heads = self.needed_size("attention.head_count")
        hidden_size = self.needed_size("embedding_length")
        head_size = self.size("attention.key_length") or hidden_size // n_heads
        settings = {
            **dict.fromkeys(SPECIAL_IDS),
            **self.special_ids(),
            "vocab_size": table.shape[0],
            "hidden_size": hidden_size,
            "intermediate_size": self.needed_size("feed_forward_length"),
            "num_hidden_layers": self._n_layers,
            "num_attention_heads": n_heads,
            "num_key_value_heads": self.size("attention.head_count_kv") or n_heads,
            "head_dim": head_size,
            "max_position_embeddings": self.needed_size("context_length"),
            "rms_norm_eps": self.size("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.file.tensors,
            "rope_parameters": self._rope(head_size),
        }
        model_type = MODEL_TYPES[self.architecture]
        return AutoConfig.for_model(model_type, **settings | self._peculiar(settings))

    def _peculiar(self, common: dict[str, Any]) -> dict[str, Any]:
        """What the architecture adds to the common settings, or changes in them."""
        tensors = self.file.tensors
        window = self.size("attention.sliding_window")
        if self.architecture == "llama":
            return {
                "attention_bias": "blk.0.attn_q.bias" in tensors,
                "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            }
        if self.architecture in GEMMAS:
            return self._of_gemma(common)
        if self.architecture == "phi3":
            original = self.size("rope.scaling.original_context_length")
            return {
                "sliding_window": window or None,
                "original_max_position_embeddings": original or common["max_position_embeddings"],
            }
        if self.architecture == "stablelm":
            return {
                "layer_norm_eps": self.size("attention.layer_norm_epsilon"),
                "use_qkv_bias": "blk.0.attn_q.bias" in tensors,
                "use_parallel_residual": bool(self.size("use_parallel_residual")),
            }
        return {}  # of Qwen and SmolLM3, transformers' defaults are llama.cpp's

    def _of_gemma(self, common: dict[str, Any]) -> dict[str, Any]:
        head_size = common["head_dim"]
        if common["num_hidden_layers"] == LARGEST_GEMMA[self.architecture]:
            head_size = common["hidden_size"] // common["num_attention_heads"]
        settings = {
            "query_pre_attn_scalar": head_size,
            "sliding_window": self.needed_size("attention.sliding_window"),
            "attn_logit_softcapping": self.size("attn_logit_softcapping"),
            "final_logit_softcapping": self.size("final_logit_softcapping"),
            "tie_word_embeddings": True,
        }
        pattern = self.size("attention.sliding_window_pattern")
        if isinstance(pattern, np.ndarray):  # else transformers' own, which is llama.cpp's
            kinds = ("full_attention", "sliding_attention")
            settings["layer_types"] = [kinds[int(is_sliding)] for is_sliding in pattern]
        if self.architecture == "gemma3":
            theta = self.size("rope.freq_base_swa") or DEFAULT_THETA
            settings["rope_parameters"] = {
                "full_attention": common["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": theta},
            }
        return settings

    # --- rotary positions ---

    def _rope(self, head_size: int) -> dict[str, Any]:
        """transformers' `rope_parameters`.

        Llama 3's and LongRoPE's frequencies are divided by factors that the file lists.
        """
        rope: dict[str, Any] = {"rope_theta": self.size("rope.freq_base") or DEFAULT_THETA}
        n_rotary = self.size("rope.dimension_count") or head_size
        if n_rotary != head_size:
            rope["partial_rotary_factor"] = n_rotary / head_size
        context = self.needed_size("context_length")
        if FREQUENCIES in self.file.tensors:
            factors = self._factors(FREQUENCIES)
            scaling = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
            return rope | scaling | _longrope(context)
        original = self.size("rope.scaling.original_context_length") or context
        if SHORT_FACTORS in self.file.tensors and LONG_FACTORS in self.file.tensors:
            scaling = {
                "short_factor": self._factors(SHORT_FACTORS),
                "long_factor": self._factors(LONG_FACTORS),
                "attention_factor": self.size("rope.scaling.attn_factor") or 1.0,
            }
            return rope | scaling | _longrope(original)
        kind = self.size("rope.scaling.type") or "none"
        if kind == "none":
            return rope | {"rope_type": "default"}
        if kind == "linear":
            return rope | {"rope_type": kind, "factor": self.needed_size("rope.scaling.factor")}
        if kind == "yarn":
            return rope | {
                "rope_type": kind,
                "factor": self.needed_size("rope.scaling.factor"),
                "original_max_position_embeddings": original,
            }
        raise TinyAlignError(
            f"{self.path}: its rotary positions are scaled by {kind!r}, expected linear, yarn or a "
            f"tensor {FREQUENCIES}: give another conversion, or the folder it was made from"
        )

    def _factors(self, name: str) -> list[float]:
        return self.file.read(name).astype(float).tolist()

    # --- weights ---

    def weights(self, name: str) -> np.ndarray:
        """A parameter by its name in transformers: float32, rows in transformers' order."""
        stored = self.parameters[name]
        values = self.file.read(stored)
        if self.architecture in GEMMAS and stored.endswith("_norm.weight"):
            return values - 1  # llama.cpp multiplies by w, transformers by 1 + w
        rows = self._rows(stored, len(values))
        return values if rows is None else values[rows]

    def stored_blocks(self, name: str) -> StoredBlocks | None:
        """The same as the file stores it; None unless its type is Q4_0, Q4_1 or Q8_0."""
        stored = self.parameters[name]
        blocks = self.file.read_blocks(stored)
        if blocks is None:
            return None
        rows = self._rows(stored, len(blocks.codes))
        if rows is None:
            return blocks
        minima = None if blocks.minima is None else blocks.minima[rows]
        return StoredBlocks(blocks.codes[rows], blocks.scales[rows], minima, blocks.bits)

    def module_blocks(self, module: str) -> StoredBlocks | None:
        """The same for a module's weight; a tied output layer's is the embedding table."""
        name = f"{module}.weight"
        if name not in self.parameters:
            name = "model.embed_tokens.weight"
        return self.stored_blocks(name)

    def _rows(self, stored: str, n_rows: int) -> np.ndarray | None:
        """The order of a tensor's rows in transformers; None if it is the file's."""
        paired = re.search(r"\.attn_([qk])\.", stored)
        if self.architecture not in PAIRED or paired is None:
            return None
        heads = self.config.num_attention_heads
        if paired[1] == "k":
            heads = self.config.num_key_value_heads
        pairs = np.arange(n_rows).reshape(heads, n_rows // heads // 2, 2)
        return pairs.swapaxes(1, 2).reshape(n_rows)

    def load_model(self) -> "PreTrainedModel":
        """The LLM in FP32.

        Raises:
            TinyAlignError: a weight is NaN or infinite.
        """
        from transformers import GenerationConfig

        anew = self.types_stored_anew()
        if anew:
            log.warning(
                "%s: its %s weights are dequantised and stored anew in the bundle's precision "
                "(--precision)",
                self.path,
                ", ".join(anew),
            )
        tensors = {name: torch.from_numpy(self.weights(name)) for name in self.parameters}
        model = build_whole(self.kind, self.config, tensors, str(self.path))
        ends = self.end_tokens()
        model.generation_config = GenerationConfig(
            **self.special_ids() | ({"eos_token_id": ends} if len(ends) > 1 else {})
        )
        return model

    def types_stored_anew(self) -> list[str]:
        """The types of matrices whose blocks no graph can take over, sorted."""
        kinds = set()
        for stored in self.parameters.values():
            tensor = self.file.tensors[stored]
            if len(tensor.shape) == 2 and tensor.kind.name not in (*FLOATS, *BLOCKS):
                kinds.add(tensor.kind.name)
        return sorted(kinds)


def _longrope(original: int) -> dict[str, Any]:
    return {"rope_type": "longrope", "original_max_position_embeddings": original}


def _gguf_architecture(name: str) -> Any:
    """The constant of the package `gguf` for an architecture's name."""
    return next(number for number, text in MODEL_ARCH_NAMES.items() if text == name)
