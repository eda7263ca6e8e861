"""llama.cpp's own forms of an LLM: GGUF files from a model in PyTorch, and what they answer.

Sizes and tokenizer are copied from a GGUF file of the same model; the weights are the model's.
llama.cpp (the package `llama-cpp-python`) quantises and runs the files.
"""

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiny_align.benchmarks.standard.peers import Llama
from tiny_align.benchmarks.standard.training_cost import Shape
from tiny_align.benchmarks.studies.next_tokens import Logits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

TYPES = {  # llama.cpp's number of a form (llama_ftype)
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q4_K_M": 15,
    "Q5_K_M": 17,
}
CHANGED = ("GGUF.", "general.file_type", "general.quantization_version")  # fields not copied
ARCHITECTURES = {"llama": "LLAMA", "gemma3_text": "GEMMA3"}  # by model_type: gguf's


def write_gguf(model: "PreTrainedModel", like: Path, target: Path) -> None:
    """Write the model's weights in FP32 with the fields of `like`, a file of the same model.

    Raises:
        ValueError: a family whose weights llama.cpp orders otherwise.
    """
    import gguf

    config = model.config
    if config.model_type not in ARCHITECTURES:
        expected = ", ".join(ARCHITECTURES)
        raise ValueError(f"expected a model of {expected}, got {config.model_type}")
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    for name, field in gguf.GGUFReader(like).fields.items():
        if not name.startswith((*CHANGED, "general.architecture")):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for name, parameter in model.named_parameters():
        tensor = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(tensor, _reordered(name, parameter.detach().numpy(), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _reordered(name: str, values: np.ndarray, config: "PreTrainedConfig") -> np.ndarray:
    """A parameter as llama.cpp stores it."""
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return values + 1
    if config.model_type == "llama" and name.endswith("q_proj.weight"):
        return _join_rotary_pairs(values, config.num_attention_heads)
    if config.model_type == "llama" and name.endswith("k_proj.weight"):
        return _join_rotary_pairs(values, config.num_key_value_heads)
    return values


def _join_rotary_pairs(matrix: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder rows: transformers rotates rows 0 and d / 2 of a head together, llama.cpp 0 and 1."""
    n_rows, n_columns = matrix.shape
    pairs = matrix.reshape(n_heads, 2, n_rows // n_heads // 2, n_columns)
    return pairs.swapaxes(1, 2).reshape(n_rows, n_columns)


def quantise_gguf(source: Path, target: Path, kind: str) -> None:
    """Write `target` by llama.cpp's quantiser, without an importance matrix.

    Args:
        kind: one of TYPES.
    Raises:
        RuntimeError: llama.cpp refuses.
    """
    import llama_cpp as api

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    options = api.llama_model_quantize_default_params()
    options.nthread = 1
    options.ftype = TYPES[kind]
    status = api.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(options)
    )
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} for {kind}")


def describe_gguf(path: Path) -> dict[str, Any]:
    """Bytes of the file, of its table and of its layers, and tensors by type, norms apart."""
    from gguf import GGUFReader

    outer = 0
    layers = 0
    kinds: dict[str, int] = {}
    for tensor in GGUFReader(path).tensors:
        if tensor.name.startswith("blk."):
            layers += int(tensor.n_bytes)
        else:
            outer += int(tensor.n_bytes)
        if len(tensor.shape) > 1:
            kind = tensor.tensor_type.name
            kinds[kind] = kinds.get(kind, 0) + 1
    return {
        "file_bytes": path.stat().st_size,
        "table_bytes": outer,
        "layers_bytes": layers,
        "tensors": kinds,
    }


def load_llama(path: Path, config: "PreTrainedConfig", threads: int = 1) -> Llama:
    """A GGUF file of a model of this configuration, in llama.cpp."""
    shape = Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        head_size=config.head_dim,
    )
    return Llama(path, shape, threads)


def llama_logits(llama: Llama) -> Logits:
    """Of a file in llama.cpp: one pass over a prompt and its answer."""

    def logits(prompt: list[int], answer: list[int]) -> np.ndarray:
        llama.rewind(0)
        return llama.logits(prompt + answer[:-1])[-len(answer) :]

    return logits
