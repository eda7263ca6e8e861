"""`tiny-align export` on tiny random models: standard graphs that equal PyTorch's, and what is
refused.

Two exports of the same models are made once, with INT4 and with FP32 weights, both through the
command; the tests look at the bundles. The weights fit float16, so the bundle's embedding table is
exact.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.backends.base import TOPK_TOKENS
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.bundle import Bundle
from tiny_align.runtime.bundle.onnx_weights import data_files, load_graph
from tiny_align.runtime.bundle.profile import graph_profile
from tiny_align.runtime.bundle.tensorrt_rules import count_by_rule, violations
from tiny_align.runtime.commands.options import add_options, read_options
from tiny_align.runtime.errors import TinyAlignError

torch = pytest.importorskip("torch", reason="models are exported from torch")
transformers = pytest.importorskip("transformers", reason="models are exported from transformers")
onnx = pytest.importorskip("onnx", reason="exported graphs are read with onnx")

from tiny_align.export.bundle import check_rules, sentence_tokens  # noqa: E402
from tiny_align.export.encoders import FAMILIES, load_encoder, load_front_end  # noqa: E402
from tiny_align.export.graphs import OPSET  # noqa: E402
from tiny_align.export.llms import LLMS, load_llm  # noqa: E402
from tiny_align.export.options import ExportOptions  # noqa: E402
from tiny_align.export.parity import TOLERANCE  # noqa: E402
from tiny_align.export.projector import check_binding, make_projector  # noqa: E402
from tiny_align.export.prompts import prompt_spec  # noqa: E402
from tiny_align.export.quantise import output_layer  # noqa: E402

GRAPHS = ("encoder", "projector", "llm")
LAYERS = 2
CONTEXT = 128  # of the LLM in conftest.py
LINEARS = 4  # per layer: queries, keys and values in one, gate and up in one


def make_encoder(folder: Path) -> None:
    """ParakeetForCTC, 2 layers x 48, with its preprocessor_config.json."""
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_kernel_size": 5,
        "subsampling_conv_channels": 8,
        "num_mel_bins": 80,
        "scale_input": False,
    }
    config = transformers.ParakeetCTCConfig(vocab_size=29, pad_token_id=28, encoder_config=sizes)
    transformers.ParakeetForCTC(config).save_pretrained(folder)
    front_end = transformers.ParakeetFeatureExtractor(feature_size=80).to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(front_end))


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_llm) -> dict[str, Path]:
    """The folders of the two models."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    make_encoder(folder / "encoder")
    return {"encoder": folder / "encoder", "llm": tiny_llm}


@pytest.fixture(scope="module")
def int4(models, export, tmp_path_factory):
    return export(models, tmp_path_factory.mktemp("out") / "deep/int4")  # INT4 is the default


@pytest.fixture(scope="module")
def fp32(models, export, tmp_path_factory):
    return export(
        models, tmp_path_factory.mktemp("out") / "fp32", "--precision", "fp32", "--name", "exact"
    )


@pytest.fixture(scope="module", params=["int4", "fp32"])
def exported(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def general(fp32):
    """The general projector in PyTorch, as align reads it from the bundle."""
    from tiny_align.align.model.users import load_projector

    return load_projector(fp32.bundle, fp32.bundle.graph("projector")).eval()


def read(bundle: Bundle, name: str):
    return load_graph(bundle.graph(name))


# --- the bundle and the report ---


def test_report_is_the_only_line(exported):
    assert len(exported.stdout.splitlines()) == 1
    report = json.loads(exported.stdout)
    assert report["path"] == str(exported.bundle.path)
    files = [exported.bundle.path / name for name in exported.bundle.manifest.files]
    assert report["bytes"] == sum(file.stat().st_size for file in files) > 0
    llm = exported.bundle.manifest.llm
    assert report["context"] == llm.max_context
    position = 2 * llm.n_layers * llm.n_kv_heads * llm.head_size * 4  # keys and values, FP32
    assert report["cache_bytes_per_position"] == position
    for name, graph in exported.bundle.manifest.graphs.items():
        assert report["graphs"].pop(name) == {
            "precision": graph.precision,
            "parity": graph.parity,
            "tensorrt_violations": broken_rules(exported.bundle, name),
        }
    assert report["graphs"] == {}


def broken_rules(bundle: Bundle, name: str) -> dict[str, int]:
    profile = graph_profile(bundle.manifest.graphs[name], bundle.manifest.dims)
    return count_by_rule(violations(read(bundle, name), bundle.path, profile))


def test_tensorrt_takes_every_graph(exported):
    check_rules(exported.bundle.path, exported.bundle.manifest)


def test_a_graph_that_tensorrt_would_refuse_is_refused(exported, tmp_path):
    shutil.copytree(exported.bundle.path, tmp_path / "b")
    path = tmp_path / "b/llm.onnx"
    model = load_graph(path)
    model.graph.node[-1].op_type = "BitwiseAnd"
    onnx.save(model, str(path))
    with pytest.raises(
        TinyAlignError, match=r"TensorRT would refuse the graph 'llm': .*BitwiseAnd"
    ):
        check_rules(tmp_path / "b", exported.bundle.manifest)


def test_names_and_precisions_are_those_of_the_options(int4, fp32):
    assert (int4.bundle.manifest.name, fp32.bundle.manifest.name) == ("int4", "exact")
    for exported, llm in ((int4, "int4"), (fp32, "fp32")):
        precisions = {n: g.precision for n, g in exported.bundle.manifest.graphs.items()}
        assert precisions == {"encoder": "fp32", "projector": "fp32", "llm": llm}


def test_only_the_bundle_is_left(exported):
    assert [p.name for p in exported.bundle.path.parent.iterdir()] == [exported.bundle.path.name]
    files = {
        p.relative_to(exported.bundle.path).as_posix()
        for p in exported.bundle.path.rglob("*")
        if p.is_file()
    }
    assert files == {"manifest.json", *exported.bundle.manifest.files}
    assert all((exported.bundle.path / name).stat().st_mode & 0o044 == 0o044 for name in files)


def test_every_graph_equals_pytorch_within_the_tolerance(exported):
    for name in GRAPHS:
        parity = exported.bundle.manifest.graphs[name].parity
        assert parity["max_diff_over_std_allowed"] == TOLERANCE
        figures = parity["max_diff_over_std"]
        assert len(figures) >= 4 and figures.keys() == parity["max_abs_diff_to_pytorch"].keys()
        assert all(0 <= figure < TOLERANCE for figure in figures.values()), (name, figures)


def test_manifest_has_the_divergence_of_int4(int4, fp32):
    parity = int4.bundle.manifest.graphs["llm"].parity
    assert 0 < parity["kl_to_pytorch"] < 1 and 0 < parity["same_next_token"] <= 1
    assert 4.5 <= parity["bits_per_weight"] <= 6.25
    assert "kl_to_pytorch" not in fp32.bundle.manifest.graphs["llm"].parity


def test_manifest_describes_the_models(exported, models):
    manifest = exported.bundle.manifest
    encoder = json.loads((models["encoder"] / "config.json").read_text())["encoder_config"]
    llm = json.loads((models["llm"] / "config.json").read_text())
    assert manifest.encoder.feature_size == encoder["hidden_size"]
    assert manifest.encoder.frame_s == pytest.approx(encoder["subsampling_factor"] * 0.01)
    assert manifest.llm.hidden_size == llm["hidden_size"]
    assert manifest.llm.n_layers == llm["num_hidden_layers"]
    assert manifest.llm.n_kv_heads == llm["num_key_value_heads"]
    assert manifest.llm.vocabulary == llm["vocab_size"]
    assert manifest.llm.end_tokens == (llm["eos_token_id"],)
    assert manifest.front_end.floor_db is None  # which is ours: transformers knows none


def test_context_is_a_number_or_all_that_the_llm_has():
    parser = argparse.ArgumentParser()
    add_options(parser, ExportOptions)
    models = ["--encoder", "e", "--llm", "l"]

    def context(*arguments: str) -> int:
        return read_options(parser.parse_args([*models, *arguments]), ExportOptions).max_context

    assert context() == 2048
    assert context("--context", "512") == context("--max-context", "512") == 512
    assert context("--context", "max") == 2**24  # no LLM has more: llm_spec takes the smaller
    with pytest.raises(SystemExit):
        context("--context", "some")


def test_no_dimension_exceeds_the_llms_context(exported):
    """The LLM has fewer positions than the default."""
    manifest = exported.bundle.manifest
    assert manifest.llm.max_context == CONTEXT
    assert manifest.dims["tokens"][2] == CONTEXT
    assert manifest.dims["past"][2] == CONTEXT
    for min_size, opt_size, max_size in manifest.dims.values():
        assert 0 <= min_size <= opt_size <= max_size


# --- the graphs ---


@pytest.mark.parametrize("name", GRAPHS)
def test_static_dimensions_are_numbers_and_the_batch_is_one(exported, name):
    model, spec = read(exported.bundle, name), exported.bundle.manifest.graphs[name]
    values = [*model.graph.input, *model.graph.output]
    assert [v.name for v in values] == [t.name for t in (*spec.inputs, *spec.outputs)]
    for value, tensor in zip(values, (*spec.inputs, *spec.outputs)):
        dims = value.type.tensor_type.shape.dim
        assert tuple(d.dim_param or d.dim_value for d in dims) == tensor.shape
        kind = onnx.TensorProto.INT64 if value.name == TOPK_TOKENS else onnx.TensorProto.FLOAT
        assert dims[0].dim_value == 1 and value.type.tensor_type.elem_type == kind
    dynamic = {d for t in spec.inputs for d in t.shape if isinstance(d, str)}
    assert dynamic <= set(exported.bundle.manifest.dims)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_standard_onnx_of_a_known_opset(exported, name):
    model = read(exported.bundle, name)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", OPSET)} and OPSET <= 21
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    onnx.checker.check_model(str(exported.bundle.graph(name)))


@pytest.mark.parametrize("name", GRAPHS)
def test_large_weights_are_in_the_data_file(exported, name):
    large = [t for t in read(exported.bundle, name).graph.initializer if np.prod(t.dims) >= 1_024]
    assert large and all(t.data_location == onnx.TensorProto.EXTERNAL for t in large)
    assert data_files(read(exported.bundle, name)) == [f"{name}.onnx.data"]


def test_llm_outputs_logits_of_the_last_position_only(exported):
    logits = read(exported.bundle, "llm").graph.output[0]
    shape = [d.dim_value for d in logits.type.tensor_type.shape.dim]
    assert logits.name == "logits" and shape == [1, 1, exported.bundle.manifest.llm.vocabulary]
    cache = ["present.0.key", "present.0.value", "present.1.key", "present.1.value"]
    names = [output.name for output in read(exported.bundle, "llm").graph.output]
    assert names == ["logits", "best_logits", "best_tokens", *cache]


def test_llm_is_int4_and_its_output_layer_int8(int4):
    """For TensorRT INT8 is two INT4 weights: twice the inputs."""
    spec = int4.bundle.manifest.graphs["llm"]
    for backend, kind in ((None, onnx.TensorProto.INT4), ("onnxruntime", onnx.TensorProto.INT8)):
        path = int4.bundle.graph("llm", backend)
        model = load_graph(path)
        tensors = {t.name: t for t in model.graph.initializer}
        dequantised = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
        stored = {node.output[0]: tensors[node.input[0]] for node in dequantised}
        assert len(stored) == LINEARS * LAYERS + 1
        head = stored.pop(output_layer(model).input[1])
        assert head.data_type == kind
        rows = int4.bundle.manifest.llm.hidden_size
        assert head.dims[0] == (2 * rows if backend is None else rows)
        types = [tensor.data_type for tensor in stored.values()]
        if spec.parity["bits_per_weight"] == 4.5:
            assert types == [onnx.TensorProto.INT4] * LINEARS * LAYERS
    n_weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims) == 2)
    data = int4.bundle.graph("llm").with_name("llm.onnx.data")
    assert data.stat().st_size < 0.25 * 4 * n_weights


def test_other_graphs_are_fp32(int4, fp32):
    types = onnx.TensorProto
    expected = {types.FLOAT, types.INT64, types.INT32, types.BOOL}
    for exported, name in ((int4, "encoder"), (int4, "projector"), (fp32, "llm")):
        graph = read(exported.bundle, name).graph
        assert {t.data_type for t in graph.initializer} <= expected
        assert not {n.op_type for n in graph.node} & {"DequantizeLinear", "QuantizeLinear"}


# --- the runtime on the exported graphs ---


def test_greedy_generation_equals_transformers(fp32, models):
    llm, tokenizer = load_llm(str(models["llm"]))
    with Assistant.load(fp32.bundle, threads=1) as assistant:
        for text in ("what is the time", "call my mother", "two three four"):
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt"
            )["input_ids"]
            answer = llm.generate(
                ids, do_sample=False, max_new_tokens=24, attention_mask=torch.ones_like(ids)
            )[0]
            expected = [i for i in answer[ids.shape[1] :].tolist() if i != tokenizer.eos_token_id]
            got = assistant.answer_text(text, decoding=Decoding(max_tokens=24))
            assert list(got.tokens) == expected
            assert len(set(expected)) > 3  # the answer varies


def test_speech_becomes_soft_tokens(exported, speech):
    with Assistant.load(exported.bundle, threads=1) as assistant:
        answer = assistant.answer(speech, decoding=Decoding(max_tokens=4))
        assert assistant.features(speech).shape[1] == exported.bundle.manifest.encoder.feature_size
    assert len(answer.tokens) <= 4


# --- projectors: weights in the graph's data file ---


def assert_graph_is(path: Path, bundle: Bundle, projector) -> None:
    spec = bundle.manifest.graphs["projector"]
    rng = np.random.default_rng(0)
    with load_runner(path, spec, "onnxruntime", 1) as runner, torch.no_grad():
        for n_frames in (2, 7, 24, 200):
            shape = (1, n_frames, spec.inputs[0].shape[2])
            features = rng.standard_normal(shape).astype(np.float32)
            got = runner({"features": features})["soft_tokens"]
            difference = np.abs(got - projector(torch.from_numpy(features)).numpy())
            assert difference.max() < 1e-4, (
                f"{n_frames} frames: max {difference.max():.2g}, mean {difference.mean():.2g}"
            )


def test_general_projector_depends_on_the_seed_only(fp32, models, general):
    options = ExportOptions(str(models["encoder"]), str(models["llm"]))
    made = make_projector(load_encoder(options.encoder), load_llm(options.llm)[0], options)
    assert all(
        torch.equal(value, general.state_dict()[name]) for name, value in made.state_dict().items()
    )
    assert_graph_is(fp32.bundle.graph("projector"), fp32.bundle, general)


def test_weights_of_a_user_reach_the_graph(fp32, general, tmp_path):
    from tiny_align.align.model.projector import build_projector
    from tiny_align.align.model.users import load_projector, write_user

    torch.manual_seed(5)
    before = data_of(fp32.bundle)
    projector = build_projector(fp32.bundle.manifest.projector).eval()
    for value in projector.parameters():
        value.data += 0.1 * torch.randn_like(value)
    write_user(
        fp32.bundle,
        tmp_path / "ana",
        projector.state_dict(),
        {"steps": 1},
        fp32.bundle.speech_tokens(),
    )
    path = fp32.bundle.projector("ana", tmp_path)
    assert_graph_is(path, fp32.bundle, projector)
    again = load_projector(fp32.bundle, path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in projector.state_dict().items())
    assert data_of(fp32.bundle) == before
    assert_graph_is(fp32.bundle.graph("projector"), fp32.bundle, general)


def data_of(bundle: Bundle) -> list[bytes]:
    return [(bundle.path / name).read_bytes() for name in ("projector.onnx", "projector.onnx.data")]


def test_trained_projector_is_loaded(models, general, tmp_path):
    from safetensors.torch import save_file

    save_file({k: v + 1 for k, v in general.state_dict().items()}, tmp_path / "trained.safetensors")
    options = ExportOptions("", "", projector=str(tmp_path / "trained.safetensors"))
    made = make_projector(
        load_encoder(str(models["encoder"])), load_llm(str(models["llm"]))[0], options
    )
    assert all(torch.equal(v, general.state_dict()[k] + 1) for k, v in made.state_dict().items())


def test_align_trains_a_general_projector_for_the_bundle(
    int4, voice_path, make_user, run_cli, tmp_path
):
    """Of the bundle just exported, with a user in it, on sixty recordings."""
    shutil.copytree(int4.bundle.path, tmp_path / "bundle")
    make_user(int4.bundle, tmp_path / "bundle/users/ana")
    assert not int4.bundle.manifest.projector_trained
    data = ("--data", voice_path, "--utterances", 60, "--steps", 8, "--threads", 1)
    done = run_cli("align", "--general", "--bundle", tmp_path / "bundle", *data)
    assert done.status == 0, done.stderr
    assert done.document["utterances"] == 60 and done.document["wer_after"] >= 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert (
        bundle.manifest.projector_trained
        and bundle.replay.is_file()
        and bundle.projector("ana").is_file()
    )
    weights = [data_of(b)[1] for b in (bundle, int4.bundle)]
    assert weights[0] != weights[1]


def test_large_vocabulary_limits_speech_to_the_tokens_of_the_sentences(
    models, fp32, export, refused, speech, tmp_path, monkeypatch
):
    """Nothing for an untrained projector; for a trained one, what `--sentences` lists.

    The graphs are copied from another export.
    """

    def copied(name: str):
        def copy(folder: Path, *_):
            files = [*fp32.bundle.path.glob(f"{name}.*")]
            if name == "llm":
                files.append(fp32.bundle.embeddings)
            for path in files:
                shutil.copyfile(path, folder / path.name)
            return fp32.bundle.manifest.graphs[name]

        return copy

    for name in GRAPHS:
        monkeypatch.setattr(f"tiny_align.export.bundle.write_{name}", copied(name))
    monkeypatch.setattr("tiny_align.export.bundle.LARGE_VOCABULARY", 100)
    (tmp_path / "trained").touch()
    assert "give its training texts with --sentences" in refused(
        models, tmp_path / "out", "--projector", tmp_path / "trained"
    )
    bundle = export(models, tmp_path / "out", "--precision", "fp32").bundle
    assert bundle.speech_tokens().tolist() == [] and "speech_tokens.npy" in bundle.manifest.files
    with Assistant.load(bundle, threads=1) as assistant:
        assert not assistant.answer(speech).heard

    (tmp_path / "sentences.txt").write_text("turn on the light\n\nthe light\n", encoding="utf-8")
    tokenizer = load_llm(str(models["llm"]))[1]
    listed = sentence_tokens(str(tmp_path / "sentences.txt"), tokenizer, bundle.manifest.prompt)
    assert listed.dtype == np.int32
    assert listed.tolist() == sorted(
        set(tokenizer.encode("turn on the light", add_special_tokens=False))
    )


# --- refused before anything is exported ---


@pytest.fixture
def bert(tmp_path) -> Path:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(
        '{"model_type": "bert", "architectures": ["BertModel"]}'
    )
    return tmp_path / "bert"


@pytest.mark.parametrize(
    ("kind", "supported"),
    [
        ("encoder", f"supported encoders: {', '.join(FAMILIES)}"),
        ("llm", f"supported LLMs: {', '.join(LLMS)}"),
    ],
)
def test_unsupported_architecture_is_refused(refused, models, bert, tmp_path, kind, supported):
    sentence = refused(models, tmp_path / "out", **{kind: bert})
    assert f"{bert} is a 'bert'; {supported}" in sentence and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["encoder", "llm"])
def test_missing_model_folder_is_refused(refused, models, tmp_path, kind):
    sentence = refused(models, tmp_path / "out", **{kind: tmp_path / "nothing/here"})
    assert "there is no model folder" in sentence and "nothing/here" in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"), [("precision", "int5"), ("head-precision", "best"), ("block-size", 48)]
)
def test_unknown_precision_is_refused(refused, models, tmp_path, option, value):
    assert f"--{option} is {value}: choose one of " in refused(
        models, tmp_path / "out", f"--{option}", value
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-context", 0),
        ("--max-context", -5),
        ("--soft-tokens", 0),
        ("--window-s", "nan"),
        ("--window-s", "-1.0"),
    ],
)
def test_sizes_out_of_range_are_refused(run_cli, models, tmp_path, option, value):
    paths = ("--encoder", models["encoder"], "--llm", models["llm"], "--out", tmp_path / "out")
    done = run_cli("export", *paths, option, value)
    assert done.status == 2 and f"{option} is {value}: expected " in done.stderr
    assert not list(tmp_path.iterdir())


def changed(models, kind: str, tmp_path: Path, change) -> Path:
    """A copy of a model folder with something wrong."""
    folder = tmp_path / kind
    shutil.copytree(models[kind], folder)
    change(folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1_000])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_parts(folder: Path) -> Path:
    """The weights as several files with an index, as large models have them; returns the index."""
    model = transformers.ParakeetForCTC.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    return folder / "model.safetensors.index.json"


DAMAGES = {
    "encoder weights cut off": (
        "encoder",
        lambda f: cut(f / "model.safetensors"),
        "cannot be loaded",
    ),
    "encoder without weights": (
        "encoder",
        lambda f: (f / "model.safetensors").unlink(),
        "cannot be loaded",
    ),
    "encoder weights of which a part is missing": (
        "encoder",
        lambda f: next(in_parts(f).parent.glob("model-00002-*")).unlink(),
        "cannot be loaded",
    ),
    "encoder weights with half an index": (
        "encoder",
        lambda f: cut(in_parts(f)),
        "cannot be loaded",
    ),
    "a pointer in place of encoder weights": (
        "encoder",
        lambda f: (f / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        "cannot be loaded",
    ),
    "no front end": (
        "encoder",
        lambda f: (f / "preprocessor_config.json").unlink(),
        "no readable preprocessor_config.json",
    ),
    "another front end": (
        "encoder",
        lambda f: (f / "preprocessor_config.json").write_text('{"feature_size": 80}'),
        "its preprocessor_config.json lacks 'sampling_rate'",
    ),
    "damaged config": (
        "llm",
        lambda f: cut(f / "config.json") or (f / "config.json").write_text("{"),
        "cannot be loaded",
    ),
    "no tokenizer": ("llm", lambda f: [p.unlink() for p in f.glob("*token*")], "cannot be loaded"),
    "a smaller model's tokenizer": (
        "llm",
        lambda f: edit(f / "generation_config.json", eos_token_id=[900, 901]),
        "ends an answer with token 900, its tokenizer goes up to token 299: they belong to different models",
    ),
    "no chat template": (
        "llm",
        lambda f: (f / "chat_template.jinja").unlink(),
        "has no chat template",
    ),
}


@pytest.mark.parametrize(("kind", "change", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_model_is_refused(refused, models, tmp_path, kind, change, sentence):
    folder = changed(models, kind, tmp_path, change)
    assert sentence in refused(models, tmp_path / "out", **{kind: folder})
    assert [p.name for p in tmp_path.iterdir()] == [kind]


@pytest.mark.parametrize("content", [None, b"not safetensors", b""])
def test_file_that_is_no_projector_is_refused(refused, models, tmp_path, content):
    if content is not None:
        (tmp_path / "p.safetensors").write_bytes(content)
    sentence = refused(models, tmp_path / "out", "--projector", tmp_path / "p.safetensors")
    assert (
        "is no projector for this encoder and LLM" in sentence and not (tmp_path / "out").exists()
    )


def wider(name: str):
    """The weights of a projector with one more row in one of them."""

    def change(weights: dict) -> dict:
        return weights | {name: torch.zeros(len(weights[name]) + 1, *weights[name].shape[1:])}

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            wider("enter.0.weight"),
            "expected its enter.0.weight to be [48], got [49]",
        ),  # another encoder's
        (wider("leave.3.bias"), "expected its leave.3.bias to be [65], got [66]"),  # another LLM's
        (
            lambda w: {k: v for k, v in w.items() if "stack" not in k},
            "expected its stack.bias to be [256], got absent",
        ),
        (lambda w: w | {"more": torch.zeros(3)}, "expected its more to be absent, got [3]"),
    ],
)
def test_projector_of_other_sizes_is_refused(refused, models, general, tmp_path, change, expected):
    from safetensors.torch import save_file

    save_file(change(dict(general.state_dict())), tmp_path / "p.safetensors")
    sentence = refused(models, tmp_path / "home/out", "--projector", tmp_path / "p.safetensors")
    assert (
        f"is no projector for this encoder and LLM: {expected}" in sentence
        and "tiny-align align --general" in sentence
    )
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_projector_with_nan_is_refused(refused, models, general, tmp_path):
    from safetensors.torch import save_file

    weights = dict(general.state_dict())
    weights["leave.3.bias"] = torch.full_like(weights["leave.3.bias"], float("nan"))
    save_file(weights, tmp_path / "p.safetensors")
    sentence = refused(models, tmp_path / "out", "--projector", tmp_path / "p.safetensors")
    assert "its leave.3.bias holds NaN or infinity" in sentence and not (tmp_path / "out").exists()


def test_projector_of_another_llm_of_the_same_sizes_is_refused(fp32, models, general, tmp_path):
    """Its file names the embedding table it was trained for."""
    from safetensors.torch import save_file

    path = tmp_path / "p.safetensors"
    ours = fp32.bundle.manifest.embeddings_sha256
    save_file(general.state_dict(), path)
    check_binding(str(path), ours)  # it names no table
    save_file(general.state_dict(), path, {"embeddings_sha256": ours})
    check_binding(str(path), ours)
    save_file(general.state_dict(), path, {"embeddings_sha256": "0" * 64})
    with pytest.raises(TinyAlignError, match="was trained for another LLM"):
        check_binding(str(path), ours)


def test_missing_sentences_file_is_refused(refused, models, tmp_path):
    sentence = refused(models, tmp_path / "home/out", "--sentences", tmp_path / "no.txt")
    assert f"there is no file {tmp_path / 'no.txt'}" in sentence and not list(tmp_path.iterdir())


def test_folder_that_is_no_bundle_is_not_replaced(refused, models, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("years of work")
    sentence = refused(models, tmp_path / "home")
    assert "is not a bundle and not empty" in sentence
    assert (tmp_path / "home/thesis.txt").read_text() == "years of work"


def test_bundle_with_users_is_not_replaced(refused, models, bundle_copy, make_user):
    make_user(Bundle.open(bundle_copy), bundle_copy / "users/ana")
    assert "holds the projectors of ana" in refused(models, bundle_copy)
    assert Bundle.open(bundle_copy).projector("ana").is_file()


# --- loading ---


def test_models_stored_in_half_precision_are_loaded_in_fp32(models, tmp_path):
    encoder = transformers.ParakeetForCTC.from_pretrained(models["encoder"]).bfloat16()
    encoder.save_pretrained(tmp_path / "half")
    shutil.copyfile(
        models["encoder"] / "preprocessor_config.json", tmp_path / "half/preprocessor_config.json"
    )
    loaded = load_encoder(str(tmp_path / "half"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_our_front_end_parameters_are_read(models, tmp_path):
    folder = changed(models, "encoder", tmp_path, lambda f: None)
    value = json.loads((folder / "preprocessor_config.json").read_text()) | {"floor_db": 55.0}
    (folder / "preprocessor_config.json").write_text(json.dumps(value))
    assert load_front_end(str(folder), "ParakeetFeatureExtractor").floor_db == 55.0


def test_prompt_is_the_template_cut_at_its_holes(models):
    _, tokenizer = load_llm(str(models["llm"]))
    spec = prompt_spec(tokenizer, "Answer.", "Repeat.")
    assert (spec.before, spec.between, spec.after) == ("<bos>", "<user>", "<assistant>")
    assert (spec.instruction, spec.repeat_instruction) == ("Answer.", "Repeat.")
