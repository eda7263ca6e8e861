"""Whisper base: CTranslate2's model.bin, as faster-whisper uses it, to a checkpoint in FP16.

Sizes are the file's; what transformers' `generate` must know is in config.json and tokenizer.json
beside it.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tiny_align.reference.checkpoints import write_generation_config, write_model
from tiny_align.reference.ctranslate2_format import read_variables
from tiny_align.runtime.files import write_json

HEAD_SIZE = 64  # of every Whisper
MAX_INITIAL_TIMESTAMP = 50  # 1 s
KINDS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
OUTER = {
    "embeddings": "embed_tokens",
    "position_encodings": "embed_positions",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
JOINED = {  # CTranslate2's name of a layer's product -> transformers' names of its parts
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
TOKENIZER = {
    "tokenizer_class": "WhisperTokenizer",
    "processor_class": "WhisperProcessor",
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "model_max_length": 448,
}


def write_whisper(model_bin: Path, settings: Path, tokenizer: Path, folder: Path) -> None:
    """Write a WhisperForConditionalGeneration.

    Args:
        model_bin: the whole file, its parts joined.
        settings: the config.json beside it.
        tokenizer: the tokenizer.json beside it.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    variables = read_variables(model_bin)
    weights = _weights(variables)
    ids = _token_ids(tokenizer)
    vocabulary_size, hidden_size = weights["model.decoder.embed_tokens.weight"].shape
    n_layers = 1 + max(int(name.split(".")[3]) for name in weights if ".layers." in name)
    inner_size = len(weights["model.encoder.layers.0.fc1.bias"])
    n_heads = hidden_size // HEAD_SIZE
    special: dict[str, Any] = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
    }
    config = WhisperConfig(
        vocab_size=vocabulary_size,
        d_model=hidden_size,
        encoder_layers=n_layers,
        decoder_layers=n_layers,
        encoder_attention_heads=n_heads,
        decoder_attention_heads=n_heads,
        encoder_ffn_dim=inner_size,
        decoder_ffn_dim=inner_size,
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        **special,
    )
    write_model(folder, WhisperForConditionalGeneration, config, weights)
    generation = _generation(json.loads(settings.read_text(encoding="utf-8")), ids)
    write_generation_config(folder, max_length=config.max_target_positions, **generation, **special)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", TOKENIZER)


def _weights(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The name of a parameter in transformers -> float16 array."""
    weights = {}
    for name, array in variables.items():
        if array.dtype != np.float16 or array.ndim == 0:  # a setting, "decoder/num_heads"
            continue
        half, *inner, kind = name.split("/")
        kind = KINDS.get(kind, kind)
        if not inner[0].startswith("layer_") or inner[0] == "layer_norm":
            weights[f"model.{half}.{OUTER[inner[0]]}.{kind}"] = array
            continue
        layer = f"model.{half}.layers.{inner[0].removeprefix('layer_')}"
        modules = JOINED["/".join(inner[1:])]
        for module, part in zip(modules, np.split(array, len(modules))):
            has_bias = not module.endswith("k_proj")  # there the file has zeros
            if kind == "weight" or has_bias:
                weights[f"{layer}.{module}.{kind}"] = part
    return weights


def _token_ids(tokenizer: Path) -> dict[str, int]:
    """The special tokens of a tokenizer.json."""
    added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def _generation(settings: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """What `generate` must know: languages, tasks, and tokens that are never written."""
    languages = set(settings["lang_ids"])
    return {
        "is_multilingual": True,
        "lang_to_id": {token: number for token, number in ids.items() if number in languages},
        "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "return_timestamps": False,
        "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP,
        "alignment_heads": settings["alignment_heads"],
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
    }
