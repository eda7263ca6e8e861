"""What the study of quantised LLMs measures with: other weights, divergences, GGUF files."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest

from tiny_align.runtime.bundle.onnx_weights import quantise_columns

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support.tiny_llms import make_model  # noqa: E402
from tiny_align.benchmarks.studies import gguf_files, next_tokens, quantisation_llms  # noqa: E402
from tiny_align.benchmarks.studies.off_grid import off_the_grid  # noqa: E402
from tiny_align.benchmarks.studies.quantisation_ways import Way  # noqa: E402

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 60,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
TEXTS = ("one", "two", "three")


class Words:
    """A tokenizer: a letter is a token."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [2, *(3 + ord(letter) % 50 for letter in text)]}


@pytest.fixture(params=["llama", "gemma3_text"])
def model(request):
    torch.manual_seed(0)
    if request.param == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    else:
        config = transformers.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16)
        model = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value += 0.3 * torch.rand_like(value)
        if request.param == "gemma3_text":
            model.model.embed_tokens.embed_scale.fill_(1)
            model.model.norm.weight.fill_(-0.7)  # else it is sure of every token
    model.generation_config.eos_token_id = 1
    return model.eval()


@pytest.fixture
def reference(model):
    return next_tokens.reference_answers(model, Words(), TEXTS, length=6)


def int4_error(model):
    """Squared error of symmetric INT4 in blocks of 32, of all products."""
    total = 0.0
    for name, value in model.model.layers.named_parameters():
        if name.endswith("proj.weight"):
            for block in value.detach().numpy().T.reshape(-1, 32, len(value)):
                codes, scales = quantise_columns(block, 4)
                total += float(((codes * scales - block) ** 2).sum())
    return total


def put_on_the_grid(model):
    with torch.no_grad():
        for name, value in model.model.layers.named_parameters():
            if name.endswith("proj.weight"):
                rows = []
                for block in value.numpy().T.reshape(-1, 32, len(value)):
                    codes, scales = quantise_columns(block, 4)
                    rows.append(codes * scales)
                value.copy_(torch.from_numpy(np.concatenate(rows).T))


def test_off_the_grid_changes_every_weight_of_the_layers_but_no_logits(model):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = model(ids).logits
        weights = {name: value.clone() for name, value in model.named_parameters()}
        off_the_grid(model)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=0)
    for name, after in model.named_parameters():
        if "proj" in name:
            assert not torch.equal(weights[name], after), name
    assert torch.equal(weights["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_off_the_grid_costs_weights_on_a_grid_what_others_cost(model):
    any_weights = int4_error(model)
    put_on_the_grid(model)
    assert int4_error(model) < 1e-6 * any_weights
    off_the_grid(model)
    assert any_weights / 2 < int4_error(model) < 2 * any_weights


def test_off_the_grid_refuses_other_families():
    with pytest.raises(ValueError, match="expected a model of llama, gemma3_text, got gpt2"):
        off_the_grid(SimpleNamespace(config=SimpleNamespace(model_type="gpt2")))


def test_a_model_does_not_differ_from_itself_and_a_wrong_one_does(model, reference):
    same = next_tokens.compare(reference, next_tokens.torch_logits(model))
    assert same["divergence"] == pytest.approx(0, abs=1e-6)
    assert same["same"] == 1
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(-1)
            layer.self_attn.o_proj.weight.mul_(-1)
    wrong = next_tokens.compare(reference, next_tokens.torch_logits(model))
    assert wrong["divergence"] > 0.01
    assert wrong["same"] < 1


def test_the_divergence_is_that_of_pytorch(model, reference):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[::2].neg_()
    expected = []
    for prompt, answer in zip(reference.prompts, reference.answers):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            exact = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            form = other(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert exact.argmax(-1).tolist() == answer
        rows = torch.nn.functional.kl_div(form, exact, reduction="none", log_target=True)
        expected += rows.sum(-1).tolist()
    found = next_tokens.compare(reference, next_tokens.torch_logits(other))
    assert found["divergence"] == pytest.approx(np.mean(expected), rel=1e-3)


def test_a_reference_survives_its_file(reference, tmp_path):
    reference.save(tmp_path / "reference.npz")
    loaded = next_tokens.Reference.load(tmp_path / "reference.npz")
    assert loaded.prompts == reference.prompts
    assert loaded.answers == reference.answers
    np.testing.assert_array_equal(loaded.log_probabilities(2), reference.log_probabilities(2))
    assert [len(answer) for answer in loaded.shortened(2).answers] == [2, 2, 2]


def test_a_gguf_file_has_the_models_weights(model, tmp_path):
    gguf = pytest.importorskip("gguf")
    from tests.support.tiny_ggufs import tensors

    kind = {"llama": "llama", "gemma3_text": "gemma3"}[model.config.model_type]
    writer = gguf.GGUFWriter(tmp_path / "like.gguf", kind)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list(["a", "b"])
    writer.add_file_type(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf_files.write_gguf(model, tmp_path / "like.gguf", tmp_path / "out.gguf")

    written = gguf.GGUFReader(tmp_path / "out.gguf")
    assert written.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
    assert written.get_field("general.file_type") is None
    weights = {tensor.name: tensor.data for tensor in written.tensors}
    for name, value in tensors(model, kind).items():
        np.testing.assert_allclose(weights.pop(name), value, atol=1e-6)
    assert not weights


def test_a_form_is_measured_again_only_if_its_figures_are_missing(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    ways = [Way("fp32", head="fp32"), Way("int4", 32, head="int8")]
    monkeypatch.setattr(quantisation_llms, "WAYS", ways)
    make_model("llama", tmp_path / "llm")
    work = tmp_path / "work"
    work.mkdir()
    saved = []
    report = quantisation_llms.measure_llm(tmp_path / "llm", work, 0, 2, saved.append)
    exact, int4 = report["forms"]
    assert exact["divergence"] == pytest.approx(0, abs=1e-5)
    assert exact["bits"] > 32 > 8 > int4["bits"] > 4
    assert int4["divergence"] > 0.01
    assert int4["head_bytes"] < exact["head_bytes"] / 3
    assert exact["violations"] == int4["violations"] == {}
    assert int4["tokens_per_second"] > 0 and len(saved) == 2

    monkeypatch.setattr(quantisation_llms, "measure_form", None)
    monkeypatch.setattr(quantisation_llms, "reference_answers", None)
    again = quantisation_llms.measure_llm(tmp_path / "llm", work, 0, 2, saved.append)
    assert again["forms"][1]["divergence"] == int4["divergence"]
