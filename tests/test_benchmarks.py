"""The benchmarks measure what is deployed, and their tables say what was measured."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tiny_align.align.model.users import load_projector
from tiny_align.benchmarks.standard import training_cost
from tiny_align.benchmarks.studies import alignment, encoder, families, quantisation, report, swap
from tiny_align.runtime.bundle.bundle import Bundle


@pytest.fixture(scope="module")
def voice(voice_path, tmp_path_factory):
    """Two of the shipped recordings to train on and three to test."""
    folder = tmp_path_factory.mktemp("voice")
    lines = (voice_path / "metadata.jsonl").read_text().splitlines()
    for line in (chosen := lines[:2] + lines[-3:]):
        name = json.loads(line)["file_name"]
        shutil.copyfile(voice_path / name, folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(chosen))
    return folder


def test_a_projector_in_pytorch_is_read_as_the_deployed_one_is(assistant):
    projector = load_projector(assistant.bundle, assistant.bundle.graph("projector")).eval()
    features = (
        np.random.default_rng(0)
        .standard_normal((61, projector.config.feature_size))
        .astype(np.float32)
    )
    spoken = alignment.Speaking(assistant, projector).soft_tokens(features)
    np.testing.assert_allclose(spoken, assistant.soft_tokens(features), atol=1e-3)


def test_a_recorded_command_names_what_was_chosen_and_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(
        alignment, "measure", lambda args, part: {"command": alignment._command(args, part)}
    )
    for drawn in ("table", "plot_table", "curves", "plot_curves"):
        monkeypatch.setattr(alignment, drawn, lambda *_: "")
    given = f"--digits {tmp_path} --few 25 100 --objectives ctc --seeds 1 --out {tmp_path}"
    assert alignment.main(["--parts", "curves", *given.split()]) == 0
    recorded = json.loads((tmp_path / "alignment-curves.json").read_text())["command"]
    assert recorded == (
        "python -m benchmarks.studies.alignment --parts curves --digits FOLDER --objectives ctc --seeds 1 --few 25 100"
    )
    assert alignment.main(["--parts", "table", "--out", str(tmp_path)]) == 0
    recorded = json.loads((tmp_path / "alignment-table.json").read_text())["command"]
    assert recorded == "python -m benchmarks.studies.alignment --parts table"


def test_what_pools_is_measured_without_windows(bundle_path):
    setting = SimpleNamespace(bundle=bundle_path)
    framed, pooled = (alignment.bundle_for(setting, name).manifest for name in ("ctc", "paper"))
    assert framed.windows and pooled.windows is None and framed.encoder_key != pooled.encoder_key


def test_end_to_end_training_reads_the_prompt_the_runtime_assembles(assistant):
    llm = alignment.frozen_llm(assistant)
    prompt = assistant.bundle.manifest.prompt
    speech = np.zeros((2, llm.after.shape[1]), np.float32)
    for before, instruction in zip(llm.prompts, (prompt.instruction, prompt.repeat_instruction)):
        ours = np.concatenate([before.numpy(), speech, llm.after.numpy()])
        np.testing.assert_array_equal(ours, assistant.llm.assemble(speech, instruction))


def test_every_sentence_that_is_trained_on_has_its_answer(assistant, voice):
    examples = alignment.examples_of(assistant, voice)
    assert [len(e.answers) for e in examples] == [2, 2]
    end = assistant.bundle.manifest.llm.end_tokens[0]
    for example in examples:
        assert example.answers[1] == (*example.tokens, end)


def test_what_an_instruction_is_worth_is_measured_for_everything_it_can_ask_for():
    """Without one the LLM does one thing, which is right for that and wrong for the other."""
    texts, answers = ["one two three", "four"], ["a b c", "d"]
    rows = [
        {"text": t, "typed": a, "spoken": a, "repeated": r}
        for t, a, r in zip(texts, answers, ["one two three", "five"])
    ]
    told = SimpleNamespace(rougeL=1.0, rows=rows)
    untold = SimpleNamespace(
        rougeL=0.5, rows=[{"text": texts[0], "spoken": "a b c"}, {"text": "four", "spoken": "four"}]
    )
    got = alignment.instructed(told, untold)
    assert got == {"answer": {"told": 1.0, "untold": 0.5}, "repeat": {"told": 0.5, "untold": 0.5}}


@pytest.mark.parametrize("snr_db", [20, 0])
def test_noise_changes_what_is_heard_but_not_what_was_said(assistant, voice, snr_db):
    clean, noisy = (alignment.noisy(assistant, voice, db) for db in (None, snr_db))
    assert [(h.text, h.typed) for h in clean] == [(h.text, h.typed) for h in noisy]
    assert all(not np.array_equal(a.features, b.features) for a, b in zip(clean, noisy))


def test_a_training_step_of_the_smallest_shape_is_measured():
    row = training_cost.measure("reference", "ctc", threads=1)
    assert 0 < row["step_s"] < 10 and 0.1 < row["peak_gb"] < 8


def test_tokens_after_the_first_difference_are_not_equal():
    pairs = [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 9, 3, 4]), ([5], [5, 6, 7]), ([], [8])]
    assert families._agreement(pairs) == {"answers": 4, "tokens": 11, "equal": 5}


def test_the_table_of_families_is_whole():
    """Every family has its row, and what it says holds: equal to the last token."""
    pytest.importorskip("transformers", reason="the families are transformers'")
    from tests.support import tiny_encoders, tiny_llms

    measured = json.loads(families.RESULTS.read_text(encoding="utf-8"))
    assert measured["encoders"].keys() == tiny_encoders.MAKERS.keys()
    assert measured["llms"].keys() == tiny_llms.FAMILIES.keys()
    assert all(row["max_abs_diff"] < 1e-4 < row["max_abs"] for row in measured["encoders"].values())
    for row in measured["llms"].values():
        assert all(row[way]["equal"] == row[way]["tokens"] > 100 for way in ("embeddings", "text"))


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_the_measured_tables_are_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert report.render(text) == text and "<!-- table " in text


def test_the_report_replaces_only_between_markers():
    text = "1.23\n<!-- table a -->\nold\n<!-- end a -->\n4.56 <!-- end a -->\n<!-- table b -->\n<!-- end b -->\n"
    expected = text.replace("old", "new a").replace("b -->\n<", "b -->\nnew b\n<")
    assert report.render(text, body=lambda name: f"new {name}") == expected


def test_the_newest_result_is_reported_and_none_is_blank(tmp_path):
    for name, day, parts in (("x", 1, {"memory": 1}), ("y", 2, {"memory": 2}), ("z", 3, {})):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"date": f"2026-01-0{day}T00:00:00", "parts": parts})
        )
    (tmp_path / "other.json").write_text("{}")
    assert report.newest("memory", tmp_path)["parts"] == {"memory": 2}
    assert report.body_of("bench_growth", tmp_path) == ""


def test_the_distance_of_features_is_by_direction_and_by_size():
    exact = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    same, longer = (
        encoder.distance([exact], [exact]),
        encoder.distance([exact, 2 * exact], [exact, exact]),
    )
    assert same["cosine"] == pytest.approx(1) and same["relative_error"] == 0
    assert longer["least_cosine"] == pytest.approx(1) and longer["relative_error"] == pytest.approx(
        0.5
    )
    turned = exact.copy()
    turned[7] *= -1
    assert encoder.distance([turned], [exact])["least_cosine_of_a_frame"] == pytest.approx(-1)


def test_the_same_function_has_other_weights_off_the_grid():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "vocab_size": 50,
    }
    config = transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, **sizes
    )
    llm, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(20)[None]
    with torch.no_grad():
        for name, value in llm.named_parameters():
            value += 0.3 * torch.rand_like(value) * ("norm" in name)
        before, weights = llm(ids).logits, [p.clone() for p in llm.model.layers.parameters()]
        quantisation.off_the_grid(llm)
        torch.testing.assert_close(llm(ids).logits, before, atol=1e-4, rtol=0)
    changed = [not torch.equal(a, b) for a, b in zip(weights, llm.model.layers.parameters())]
    assert all(changed)


def test_what_each_form_of_the_weights_costs_is_measured(monkeypatch, tmp_path):
    pytest.importorskip("onnx")
    monkeypatch.setattr(
        quantisation, "LAYER", {n: (k // 8, m // 8) for n, (k, m) in quantisation.LAYER.items()}
    )
    monkeypatch.setattr(quantisation, "WAYS", quantisation.WAYS[:1] + quantisation.WAYS[-2:])
    exact, *others = quantisation.cost(0.1, tmp_path)
    assert exact["bits"] == pytest.approx(32, abs=0.1) and exact["speed"] == 1
    assert all(5 < row["bits"] < 6.2 and row["ms"] > 0 for row in others)


def test_a_swap_is_timed_between_projectors_that_differ(bundle_copy):
    bundle = Bundle.open(bundle_copy)
    graph = swap.add_user(bundle, "ana")
    weights = graph.with_name(f"{graph.name}.data")
    assert weights.read_bytes() != (bundle_copy / weights.name).read_bytes()
    seconds = swap.swap_seconds(bundle, "onnxruntime", {"onnxruntime": graph}, repeats=2)
    assert list(seconds) == ["onnxruntime"] and 0 < seconds["onnxruntime"] < 60
    told = swap.table(
        {"builder": "tensorrt_rtx 1.7", "build_s": 0.512, "swap_s": {"refit": 0.0213}}
    )
    assert told.splitlines()[2:] == [
        "| an engine of their own is built (tensorrt_rtx 1.7) | 512 ms |",
        "| put in, refit | 21.3 ms |",
    ]
