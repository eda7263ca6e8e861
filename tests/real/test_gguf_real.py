"""Real GGUF files are the models of the checkpoints, and their tokenizers are llama.cpp's."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models run in torch")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")
pytest.importorskip("gguf", reason="GGUF files are read with gguf")

from safetensors import safe_open  # noqa: E402 - needs the packages above

from tiny_align.export.gguf_llm import GgufLlm  # noqa: E402
from tiny_align.export.gguf_tokenizer import read_tokenizer  # noqa: E402
from tiny_align.export.llms import load_llm  # noqa: E402
from tiny_align.export.pretrained import load_pretrained  # noqa: E402

pytestmark = pytest.mark.real
# Token ids of awkward texts by llama-cpp-python 0.3.36, special tokens in the text recognised.
TOKENS = Path(__file__).parents[1] / "data/llama-cpp-tokens.json"
FILES = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "gemma-3-270m": "gemma-3-270m-q4_k_m.gguf",
}


@pytest.fixture(params=FILES)
def folder(request, pretrained_model) -> Path:
    return pretrained_model(request.param)


def test_tokens_are_llama_cpps_and_the_checkpoints(folder):
    tokenizer = read_tokenizer(GgufLlm(folder / FILES[folder.name]))
    checkpoint = load_pretrained(transformers.AutoTokenizer, folder)
    texts = json.loads(TOKENS.read_text(encoding="utf-8"))[folder.name]
    assert len(texts) > 70
    for text, ids in texts.items():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert checkpoint(text, add_special_tokens=False)["input_ids"] == ids, text


def test_weights_are_the_checkpoints(folder):
    llm = GgufLlm(folder / FILES[folder.name])
    with safe_open(folder / "model.safetensors", "np") as checkpoint:
        assert set(checkpoint.keys()) == set(llm.parameters)
        for name in list(llm.parameters)[:20]:  # the embedding table and a layer, every kind
            np.testing.assert_array_equal(llm.weights(name), checkpoint.get_tensor(name))


def test_smollm2_computes_what_its_checkpoint_does(pretrained_model):
    folder = pretrained_model("smollm2-135m-instruct")
    expected, _ = load_llm(str(folder))
    got, tokenizer = load_llm(str(folder / FILES[folder.name]))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(got(ids).logits, expected(ids).logits)


def test_smollm2_stores_blocks_of_every_matrix(pretrained_model):
    """Layers are Q4_1, the embedding table, which is the output layer too, Q8_0."""
    folder = pretrained_model("smollm2-135m-instruct")
    llm = GgufLlm(folder / FILES[folder.name])
    assert llm.types_stored_anew() == []
    for name in ("model.embed_tokens.weight", "model.layers.7.self_attn.q_proj.weight"):
        blocks = llm.stored_blocks(name)
        assert blocks is not None
        values = blocks.codes * np.repeat(blocks.scales.astype(np.float32), 32, axis=1)
        if blocks.minima is not None:
            values += np.repeat(blocks.minima.astype(np.float32), 32, axis=1)
        np.testing.assert_array_equal(values, llm.weights(name))
