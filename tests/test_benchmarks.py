"""The studies measure what is deployed, and the documents' tables hold what was measured."""

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tiny_align.align.model.users import load_projector
from tiny_align.benchmarks.standard import training_cost
from tiny_align.benchmarks.studies import (
    alignment,
    alignment_curves,
    alignment_data,
    alignment_table,
    encoder,
    families,
    quantisation,
    quantisation_cost,
    quantisation_llms,
    report,
    swap,
)
from tiny_align.runtime.bundle.bundle import Bundle


@pytest.fixture(scope="module")
def voice(voice_path, tmp_path_factory):
    """Two of the shipped recordings to train on and three to test."""
    folder = tmp_path_factory.mktemp("voice")
    lines = (voice_path / "metadata.jsonl").read_text().splitlines()
    chosen = lines[:2] + lines[-3:]
    for line in chosen:
        name = json.loads(line)["file_name"]
        shutil.copyfile(voice_path / name, folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(chosen))
    return folder


def test_a_projector_in_pytorch_gives_the_deployed_soft_tokens(assistant):
    projector = load_projector(assistant.bundle, assistant.bundle.graph("projector")).eval()
    rng = np.random.default_rng(0)
    features = rng.standard_normal((61, projector.config.feature_size)).astype(np.float32)
    soft_tokens = alignment_data.TorchAssistant(assistant, projector).soft_tokens(features)
    np.testing.assert_allclose(soft_tokens, assistant.soft_tokens(features), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "part", "expected"),
    [
        (
            "--digits FOLDER --few 25 100 --objectives ctc --seeds 1 --out FOLDER",
            "curves",
            " --parts curves --digits FOLDER --objectives ctc --seeds 1 --few 25 100",
        ),
        ("--out FOLDER", "table", " --parts table"),
    ],
)
def test_a_recorded_command_names_changed_options_and_no_folder(tmp_path, options, part, expected):
    words = options.replace("FOLDER", str(tmp_path)).split()
    args = alignment.make_parser().parse_args(words)
    command = alignment.command_of(args, part)
    assert command == f"python -m benchmarks.studies.alignment{expected}"


def test_alignment_writes_a_document_for_each_part(tmp_path, monkeypatch):
    monkeypatch.setattr(
        alignment, "measure", lambda args, part: {"command": alignment.command_of(args, part)}
    )
    monkeypatch.setattr(alignment, "PARTS", {"curves": (lambda report: "", lambda *_: [])})
    assert alignment.main(["--parts", "curves", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "alignment-curves.json").read_text())
    assert document["command"] == "python -m benchmarks.studies.alignment --parts curves"


def test_objectives_that_pool_are_measured_without_windows(bundle_path):
    framed = alignment_data.open_bundle(bundle_path, "ctc").manifest
    pooled = alignment_data.open_bundle(bundle_path, "paper").manifest
    assert framed.windows
    assert pooled.windows is None
    assert framed.encoder_key != pooled.encoder_key


def test_end_to_end_training_has_the_prompt_that_the_runtime_assembles(assistant):
    llm = alignment_table.frozen_llm(assistant)
    prompt = assistant.bundle.manifest.prompt
    speech = np.zeros((2, llm.after.shape[1]), np.float32)
    for before, instruction in zip(llm.prompts, (prompt.instruction, prompt.repeat_instruction)):
        ours = np.concatenate([before.numpy(), speech, llm.after.numpy()])
        np.testing.assert_array_equal(ours, assistant.llm.assemble(speech, instruction))


def test_every_training_sentence_has_both_answers(assistant, voice):
    examples = alignment_data.load_examples(assistant, voice)
    assert [len(example.answers) for example in examples] == [2, 2]
    end = assistant.bundle.manifest.llm.end_tokens[0]
    for example in examples:
        assert example.answers[1] == (*example.tokens, end)


def test_the_instruction_effect_is_measured_for_every_task():
    """Without an instruction the LLM does one task: right for that, wrong for the other."""
    instructed = SimpleNamespace(
        rougeL=1.0,
        rows=[
            {"text": "one two three", "spoken": "a b c", "repeated": "one two three"},
            {"text": "four", "spoken": "d", "repeated": "five"},
        ],
    )
    uninstructed = SimpleNamespace(
        rougeL=0.5,
        rows=[{"text": "one two three", "spoken": "a b c"}, {"text": "four", "spoken": "four"}],
    )
    assert alignment_table.instruction_effect(instructed, uninstructed) == {
        "answer": {"told": 1.0, "untold": 0.5},
        "repeat": {"told": 0.5, "untold": 0.5},
    }


@pytest.mark.parametrize("snr_db", [20, 0])
def test_noise_changes_features_but_not_transcripts(assistant, voice, snr_db):
    clean = alignment_curves.encode_noisy(assistant, voice, None)
    noisy = alignment_curves.encode_noisy(assistant, voice, snr_db)
    for a, b in zip(clean, noisy, strict=True):
        assert (a.text, a.typed) == (b.text, b.typed)
        assert not np.array_equal(a.features, b.features)


def test_a_training_step_of_the_smallest_shape_is_measured():
    row = training_cost.measure("reference", "ctc", threads=1)
    assert 0 < row["step_s"] < 10
    assert 0.1 < row["peak_gb"] < 8


def test_agreement_counts_tokens_up_to_the_first_difference():
    answers = [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 9, 3, 4]), ([5], [5, 6, 7]), ([], [8])]
    assert families.agreement(answers) == {"answers": 4, "tokens": 11, "equal": 5}


def test_the_table_of_families_has_every_family_equal_to_the_last_token():
    pytest.importorskip("transformers", reason="the families are transformers'")
    from tests.support import tiny_encoders, tiny_llms

    measured = json.loads(families.RESULTS.read_text(encoding="utf-8"))
    assert measured["encoders"].keys() == tiny_encoders.MAKERS.keys()
    assert measured["llms"].keys() == tiny_llms.FAMILIES.keys()
    for row in measured["encoders"].values():
        assert row["max_abs_diff"] < 1e-4 < row["max_abs"]
    for row in measured["llms"].values():
        for found in (row["embeddings"], row["text"]):
            assert found["equal"] == found["tokens"] > 100


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_the_measured_tables_are_the_results(path):
    text = path.read_text(encoding="utf-8")
    assert report.render(text) == text and "<!-- table " in text


def test_the_report_replaces_only_between_markers():
    text = (
        "1.23\n<!-- table a -->\nold\n<!-- end a -->\n4.56 <!-- end a -->\n"
        "<!-- table b -->\n<!-- end b -->\n"
    )
    expected = text.replace("old", "new a").replace("b -->\n<", "b -->\nnew b\n<")
    assert report.render(text, body=lambda name: f"new {name}") == expected


def test_the_newest_result_is_reported(tmp_path):
    results = {
        "x": {"date": "2026-01-01T00:00:00", "parts": {"memory": 1}},
        "y": {"date": "2026-01-02T00:00:00", "parts": {"memory": 2}},
        "z": {"date": "2026-01-03T00:00:00", "parts": {}},
        "other": {},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    assert report.newest("memory", tmp_path)["parts"] == {"memory": 2}
    assert report.body_of("bench_growth", tmp_path) == ""


def test_distance_is_by_direction_and_by_size():
    exact = np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32)
    same = encoder.distance([exact], [exact])
    assert same["cosine"] == pytest.approx(1)
    assert same["relative_error"] == 0
    longer = encoder.distance([exact, 2 * exact], [exact, exact])
    assert longer["least_cosine"] == pytest.approx(1)
    assert longer["relative_error"] == pytest.approx(0.5)
    inverted = exact.copy()
    inverted[7] *= -1
    assert encoder.distance([inverted], [exact])["least_cosine_of_a_frame"] == pytest.approx(-1)


def test_the_cost_of_each_form_of_the_weights_is_measured(monkeypatch, tmp_path):
    pytest.importorskip("onnx")
    small = {}
    for name, (rows, columns) in quantisation_cost.LAYER.items():
        small[name] = (rows // 8, columns // 8)
    monkeypatch.setattr(quantisation_cost, "LAYER", small)
    ways = quantisation_cost.WAYS
    monkeypatch.setattr(quantisation_cost, "WAYS", ways[:1] + ways[-2:])
    exact, *others = quantisation_cost.cost(0.1, tmp_path)
    assert exact["bits"] == pytest.approx(32, abs=0.1)
    assert exact["speed"] == 1
    for row in others:
        assert 5 < row["bits"] < 6.2
        assert row["ms"] > 0


def test_a_swap_is_timed_between_projectors_that_differ(bundle_copy):
    bundle = Bundle.open(bundle_copy)
    graph = swap.add_user(bundle, "ana")
    weights = graph.with_name(f"{graph.name}.data")
    assert weights.read_bytes() != (bundle_copy / weights.name).read_bytes()
    seconds = swap.swap_seconds(bundle, "onnxruntime", {"onnxruntime": graph}, repeats=2)
    assert list(seconds) == ["onnxruntime"]
    assert 0 < seconds["onnxruntime"] < 60


def test_the_table_of_swaps_is_in_milliseconds():
    swaps = {"builder": "tensorrt_rtx 1.7", "build_s": 0.512, "swap_s": {"refit": 0.0213}}
    assert swap.table(swaps).splitlines()[2:] == [
        "| an engine of their own is built (tensorrt_rtx 1.7) | 512 ms |",
        "| swap, refit | 21.3 ms |",
    ]


def test_parts_of_the_study_of_quantisation_are_measured_one_by_one(tmp_path):
    path = tmp_path / "results.json"
    study = quantisation.Study(path)
    study.add("files", {"file": "a.gguf", "pytorch": {"divergence": 0.005, "same": 0.97}}, "a")
    again = quantisation.Study(path)
    again.add("encoder", {"forms": {}})
    report = json.loads(path.read_text())
    assert set(report) == {"files", "encoder"}
    assert "--parts encoder" in report["encoder"]["command"]
    assert "| a.gguf | PyTorch in FP32 with llama.cpp | 0.0050 | 97.0 % |" in (
        quantisation.file_table(report["files"])
    )


def test_the_table_of_pretrained_llms_names_the_runtime_and_what_tensorrt_refuses():
    figures = {"divergence": 0.08, "divergence_error": 0.003, "same": 0.86, "bits": 5.0}
    sizes = {"layers_bytes": 66_000_000, "table_bytes": 57_000_000}
    ours = {"runtime": "onnxruntime", "precision": "int4", "block": 32, "head": "int8"}
    ours |= {"algorithm": "", "head_bytes": 28_000_000, "violations": {}, **figures, **sizes}
    refused = ours | {"violations": {"positive scale": 120}, "tokens_per_second": 40.0}
    theirs = {"runtime": "llama.cpp", "precision": "Q4_K_M", **figures, **sizes}
    lines = quantisation.llm_table({"models": {"x": {"forms": [ours, refused, theirs]}}}).split(
        "\n"
    )
    assert lines[2].endswith("| 28.0 | 57.0 |  | yes |")
    assert lines[3].endswith("| 28.0 | 57.0 | 40.0 | no |")
    assert lines[4].startswith("| x | Q4_K_M |  |  | llama.cpp | 0.0800 ± 0.0030 | 86.0 % | 5.00 |")


def test_forms_take_turns_and_the_slower_one_decodes_fewer_tokens():
    order = []
    steps = {
        "fast": lambda: order.append("fast"),
        "slow": lambda: (order.append("slow"), time.sleep(0.002)),
    }
    speeds = quantisation_llms.time_steps(steps, 0.0)
    assert order == (["fast"] * 6 + ["slow"] * 6) * 3
    assert speeds["slow"] < 500 < speeds["fast"]
