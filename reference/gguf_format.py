"""LLMs in GGUF, llama.cpp's format, to checkpoints in FP32."""

from pathlib import Path

from tiny_align.export.gguf_llm import GgufLlm
from tiny_align.export.gguf_tokenizer import read_tokenizer
from tiny_align.reference.checkpoints import write_generation_config, write_model


def write_llm(path: Path, folder: Path) -> None:
    """Write the checkpoint of a GGUF file: weights, sizes, tokenizer, chat template."""
    llm = GgufLlm(path)
    weights = {name: llm.weights(name) for name in llm.parameters}
    write_model(folder, llm.kind, llm.config, weights)
    write_generation_config(folder, **llm.special_ids())
    read_tokenizer(llm).save_pretrained(folder)
