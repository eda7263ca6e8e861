"""Model folders: no code runs, and anything but a whole model is described before it is loaded."""

import json
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="models are exported from torch")
transformers = pytest.importorskip("transformers", reason="models are exported from transformers")

from safetensors.torch import load_file, save_file  # noqa: E402 - needs the packages above

from tiny_align.export.encoders import FAMILIES, load_encoder  # noqa: E402
from tiny_align.export.llms import LLMS, load_llm  # noqa: E402
from tiny_align.export.model_folder import model_folder  # noqa: E402
from tiny_align.runtime.errors import TinyAlignError  # noqa: E402

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
EVIL = "import pathlib\n\npathlib.Path(__file__).with_name('RAN').write_text('yes')\n"
CODE = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.T", None],
}


@pytest.fixture
def folder(tiny_llm, tmp_path) -> Path:
    """A copy of the tiny LLM that may be changed."""
    return Path(shutil.copytree(tiny_llm, tmp_path / "llm"))


def check(folder: Path) -> Path:
    return model_folder(str(folder), "LLM", LLMS)


def edit(path: Path, **changes) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**value, **changes}))


def test_whole_model_is_accepted(folder):
    (folder / "pytorch_model.bin").write_text(POINTER)  # safetensors come first
    (folder / "README.md").write_text(POINTER)
    edit(folder / "vocab.json", auto_map=7)  # a token
    assert check(folder) == folder


# --- code ---


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        (
            "config.json",
            {"auto_map": CODE, "model_type": "my_llama"},
            "auto_map in its config.json",
        ),
        (
            "config.json",
            {"text_config": {"auto_map": CODE}},
            "text_config.auto_map in its config.json",
        ),
        ("tokenizer_config.json", {"auto_map": CODE}, "auto_map in its tokenizer_config.json"),
        (
            "tokenizer_config.json",
            {"auto_map": ["evil.T", None]},
            "auto_map in its tokenizer_config.json",
        ),
        (
            "preprocessor_config.json",
            {"auto_map": CODE},
            "auto_map in its preprocessor_config.json",
        ),
        (
            "processor_config.json",
            {"feature_extractor": {"auto_map": CODE}},
            "feature_extractor.auto_map in its proc",
        ),
        ("generation_config.json", {"auto_map": CODE}, "auto_map in its generation_config.json"),
        (
            "any.json",
            {"parts": [{"auto_map": "someone/repo--evil.Config"}]},
            "parts.0.auto_map in its any.json",
        ),
    ],
)
def test_folder_that_names_code_is_refused(folder, file, content, field):
    edit(folder / file, **content)
    (folder / "evil.py").write_text(EVIL)
    with pytest.raises(TinyAlignError, match="has code of its own") as refusal:
        check(folder)
    assert field in str(refusal.value) and not (folder / "RAN").exists()


def test_escaped_name_of_code_is_found(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace("{", '{"auto\\u005fmap": {"AutoConfig": "evil.Config"},', 1)
    )
    with pytest.raises(TinyAlignError, match="has code of its own"):
        check(folder)


def test_custom_generate_folder_is_refused(folder):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(EVIL)
    with pytest.raises(
        TinyAlignError, match=r"has code of its own \(custom_generate/generate\.py\)"
    ):
        check(folder)


def test_command_asks_no_question_and_runs_no_code(folder, tmp_path):
    """Whatever stdin would answer."""
    edit(folder / "config.json", auto_map=CODE, model_type="my_llama")
    (folder / "evil.py").write_text(EVIL)
    line = ["export", "--encoder", folder, "--llm", folder, "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "tiny_align.runtime.commands.cli", *map(str, line)]
    done = subprocess.run(
        command, input="y\n" * 99, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "auto_map in its config.json" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llm"]
    assert not list(tmp_path.rglob("RAN"))


def test_attention_named_by_a_configuration_is_not_downloaded(folder):
    """transformers would take it from the hub, where the package `kernels` is installed."""
    name = "someone/attention"
    edit(folder / "config.json", attn_implementation=name, _attn_implementation=name)
    assert load_llm(str(folder))[0].config._attn_implementation == "sdpa"


class Evil:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "yes")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_of_code_is_not_run(folder, tmp_path, zipped):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(
        {**weights, "x": Evil(tmp_path / "RAN")},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        TinyAlignError, match="pickle of more than tensors, whose code is never run"
    ) as refusal:
        load_llm(str(folder))
    assert not (tmp_path / "RAN").exists() and "weights_only" not in str(refusal.value)


def test_pickle_of_tensors_is_loaded(folder):
    wanted = load_file(folder / WEIGHTS)
    torch.save(wanted, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    loaded = load_llm(str(folder))[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", ["vocab.pkl", "vocab.bin", "vocab_file"])
def test_pickled_vocabulary_is_not_run(folder, tmp_path, name):
    """As TransfoXL's tokenizer has it."""
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "RAN")))
    files = {"vocab_file": name, "pretrained_vocab_file": name}
    edit(folder / "tokenizer_config.json", tokenizer_class="TransfoXLTokenizer", **files)
    with pytest.raises(TinyAlignError):
        load_llm(str(folder))
    assert not (tmp_path / "RAN").exists()


# --- the network ---


def test_local_folder_is_loaded_without_the_network(folder, tmp_path, monkeypatch):
    from tests.support.tiny_encoders import make_encoder

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address) or [])
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    # Transformers would ask the hub to convert it.
    torch.save(weights, folder / "pytorch_model.bin")
    edit(folder / "config.json", transformers_version="4.40.0", _name_or_path="someone/model")
    load_llm(str(folder))
    load_encoder(str(make_encoder("whisper", tmp_path / "encoder")))
    assert asked == []


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with the folder under the id "someone/model"; hub() -> the files downloaded from it."""
    from huggingface_hub.utils import filter_repo_objects

    cache = tmp_path / "0123abcd"  # a commit

    def download(hub_id, revision, allow_patterns):
        assert hub_id == "someone/model" and revision == (cache.name if cache.exists() else None)
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return lambda: {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()}


def test_only_needed_files_of_a_hub_id_are_downloaded(folder, hub):
    (folder / "pytorch_model.bin").write_bytes(b"the same in another form")
    (folder / "model.onnx").write_bytes(b"and in another")
    model, tokenizer = load_llm("someone/model")
    assert model.config.vocab_size == len(tokenizer)
    assert "pytorch_model.bin" not in hub() and "model.onnx" not in hub() and WEIGHTS in hub()


def test_every_shard_of_a_hub_id_is_downloaded(folder, hub):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = {p.name for p in folder.glob("model-*.safetensors")}
    load_llm("someone/model")
    assert len(shards) > 1 and shards <= hub()


def test_hub_id_with_code_is_refused_before_its_weights_are_downloaded(folder, hub):
    edit(folder / "config.json", auto_map=CODE)
    with pytest.raises(TinyAlignError, match="someone/model has code of its own"):
        load_llm("someone/model")
    assert WEIGHTS not in hub()


# --- no whole model ---


def only(folder: Path, *names: str) -> None:
    """Leave nothing in a folder but files of these names, new ones with a few bytes."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def retyped(folder: Path, name: str, dtype) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, name: weights[name].to(dtype)}, folder / WEIGHTS, {"format": "pt"})


def adapter(folder: Path, **config) -> None:
    edit(folder / "adapter_config.json", **config)
    (folder / "adapter_model.safetensors").write_bytes(b"")


def sharded(folder: Path, *left: int) -> None:
    """The weights as shards with an index, of which only these are left."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    for n, path in enumerate(sorted(folder.glob("model-*.safetensors"))):
        if n not in left:
            path.unlink()


UP = "model.layers.0.mlp.up_proj.weight"
KINDS = {
    "adapter": (
        lambda f: only(f) or adapter(f, peft_type="LORA", base_model_name_or_path="someone/base"),
        "is an adapter (LORA) for someone/base, not a whole model: merge it",
    ),
    "adapter without its configuration": (lambda f: only(f, "adapter_model.bin"), "is an adapter (PEFT) for some base"),
    "adapter beside a model": (lambda f: adapter(f, peft_type="IA3"), "or take the files adapter_* away"),
    "bitsandbytes": (
        lambda f: edit(f / "config.json", quantization_config={"load_in_8bit": True}),
        "is a checkpoint quantised by bitsandbytes (quantization_config in its config.json): give the one in full",
    ),
    "GPTQ": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised by GPTQ",
    ),
    "AWQ": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "awq"}), "quantised by AWQ"),
    "any other method": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "compressed-tensors"}),
        "quantised by compressed-tensors",
    ),
    "quantised inside": (
        lambda f: edit(f / "config.json", text_config={"quantization_config": {"quant_method": "fp8"}}),
        "quantised by FP8",
    ),
    "MLX": (lambda f: edit(f / "config.json", quantization={"bits": 4, "group_size": 64}), "quantised by MLX"),
    "an older GPTQ": (lambda f: edit(f / "quantize_config.json", bits=4), "GPTQ (its quantize_config.json)"),
    "quantised without a word": (lambda f: retyped(f, UP, torch.int8), f"({UP} is I8)"),
    "FP8 without a word": (lambda f: retyped(f, UP, torch.float8_e4m3fn), f"({UP} is F8_E4M3)"),
    "a shard missing": (lambda f: sharded(f, 0, 2, 3), "it lacks 1 of the 4 files of weights that its model.safetens"),
    "an index without shards": (lambda f: sharded(f), "it lacks 4 of the 4 files of weights"),
    "shards without an index": (
        lambda f: sharded(f, 0, 1, 2, 3) or (f / "model.safetensors.index.json").unlink(),
        "model-00001-of-00004.safetensors without the index model.safetensors.index.json",
    ),
    "an index that points outside": (
        lambda f: sharded(f) or edit(f / "model.safetensors.index.json", weight_map={"x": "../x.safetensors"}),
        "is no index of weights",
    ),
    "cut off": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]),
        "its model.safetensors is cut off or damaged (expected",
    ),
    "no safetensors at all": (lambda f: (f / WEIGHTS).write_text("<!DOCTYPE html>" * 9), "is cut off or damaged"),
    "a pointer for weights": (lambda f: (f / WEIGHTS).write_text(POINTER), "model.safetensors is a Git LFS pointer"),
    "a pointer for a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(POINTER),
        "its tokenizer.json is a Git LFS pointer, not the file itself. Run `git lfs pull`",
    ),
    "a link to nothing": (
        lambda f: (f / WEIGHTS).unlink() or (f / WEIGHTS).symlink_to("../blobs/0"),
        "its model.safetensors is a link to nothing",
    ),
    "GGUF": (lambda f: only(f, "model.Q4_K_M.gguf"), "its weights are GGUF, llama.cpp's format (model.Q4_K_M.gguf)"),
    "several GGUF files": (
        lambda f: only(f, "a.Q8_0.gguf", "b.Q4_0.gguf"),
        "or for an LLM one of its files a.Q8_0.gguf, b.Q4_0.gguf",
    ),
    "GGUF beside a configuration": (lambda f: only(f, "config.json", "x.gguf"), "GGUF, llama.cpp's format (x.gguf)"),
    "ONNX": (lambda f: only(f, "config.json", "onnx/model.onnx"), "its weights are ONNX graphs (onnx/model.onnx)"),
    "TensorFlow": (lambda f: only(f, "config.json", "tf_model.h5"), "its weights are TensorFlow's (tf_model.h5)"),
    "Flax": (lambda f: only(f, "config.json", "flax_model.msgpack"), "its weights are Flax's (flax_model.msgpack)"),
    "an archive": (lambda f: only(f, "parakeet.nemo"), "its weights are a NeMo archive (parakeet.nemo)"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "it has no weights, expected model.safetensors"),
    "an empty folder": (lambda f: only(f), "is an empty folder: give the folder of a whole transformers model"),
    "the folder above": (lambda f: only(f, "snapshot/config.json"), "llm/snapshot has one: give the folder"),
    "no configuration": (lambda f: only(f, "notes.txt"), "is no model folder, it has no config.json"),
    "an encoder-decoder": (
        lambda f: edit(f / "config.json", model_type="t5", is_encoder_decoder=True),
        "is a 't5' (an encoder-decoder); supported LLMs: llama",
    ),
    "a vision-language model": (
        lambda f: edit(f / "config.json", model_type="gemma3", vision_config={}),
        "is a 'gemma3' (a vision-language model: give a text-only one); supported LLMs",
    ),
    "a reward model": (
        lambda f: edit(f / "config.json", architectures=["LlamaForSequenceClassification"]),
        "is a LlamaForSequenceClassification, a classifier or reward model that writes no text",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), KINDS.values(), ids=KINDS)
def test_folder_that_is_no_whole_model_is_described(folder, change, sentence):
    change(folder)
    with pytest.raises(TinyAlignError) as refusal:
        check(folder)
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_file_in_place_of_a_folder_is_described(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(TinyAlignError, match=r"is a file \(ONNX graphs\): give the folder of a"):
        check(tmp_path / "model.onnx")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        TinyAlignError, match=r"is a file \(GGUF, llama\.cpp's format\): give the folder of a"
    ):
        model_folder(str(tmp_path / "model.gguf"), "encoder", FAMILIES)
    assert check(tmp_path / "model.gguf") == tmp_path / "model.gguf"  # an LLM may be one


def test_quantised_encoder_is_refused(tmp_path):
    from tests.support.tiny_encoders import make_encoder

    make_encoder("whisper", tmp_path / "encoder")
    edit(tmp_path / "encoder/config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(TinyAlignError, match="quantised by bitsandbytes"):
        model_folder(str(tmp_path / "encoder"), "encoder", FAMILIES)


# --- values of weights ---


def with_value(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[name].view(-1)[5] = value
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_with_nan_or_infinity_is_named(folder, value):
    with_value(folder, "model.layers.1.mlp.up_proj.weight", value)
    name = r"model\.layers\.1\.mlp\.up_proj\.weight"
    sentence = rf"{name} holds NaN or infinity \(1 of 8,192 values\)\. Such a model"
    with pytest.raises(TinyAlignError, match=sentence):
        load_llm(str(folder))


def test_only_weights_that_are_used_are_checked(tmp_path):
    from tests.support.tiny_encoders import make_encoder

    folder = make_encoder("whisper", tmp_path / "encoder")
    with_value(folder, "model.decoder.layers.0.fc1.weight", float("nan"))
    load_encoder(str(folder))
    with_value(folder, "model.encoder.layers.0.fc1.weight", float("nan"))
    with pytest.raises(TinyAlignError, match=r"its encoder\.layers\.0\.fc1\.weight holds NaN"):
        load_encoder(str(folder))


def test_tensor_without_a_place_in_the_model_is_named(folder):
    weights = load_file(folder / WEIGHTS)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    head = {"v_head.weight": torch.ones(1, 64)}
    save_file({**weights, **frequencies, **head}, folder / WEIGHTS, {"format": "pt"})
    load_llm(
        str(folder)
    )  # older checkpoints have the frequencies; a head beside the model is ignored
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file({**weights, **bias}, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(
        TinyAlignError, match=r"its model\.layers\.0\.self_attn\.q_proj\.bias has no place in the"
    ):
        load_llm(str(folder))
