"""`tiny-align export --llm` for every family: the runtime equals transformers, token by token.

Each family's tiny model (tests/support/tiny_llms.py) is exported once, through the command, in
FP32, SmolLM2's from a GGUF file. The reference is transformers' own `generate` on the saved folder, where a sliding layer drops
its past; the runtime's cache is whole.
"""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.backends.registry import load_decoder
from tiny_align.runtime.bundle.onnx_weights import load_graph
from tiny_align.runtime.bundle.profile import graph_profile
from tiny_align.runtime.bundle.tensorrt_rules import violations
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.llm import Cache, LanguageModel, TextStream, encode_in_place

torch = pytest.importorskip("torch", reason="models are exported from torch")
transformers = pytest.importorskip("transformers", reason="models are exported from transformers")
onnx = pytest.importorskip("onnx", reason="exported graphs are read with onnx")
pytest.importorskip("gguf", reason="one model is exported from a GGUF file")

from test_export import make_encoder  # noqa: E402

from tests.support.tiny_ggufs import source  # noqa: E402
from tests.support.tiny_llms import (  # noqa: E402
    CONTEXT,
    ENDED_TEXT,
    FAMILIES,
    INSTRUCTION,
    LONGROPE_CONTEXT,
    N_TOKENS,
    WINDOW,
    ModelPair,
    make_model,
    typed,
)
from tiny_align.benchmarks.studies.families import traced_once  # noqa: E402 - needs the packages above
from tiny_align.export.bundle import tensorrt_violations  # noqa: E402
from tiny_align.export.llms import LLMS, embedding_table, end_tokens, load_llm  # noqa: E402
from tiny_align.export.parity import TOLERANCE, llm_lengths  # noqa: E402
from tiny_align.export.prompts import prompt_spec  # noqa: E402
from tiny_align.export.quantise import quantise  # noqa: E402
from tiny_align.export.weight_forms import LlmWeights, forms  # noqa: E402

TEXTS = (ENDED_TEXT, "Call my mother", "  two three four ")
DECODING = Decoding(max_tokens=N_TOKENS, loop_tokens=0)
SLIDING = [name for name, family in FAMILIES.items() if "sliding_window" in family.sizes]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """An encoder's folder; it and the projector are traced once, not for every LLM."""
    torch.manual_seed(0)
    make_encoder(folder := tmp_path_factory.mktemp("encoder"))
    with traced_once("encoder_graph", "projector_graph"):
        yield folder


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, encoder, export, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param, folder / "llm")
    models = {"encoder": encoder, "llm": folder / "llm"}
    if request.param == "smollm2":  # exported from a GGUF file
        llm = source(folder / "llm", architecture="llama", pre="gpt-2")
        models["llm"] = llm.write(folder / "llm.gguf")
    export(models, folder / "out", "--precision", "fp32", "--max-context", CONTEXT)
    with Assistant.load(folder / "out", threads=1) as assistant:
        yield ModelPair.load(request.param, folder / "llm", assistant)


@pytest.fixture
def endless(exported):
    """No token ends an answer, neither transformers' nor the runtime's."""
    with exported.endless():
        yield exported


# --- token by token ---


def test_embeddings_equal_the_models(exported):
    ids = list(range(len(exported.tokenizer)))
    with torch.no_grad():
        wanted = exported.model.get_input_embeddings()(torch.tensor(ids)).numpy()
    np.testing.assert_array_equal(exported.assistant.llm.embed(ids), wanted)


@pytest.mark.parametrize("n_prompt", [3, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_generation_from_embeddings_equals_transformers(endless, n_prompt):
    prompt = endless.prompt(n_prompt)
    got = list(endless.assistant.llm.generate(prompt, DECODING))
    assert got == endless.generate(inputs_embeds=torch.from_numpy(prompt)[None])
    assert len(got) == N_TOKENS and len(set(got)) > N_TOKENS / 4  # the answer varies


@pytest.mark.parametrize("text", TEXTS)
def test_generation_from_typed_text_equals_transformers(endless, text):
    got = endless.assistant.answer_text(text, INSTRUCTION, DECODING).tokens
    assert list(got) == endless.generate(input_ids=endless.template(text.strip()))
    assert len(got) == N_TOKENS


def test_second_turn_equals_transformers_on_the_whole_conversation(endless):
    llm, few = endless.assistant.llm, Decoding(max_tokens=5, loop_tokens=0)
    session = endless.assistant.listen(INSTRUCTION, few)
    answer = [event.token for event in session.say("Call my mother")]
    again = [event.token for event in session.say("two three four")]
    first, second = (
        endless.template(text)[0].tolist() for text in ("Call my mother", "two three four")
    )
    words = llm.encode_words("two three four")
    after = second[-len(llm.around(INSTRUCTION)[1]) :]
    whole = [*first, *answer, *llm.encode(llm.prompt.next), *words, *after]
    assert again == endless.generate(input_ids=torch.tensor([whole]))[:5]


def test_prompt_without_instruction_is_the_template_of_the_words_alone(exported):
    llm = exported.assistant.llm
    before, after = llm.around()
    words = llm.embed(llm.encode_words("two three four"))
    ids = exported.tokenizer.apply_chat_template(
        [{"role": "user", "content": "two three four"}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=True,
    )["input_ids"]
    np.testing.assert_array_equal(np.concatenate([before, words, after]), llm.embed(ids))


def test_turns_are_joined_as_by_the_chat_template(exported):
    if exported.name in ("qwen3", "smollm3"):
        pytest.skip(
            "its template takes the mark of an answer without thinking out of turns that are over"
        )
    messages = [*typed(exported.name, INSTRUCTION, "one"), {"role": "assistant", "content": "two"}]
    messages += [{"role": "user", "content": "three"}]
    prompt = exported.assistant.llm.prompt
    first = f"{prompt.before}{INSTRUCTION}{prompt.between}one{prompt.after}two"
    joined = f"{first}{prompt.next}three{prompt.after}"
    assert joined == exported.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_ends_where_transformers_ends_it(exported, text):
    got = exported.assistant.answer_text(text, INSTRUCTION, DECODING).tokens
    assert list(got) == exported.generate(input_ids=exported.template(text.strip()))
    assert text != ENDED_TEXT or len(got) < N_TOKENS // 2


def test_prefill_in_chunks_equals_prefill_of_the_whole(exported):
    """Prefill in chunks, as a later loop may do it, beyond a window too."""
    prompt, cache = exported.prompt(3 * WINDOW), Cache()
    for part in np.split(prompt, [1, 7, 2 * WINDOW]):
        logits = exported.assistant.llm.prefill(part, cache).logits
    with torch.no_grad():
        wanted = exported.model(inputs_embeds=torch.from_numpy(prompt)[None]).logits[0, -1].numpy()
    assert np.abs(logits - wanted).max() < TOLERANCE


@pytest.mark.parametrize("exported", SLIDING, indirect=True)
def test_tokens_depend_on_the_sliding_window(endless, monkeypatch):
    """A graph without the window gives another answer beyond it, and only there."""
    monkeypatch.setattr(endless.model.config, "sliding_window", CONTEXT)
    for n_prompt, window_matters in ((3, False), (3 * WINDOW, True)):
        prompt = endless.prompt(n_prompt)
        max_tokens = N_TOKENS if window_matters else WINDOW - n_prompt
        decoding = dataclasses.replace(DECODING, max_tokens=max_tokens)
        got = list(endless.assistant.llm.generate(prompt, decoding))
        other = endless.generate(inputs_embeds=torch.from_numpy(prompt)[None])[: len(got)]
        assert (got != other) == window_matters


def test_streamed_pieces_join_to_the_text(exported):
    """For every kind of tokenizer, and for characters of several tokens."""
    for text in ("what is the time", "né 日 😀!"):
        stream = TextStream(exported.assistant.llm.tokenizer)
        pieces = [stream.push(token) for token in exported.assistant.llm.encode_words(text)]
        assert "".join(pieces) == text and len([p for p in pieces if p]) > 1


# --- the bundle ---


def test_every_length_equals_pytorch_within_the_tolerance(exported):
    graph = exported.bundle.manifest.graphs["llm"]
    for spec in (graph, graph.on("onnxruntime")):
        figures = spec.parity["max_diff_over_std"]
        assert len(figures) >= 4, figures
        assert all(0 <= figure < TOLERANCE / 5 for figure in figures.values()), figures


def test_manifest_describes_the_llm(exported):
    spec, config = exported.bundle.manifest.llm, exported.model.config
    scale = math.sqrt(config.hidden_size) if exported.name.startswith("gemma") else 1
    assert spec.embedding_scale == pytest.approx(scale)
    assert spec.head_size == FAMILIES[exported.name].sizes.get("head_dim", config.hidden_size // 4)
    # Padding rows are no tokens of the tokenizer.
    assert spec.vocabulary == config.vocab_size > len(exported.tokenizer)
    family, listed = FAMILIES[exported.name], exported.model.generation_config.eos_token_id
    assert set(spec.end_tokens) == {*listed, *exported.ids((*family.ends, *family.also_ends))}
    assert spec.max_context == (LONGROPE_CONTEXT if exported.name == "phi3" else CONTEXT)


def test_graph_is_standard_onnx_with_dynamic_lengths_only(exported):
    graph = onnx.load(str(exported.bundle.graph("llm")), load_external_data=False).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    names = set()
    for value in (*graph.input, *graph.output):
        names.update(dim.dim_param for dim in value.type.tensor_type.shape.dim)
    assert names - {""} == {"tokens", "past", "total"}


def test_readout_scale_is_for_the_scaled_table(exported):
    table = exported.assistant.speech_vocabulary.table
    scale = exported.bundle.manifest.readout.scale
    assert scale == pytest.approx(1 / (table.std() * math.sqrt(table.shape[1])), rel=1e-4)


def test_every_weight_is_quantised_and_the_output_layer_is_int8(exported, tmp_path):
    """Gemma 2 caps its logits after the MatMul that makes them."""
    spec = exported.bundle.manifest.graphs["llm"].on("onnxruntime")
    exact = exported.bundle.graph("llm", "onnxruntime")
    quantise(exact, tmp_path / "llm.onnx", LlmWeights(*forms("int4")), "onnxruntime")
    graph = onnx.load(str(tmp_path / "llm.onnx"), load_external_data=False).graph
    kinds = {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
    codes = [kinds[n.input[0]] for n in graph.node if n.op_type == "DequantizeLinear"]
    for name, (kind, dims) in kinds.items():
        if kind == onnx.TensorProto.FLOAT and len(dims) > 1 and max(dims) > 8:
            assert name.endswith(".scales")
    heads = [kind for kind, (_, n) in codes if n == exported.bundle.manifest.llm.vocabulary]
    layers = [kind for kind, _ in codes if kind == onnx.TensorProto.INT4]
    assert heads == [onnx.TensorProto.INT8] and len(codes) == 1 + len(layers)
    with load_decoder(tmp_path / "llm.onnx", spec, "onnxruntime", 1) as decoder:
        llm = LanguageModel(exported.bundle, decoder)
        few = dataclasses.replace(DECODING, max_tokens=3)
        assert len(list(llm.generate(exported.prompt(9), few))) <= 3


def test_tensorrt_takes_the_graphs(exported):
    assert tensorrt_violations(exported.bundle.path, exported.bundle.manifest) == {}


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_tensorrt_takes_the_graph_in_other_precisions(exported, tmp_path, precision):
    weights = LlmWeights(*forms(precision))
    quantise(exported.bundle.graph("llm"), tmp_path / "llm.onnx", weights, "tensorrt")
    manifest = exported.bundle.manifest
    profile = graph_profile(manifest.graphs["llm"], manifest.dims)
    assert violations(load_graph(tmp_path / "llm.onnx"), tmp_path, profile) == []


# --- prompts ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> the folder of a family's model, made once; read only."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        make_model(name, folder)
        return folder

    return make


def tokenizer_of(folders, name):
    return transformers.AutoTokenizer.from_pretrained(folders(name))


def pieces_of(tokenizer):
    spec = prompt_spec(tokenizer, "Answer the user.", INSTRUCTION)
    assert (spec.instruction, spec.repeat_instruction) == ("Answer the user.", INSTRUCTION)
    return spec.before, spec.between, spec.after


def test_template_without_a_system_message_has_the_instruction_in_the_users_turn(folders):
    after = "<end_of_turn>\n<start_of_turn>model\n"
    for name in ("gemma2", "gemma3"):
        assert pieces_of(tokenizer_of(folders, name)) == (
            "<bos><start_of_turn>user\n",
            "\n\n",
            after,
        )


def test_template_that_drops_the_system_message_has_the_instruction_in_the_users_turn(folders):
    tokenizer = tokenizer_of(folders, "smollm2")
    tokenizer.chat_template = "<|im_start|>{{ messages[-1]['content'] }}<|im_end|>"
    assert pieces_of(tokenizer) == ("<|im_start|>", "\n\n", "<|im_end|>")


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_thinking_is_switched_off(folders, name):
    before, _, after = pieces_of(tokenizer_of(folders, name))
    assert after.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert name == "qwen3" or "/no_think" in before


def test_word_is_encoded_as_within_the_prompt(folders):
    """Phi's tokenizer puts a space before a text's first word; the prompt has none there."""
    tokenizer = tokenizer_of(folders, "phi3")
    spec = prompt_spec(tokenizer, "", INSTRUCTION)
    alone = tokenizer.backend_tokenizer.encode("what", add_special_tokens=False).ids
    placed = encode_in_place(tokenizer.backend_tokenizer, spec, " what\n")
    assert alone != placed and tokenizer.convert_ids_to_tokens(placed)[0][0] == "w"


def test_truncation_and_padding_of_a_tokenizer_are_switched_off(folders, tmp_path):
    shutil.copytree(folders("smollm2"), tmp_path / "llm")
    stored = Tokenizer.from_file(str(tmp_path / "llm/tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=9)
    stored.save(str(tmp_path / "llm/tokenizer.json"))
    _, tokenizer = load_llm(str(tmp_path / "llm"))
    assert pieces_of(tokenizer) == pieces_of(tokenizer_of(folders, "smollm2"))
    assert tokenizer.backend_tokenizer.truncation is None
    assert tokenizer.backend_tokenizer.padding is None


def test_only_special_tokens_may_be_beyond_the_table(folders, tmp_path):
    """As Gemma 3's text models have them: the token of an image, for which there is no row."""
    shutil.copytree(folders("gemma3"), tmp_path / "llm")
    tokenizer = tokenizer_of(folders, "gemma3")
    rows = len(load_llm(str(folders("gemma3")))[0].get_input_embeddings().weight)
    tokenizer.add_tokens(
        [f"<soft {n}>" for n in range(rows - len(tokenizer) + 1)], special_tokens=True
    )
    tokenizer.save_pretrained(tmp_path / "llm")
    _, loaded = load_llm(str(tmp_path / "llm"))
    assert max(loaded.get_vocab().values()) == rows
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path / "llm")
    with pytest.raises(
        TinyAlignError, match=f"goes up to token {rows + 1}, its embedding table has {rows} rows"
    ):
        load_llm(str(tmp_path / "llm"))


def test_tokenizer_that_joins_words_and_template_is_refused(folders):
    tokenizer = tokenizer_of(folders, "smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(TinyAlignError, match="joins words and chat template into one token around"):
        prompt_spec(tokenizer, "Answer.", "Repeat.")


def test_template_without_holes_is_refused(folders):
    tokenizer = tokenizer_of(folders, "smollm2")
    for template in (
        "hello",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ messages[0]['content'] | upper }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(TinyAlignError, match="it cannot be cut"):
            prompt_spec(tokenizer, "Answer.", "Repeat.")


# --- end tokens and lengths ---


def test_llm_without_an_end_token_is_refused(folders):
    model, tokenizer = load_llm(str(folders("smollm2")))
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    of_template = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(model, tokenizer) == (of_template,)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(TinyAlignError, match="no end token: name one in its generation_config"):
        end_tokens(model, tokenizer)


def test_lengths_exceed_the_window_and_never_the_context(folders):
    config = transformers.AutoConfig.from_pretrained(folders("gemma3"))
    config.sliding_window, config.max_position_embeddings = 512, 4096
    assert {(1, 512), (4, 512)} <= set(llm_lengths(config, 1024))
    assert all(sum(length) <= 256 for length in llm_lengths(config, 256))
    config.max_position_embeddings = 100
    assert all(sum(length) <= 100 for length in llm_lengths(config, 1024))


def test_table_beyond_float16_is_refused(folders):
    model, _ = load_llm(str(folders("smollm2")))
    model.get_input_embeddings().weight.data[3, 4] = 1e5
    with pytest.raises(TinyAlignError, match="values beyond float16"):
        embedding_table(model)


# --- refused ---


def in_parts(folder: Path) -> Path:
    """Split the weights into files with an index, as of a large model; returns one of the files."""
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        folder, max_shard_size="200KB"
    )
    (folder / "model.safetensors").unlink(missing_ok=True)
    return sorted(folder.glob("model-*.safetensors"))[1]


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in ABSENT:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_more_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(10)])
    tokenizer.save_pretrained(folder)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


ABSENT = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CANNOT = "cannot be loaded as a model folder or hub id"
DAMAGES = {
    "a part of the weights is missing": (lambda f: in_parts(f).unlink(), CANNOT),
    "a part of the weights is cut off": (lambda f: cut(in_parts(f), 0.7), CANNOT),
    "the weights are cut off in the middle": (lambda f: cut(f / WEIGHTS, 0.5), CANNOT),
    "the weights are an empty file": (lambda f: cut(f / WEIGHTS, 0), CANNOT),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), CANNOT),
    "tensors are missing": (without_a_tensor, f"lacks the weights of {ABSENT[0]} and 1 more: download it again"),
    "tensors of another size": (lambda f: edit(f / CONFIG, intermediate_size=64), "belong to different models"),
    "more layers than weights": (lambda f: edit(f / CONFIG, num_hidden_layers=3), "lacks the weights of"),
    "nonsense in the configuration": (lambda f: edit(f / CONFIG, num_hidden_layers="two"), CANNOT),
    "a tokenizer cut off": (lambda f: cut(f / "tokenizer.json", 0.5), CANNOT),
    "a tokenizer that is none": (lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'), CANNOT),
    "a tokenizer of another model": (with_more_tokens, "they belong to different models"),
    "no chat template": (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template: use an"),
    "an encoder-only model": (lambda f: edit(f / CONFIG, model_type="bert"), f"supported LLMs: {', '.join(LLMS)}"),
    "an unknown kind": (lambda f: edit(f / CONFIG, model_type="llama9"), "is a 'llama9'; supported LLMs: llama"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_llm_is_one_sentence_and_writes_no_file(
    run_cli, encoder, folders, tmp_path, damage, sentence
):
    shutil.copytree(folders("smollm2"), tmp_path / "llm")
    damage(tmp_path / "llm")
    paths = ("--encoder", encoder, "--llm", tmp_path / "llm", "--out", tmp_path / "out")
    done = run_cli("export", *paths)
    sentences = [line for line in done.stderr.splitlines() if line.startswith("tiny-align: ")]
    assert (done.status, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert len(sentences) == 1 and sentence in sentences[0]
    assert [p.name for p in tmp_path.iterdir()] == ["llm"]
