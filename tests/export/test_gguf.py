"""`tiny-align export --llm FILE.gguf`: what a file holds is the model that it was made of.

Tiny models of every family are written as llama.cpp's converter writes them, and damaged. That the
command exports such a file is tested with the families (test_llm_families.py).
"""

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="models are exported from torch")
transformers = pytest.importorskip("transformers", reason="models are exported from transformers")
gguf = pytest.importorskip("gguf", reason="GGUF files are read and written with gguf")

from test_export import make_encoder  # noqa: E402
from transformers.convert_slow_tokenizer import TikTokenConverter  # noqa: E402
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: E402

from tests.support.tiny_ggufs import Source, source  # noqa: E402
from tests.support.tiny_llms import CONTEXT, make_model  # noqa: E402
from tiny_align.export.gguf_file import GgufFile  # noqa: E402
from tiny_align.export.gguf_llm import MODEL_TYPES, GgufLlm  # noqa: E402
from tiny_align.export.llms import end_tokens, load_llm  # noqa: E402
from tiny_align.export.vocabularies import SPLITS, byte_level_tokenizer  # noqa: E402
from tiny_align.runtime.errors import TinyAlignError  # noqa: E402

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1234.0}
# Family of tiny models -> architecture, pre-tokenizer, and sizes that a GGUF file can express.
FILES = {
    "llama": ("llama", "gpt-2", {}),  # with Llama 3's frequencies
    "smollm2": ("llama", "gpt-2", {"rope_parameters": PLAIN_ROPE}),
    "qwen2": ("qwen2", "qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", "qwen2", {}),  # with YaRN
    "gemma2": ("gemma2", None, {"query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3", None, {"query_pre_attn_scalar": 16}),
    "phi3": ("phi3", None, {}),  # with LongRoPE
    "stablelm": ("stablelm", "gpt-2", {"qk_layernorm": False}),
    "smollm3": (
        "smollm3",
        "gpt-2",
        {"use_sliding_window": False, "no_rope_layer_interval": 4, "num_hidden_layers": 4},
    ),
}
TEXTS = (
    "what is the time",
    "  two  three\n\nfour\t5678 ",
    "I'll don't, naïve café 你好 👍",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<start_of_turn>user\nHi<end_of_turn>\n<|user|>\nHi<|end|>\n",
)


PHI_TOKENS = {
    "  two": ["▁", "▁", "▁two"],
    "<|user|>\n is<|end|>\n": ["<|user|>", "▁is", "<|end|>"],
    "<|user|>\ntwo": ["<|user|>", "▁two"],
}


@pytest.fixture(scope="module", params=FILES)
def family(request, tmp_path_factory) -> tuple[str, Path, Path]:
    """A family's name, the folder of its tiny model, and the same model as a file."""
    return (request.param, *write_family(request.param, tmp_path_factory.mktemp(request.param)))


def write_family(name: str, folder: Path) -> tuple[Path, Path]:
    architecture, pre, other_sizes = FILES[name]
    torch.manual_seed(0)
    make_model(name, folder / "llm", **other_sizes)
    path = source(folder / "llm", architecture, pre).write(folder / "llm.gguf")
    return folder / "llm", path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the tiny Llama, and the same model as a file."""
    return write_family("smollm2", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def llama_source(llama) -> Source:
    """What goes into its file; it may be changed."""
    return source(llama[0], "llama", "gpt-2")


# --- the model and its tokenizer ---


def test_every_architecture_is_tested():
    assert {architecture for architecture, _, _ in FILES.values()} == set(MODEL_TYPES)


def test_logits_equal_the_models(family):
    _, folder, path = family
    expected = load_llm(str(folder))[0]
    got = load_llm(str(path))[0]
    ids = torch.arange(3, 103)[None] % expected.config.vocab_size  # beyond a sliding window
    with torch.no_grad():
        wanted = expected(ids).logits
        error = (got(ids).logits - wanted).abs().max() / wanted.std()
    assert error < 1e-5


def test_tokenizer_equals_the_models(family):
    name, folder, path = family
    model, expected = load_llm(str(folder))
    got_model, got = load_llm(str(path))
    for text in TEXTS[:1] if name == "phi3" else TEXTS:  # see the next test
        ids = got(text, add_special_tokens=False)["input_ids"]
        assert ids == expected(text, add_special_tokens=False)["input_ids"], text
        assert got.decode(ids) == expected.decode(ids)
    assert got.chat_template == expected.chat_template
    assert got.bos_token == expected.bos_token
    assert set(end_tokens(got_model, got)) == set(end_tokens(model, expected))


def test_phi_splits_text_as_llama_cpp_does(tmp_path):
    """Its tiny tokenizer here is of transformers' own class, which treats spaces otherwise."""
    tokenizer = load_llm(str(write_family("phi3", tmp_path)[1]))[1]
    for text, tokens in PHI_TOKENS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == tokens


def test_llama_cpp_agrees(family):
    llama_cpp = pytest.importorskip("llama_cpp", reason="it is compared with llama.cpp")
    name, _, path = family
    model, tokenizer = load_llm(str(path))
    other = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_threads=1, logits_all=True, verbose=False)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if name != "phi3":  # whose special tokens it knows by the model's name
            assert ids == other.tokenize(text.encode(), add_bos=False, special=True)
    if name == "phi3":
        pytest.skip("llama.cpp leaves out Phi-3's sliding window")
    ids = torch.arange(3, 103)[None] % len(tokenizer)
    other.eval(ids[0].tolist())
    with torch.no_grad():
        expected = model(ids).logits[0]
    error = np.abs(other.scores[: ids.shape[1]] - expected.numpy()).max() / expected.std()
    assert error < 0.05  # its cache is FP16


def test_words_are_split_as_by_the_originals():
    pattern = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert SPLITS["llama-bpe"].pattern == pattern
    assert SPLITS["qwen2"].pattern == PRETOKENIZE_REGEX


def test_smollm_splits_digits():
    tokens = ["a", "Ġ", "1", "2", "b", "12", "ab"]
    tokenizer = byte_level_tokenizer(tokens, [("1", "2"), ("a", "b")], [], SPLITS["smollm"])
    assert tokenizer.encode("ab 12").tokens == ["ab", "Ġ", "1", "2"]


def test_every_sixth_layer_of_gemma3_attends_to_all(tmp_path):
    """llama.cpp knows it; files do not say so."""
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    make_model("gemma3", tmp_path / "llm", num_hidden_layers=6, layer_types=kinds)
    gemma = source(tmp_path / "llm", "gemma3", None)
    del gemma.fields["gemma3.attention.sliding_window_pattern"]
    llm = GgufLlm(gemma.write(tmp_path / "llm.gguf"))
    assert llm.config.layer_types == kinds
    assert llm.config.rope_parameters["sliding_attention"]["rope_theta"] == 10_000


def test_named_chat_template_is_chosen(llama_source, tmp_path):
    llama_source.fields["tokenizer.chat_templates"] = ["rag"]
    llama_source.fields["tokenizer.chat_template.rag"] = "{{ messages }}"
    path = str(llama_source.write(tmp_path / "llm.gguf"))
    template = llama_source.fields["tokenizer.chat_template"]
    assert load_llm(path)[1].chat_template == template
    assert load_llm(path, "rag")[1].chat_template == "{{ messages }}"


def test_missing_chat_template_may_be_passed(llama_source, tmp_path):
    template = llama_source.fields.pop("tokenizer.chat_template")
    path = str(llama_source.write(tmp_path / "llm.gguf"))
    with pytest.raises(TinyAlignError, match=r"no chat template: .* as --chat-template FILE"):
        load_llm(path)
    (tmp_path / "chat.jinja").write_text(template)
    assert load_llm(path, str(tmp_path / "chat.jinja"))[1].chat_template == template


# --- stored blocks ---


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"])
def test_stored_blocks_equal_the_dequantised_weights(llama_source, tmp_path, kind, name):
    stored = {"q_proj": "attn_q", "k_proj": "attn_k", "down_proj": "ffn_down"}[name.split(".")[1]]
    llama_source.quantise(f"blk.0.{stored}.weight", kind)
    llm = GgufLlm(llama_source.write(tmp_path / "llm.gguf"))
    parameter = f"model.layers.0.{name}.weight"
    blocks = llm.stored_blocks(parameter)
    assert blocks.codes.dtype == np.int8 and blocks.scales.dtype == np.float16
    assert (blocks.bits, blocks.minima is None) == (8 if kind == "Q8_0" else 4, kind != "Q4_1")
    limits = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-127, 127)}[kind]
    assert (blocks.codes.min(), blocks.codes.max()) == limits
    scales = np.repeat(blocks.scales.astype(np.float32), 32, axis=1)
    values = blocks.codes * scales
    if blocks.minima is not None:
        values = values + np.repeat(blocks.minima.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(values, llm.weights(parameter))
    values = gguf.quants.dequantize(
        llama_source.tensors[f"blk.0.{stored}.weight"], gguf.GGMLQuantizationType[kind]
    )
    assert sorted(map(tuple, llm.weights(parameter))) == sorted(map(tuple, values))
    assert llm.types_stored_anew() == []


def test_other_types_are_stored_anew_and_named(llama_source, tmp_path, caplog):
    llama_source.quantise("blk.0.ffn_down.weight", "Q5_0")
    llama_source.quantise("blk.1.ffn_down.weight", "Q5_1")
    llama_source.quantise("blk.1.ffn_up.weight", "BF16")
    path = llama_source.write(tmp_path / "llm.gguf")
    model = load_llm(str(path))[0]
    assert "llm.gguf: its Q5_0, Q5_1 weights are dequantised and stored anew in" in caplog.text
    llm = GgufLlm(path)
    for layer, name in enumerate(["mlp.down_proj", "mlp.up_proj"]):
        parameter = f"model.layers.{layer}.{name}.weight"
        assert llm.stored_blocks(parameter) is None
        weight = model.get_parameter(parameter).detach().numpy()
        np.testing.assert_array_equal(weight, llm.weights(parameter))


# --- refusals ---


def without(name: str) -> Callable[[Source], None]:
    return lambda source: source.fields.pop(name, None) or source.tensors.pop(name, None)


def with_fields(**values) -> Callable[[Source], None]:
    """Set fields; __ stands for a dot."""
    named = {name.replace("__", "."): value for name, value in values.items()}
    return lambda source: source.fields.update(named)


def with_tensor(name: str, array: np.ndarray, kind: str | None = None) -> Callable[[Source], None]:
    def change(source: Source) -> None:
        source.tensors[name] = array
        if kind is not None:
            source.types[name] = gguf.GGMLQuantizationType[kind]

    return change


def blocks_of(kind: str) -> np.ndarray:
    """A matrix of 96 rows of 256 zeros, as wide as the widest blocks."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.zeros((96, 256 // block * n_bytes), np.uint8)


CHANGES = {  # a change of what is written -> a part of the sentence
    "an unsupported architecture": (
        with_fields(general__architecture="mamba"),
        "is a 'mamba'; supported LLMs in GGUF files: llama, qwen2, qwen3, gemma2, gemma3, phi3",
    ),
    "an embedding model": (
        with_fields(general__architecture="nomic-bert"),
        "is a 'nomic-bert' (an encoder, which writes no text); supported LLMs",
    ),
    "an LLM made an embedding model": (
        with_fields(llama__pooling_type=3),
        "is an embedding or reranking model, which writes no text: give a chat model",
    ),
    "a mixture of experts": (with_fields(llama__expert_count=8), "is a mixture of experts"),
    "an image encoder": (
        with_fields(general__architecture="clip"),
        "is the image or audio encoder beside an LLM: give the LLM's own file",
    ),
    "an mmproj file": (
        with_fields(general__type="mmproj"),
        "is the image or audio encoder beside an LLM: give the LLM's own file",
    ),
    "a LoRA adapter": (
        with_fields(general__type="adapter"),
        "is a LoRA adapter: merge it into its base model with llama-export-lora",
    ),
    "an importance matrix": (
        with_fields(general__type="imatrix"),
        "is an importance matrix, not a model",
    ),
    "a part of a split model": (
        with_fields(split__count=3, split__no=1),
        "is part 2 of 3 of a split model: join them with `llama-gguf-split --merge FIRST_PART",
    ),
    "a vocabulary only": (lambda source: source.tensors.clear(), "holds no weights"),
    "no vocabulary": (without("tokenizer.ggml.tokens"), "its vocabulary has no tokens"),
    "a tokenizer of another kind": (
        with_fields(tokenizer__ggml__model="t5"),
        "its tokenizer is 't5', expected 'gpt2' (bytes) or 'llama' (SentencePiece)",
    ),
    "an unknown pre-tokenizer": (
        with_fields(tokenizer__ggml__pre="tekken"),
        "has the pre-tokenizer 'tekken', expected one of llama-bpe, smaug-bpe, qwen2,",
    ),
    "no pre-tokenizer": (without("tokenizer.ggml.pre"), "names no pre-tokenizer, expected one of"),
    "fewer types than tokens": (
        with_fields(tokenizer__ggml__token_type=[1, 1]),
        "tokens and 2 types of tokens",
    ),
    "a merge of one token": (
        with_fields(tokenizer__ggml__merges=["a b", "ab"]),
        "its merge 'ab' is not of two tokens",
    ),
    "an end token beyond the vocabulary": (
        with_fields(tokenizer__ggml__eos_token_id=99_999),
        "its eos_token_id is 99999, it has",
    ),
    "an IQ type": (
        with_tensor("blk.0.attn_q.weight", blocks_of("IQ4_NL"), "IQ4_NL"),
        "its tensor blk.0.attn_q.weight is IQ4_NL, expected one of F32, F16, BF16, Q4_0,",
    ),
    "a ternary type": (
        with_tensor("blk.0.attn_q.weight", blocks_of("TQ2_0"), "TQ2_0"),
        "its tensor blk.0.attn_q.weight is TQ2_0, expected one of F32, F16, BF16, Q4_0,",
    ),
    "no embedding table": (without("token_embd.weight"), "it lacks the tensor token_embd.weight"),
    "a missing tensor": (
        without("blk.1.attn_k.weight"),
        "it lacks the tensor blk.1.attn_k.weight. Download it again, or give another",
    ),
    "a tensor of another shape": (
        with_tensor("output_norm.weight", np.ones(95, np.float32)),
        "its tensor output_norm.weight has another shape: expected [96] by its header, got [95]",
    ),
    "a tensor too many": (
        with_tensor("blk.0.attn_sinks.weight", np.ones(4, np.float32)),
        "its tensor blk.0.attn_sinks.weight has no place in a 'llama'",
    ),
    "no sizes": (without("llama.embedding_length"), "it lacks llama.embedding_length"),
    "sizes by layer": (
        with_fields(llama__feed_forward_length=[128, 96]),
        "there is a list of numbers, not one, for llama.feed_forward_length",
    ),
    "sizes that make no model": (
        with_fields(llama__attention__head_count=0, llama__attention__key_length=24),
        "its header makes no LLM",
    ),
    "a number of layers that no file has": (
        with_fields(llama__block_count=2**31),
        "it lacks the tensors of its 2,147,483,648 layers",
    ),
    "a text for a number": (
        with_fields(llama__attention__head_count="four"),
        "its header makes no LLM",
    ),
    "unknown rotary positions": (
        with_fields(llama__rope__scaling__type="dilated"),
        "its rotary positions are scaled by 'dilated', expected linear, yarn or a tensor",
    ),
    "NaN in a weight": (
        with_tensor("output_norm.weight", np.full(96, np.nan, np.float32)),
        "its model.norm.weight holds NaN or infinity (96 of 96 values)",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), CHANGES.values(), ids=CHANGES)
def test_what_is_no_whole_llm_is_described(llama_source, tmp_path, change, sentence):
    change(llama_source)
    path = llama_source.write(tmp_path / "llm.gguf")
    with pytest.raises(TinyAlignError) as refusal:
        load_llm(str(path))
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


BYTES = {  # a change of the file's bytes -> a part of the sentence
    "0 bytes": (lambda data: b"", "cannot be loaded as a GGUF file: the file is empty"),
    "no GGUF file": (
        lambda data: b"<!DOCTYPE html>" * 99,
        "expected a GGUF file, which begins with b'GGUF', got b'<!DO'",
    ),
    "a Git LFS pointer": (
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "the file is a Git LFS pointer, not the file itself. Run `git lfs pull`",
    ),
    "an old version": (
        lambda data: data[:4] + struct.pack("<I", 1) + data[8:],
        "is GGUF version 1, expected 2 or 3",
    ),
    "a later version": (
        lambda data: data[:4] + struct.pack("<I", 4) + data[8:],
        "is GGUF version 4, expected 2 or 3",
    ),
    "big-endian": (
        lambda data: data[:4] + struct.pack(">I", 3) + data[8:],
        "is a big-endian GGUF file: give a little-endian one",
    ),
    "cut off after its magic": (lambda data: data[:6], "expected a GGUF file"),
    "cut off in its header": (
        lambda data: data[:2000],
        "it is cut off or damaged (it ends within its header, after 2,000 bytes)",
    ),
    "cut off in its tensors": (
        lambda data: data[:-100],
        "it is cut off (expected ",
    ),
    "a length beyond the file": (
        lambda data: data[:24] + struct.pack("<Q", 2**60) + data[32:],
        "it is cut off or damaged",
    ),
    "2^60 fields": (
        lambda data: data[:16] + struct.pack("<Q", 2**60) + data[24:],
        "it is cut off or damaged (it ends within its header",
    ),
    "a header that is no text": (
        lambda data: data[:32] + b"\xff" * 8 + data[40:],
        "its header is damaged ('utf-8' codec can't decode",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), BYTES.values(), ids=BYTES)
def test_damaged_file_is_described(llama, tmp_path, change, sentence):
    path = tmp_path / "llm.gguf"
    path.write_bytes(change(llama[1].read_bytes()))
    with pytest.raises(TinyAlignError, match=re.escape(sentence)) as refusal:
        load_llm(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_make_an_llm_or_one_sentence(llama, tmp_path, seed):
    data = bytearray(llama[1].read_bytes())
    random = np.random.default_rng(seed)
    n_header = data.rindex(b"token_embd.weight")  # tensors' names are near the end of the header
    for place in random.integers(8, n_header, 3):
        data[place] = random.integers(256)
    path = tmp_path / "llm.gguf"
    path.write_bytes(data)
    with contextlib.suppress(TinyAlignError):
        load_llm(str(path))


def test_header_is_refused_before_gigabytes_are_read(llama, tmp_path):
    """A file of 64 GB, sparse: its tensors are where the header says, but one is missing."""
    path = tmp_path / "llm.gguf"
    shutil.copyfile(llama[1], path)
    data = path.read_bytes()
    name = b"blk.1.ffn_norm.weight"
    path.write_bytes(data.replace(name, b"blk.1.ffn_form.weight"))
    os.truncate(path, 64 * 10**9)
    start = time.perf_counter()
    with pytest.raises(TinyAlignError, match=r"it lacks the tensor blk\.1\.ffn_norm\.weight"):
        load_llm(str(path))
    assert time.perf_counter() - start < 5


def test_file_of_another_name_is_known_by_its_beginning(llama, tmp_path):
    """Ollama names files by their hash."""
    shutil.copyfile(llama[1], tmp_path / "sha256-0123")
    model, _ = load_llm(str(tmp_path / "sha256-0123"))
    assert model.config.hidden_size == 96


def test_command_refuses_in_one_sentence(llama_source, refused, tmp_path):
    llama_source.fields["tokenizer.ggml.pre"] = "tekken"
    path = llama_source.write(tmp_path / "llm.gguf")
    make_encoder(tmp_path / "encoder")
    models = {"encoder": tmp_path / "encoder", "llm": path}
    sentence = refused(models, tmp_path / "out")
    assert "has the pre-tokenizer 'tekken', expected one of" in sentence
    assert not (tmp_path / "out").exists()


def test_blocks_are_frozen(llama_source, tmp_path):
    llama_source.quantise("blk.0.ffn_down.weight", "Q8_0")
    file = GgufFile(llama_source.write(tmp_path / "llm.gguf"))
    blocks = file.read_blocks("blk.0.ffn_down.weight")
    with pytest.raises(dataclasses.FrozenInstanceError):
        blocks.bits = 4
