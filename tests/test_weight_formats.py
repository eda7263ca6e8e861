"""Checkpoints from other formats: tiny models written in each of them come back as they were."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="checkpoints are written with torch")
transformers = pytest.importorskip("transformers", reason="checkpoints are transformers'")

from tiny_align.export import vocabularies  # noqa: E402
from tiny_align.export.pretrained import load_pretrained, load_whole  # noqa: E402
from tiny_align.reference import gguf_format, moonshine  # noqa: E402
from tiny_align.reference.checkpoints import write_model  # noqa: E402
from tiny_align.reference.ctranslate2_format import read_variables  # noqa: E402
from tiny_align.reference.ort_format import read_weights  # noqa: E402
from tiny_align.reference.whisper import write_whisper  # noqa: E402
from tiny_align.runtime.errors import TinyAlignError  # noqa: E402


def assert_same_weights(folder: Path, model) -> None:
    loaded = load_whole(type(model), folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float()), name


def randomise(model):
    """Make every weight differ from every other, norms too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# --- checkpoints ---


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return randomise(transformers.LlamaForCausalLM(config))


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in model.named_parameters()}


def test_a_checkpoint_is_the_model_it_was_written_from(tmp_path):
    model = tiny_llama()
    write_model(tmp_path, type(model), model.config, weights_of(model))
    assert_same_weights(tmp_path, model)


@pytest.mark.parametrize("fault", ["absent", "unknown", "another shape"])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, fault):
    model = tiny_llama()
    weights = weights_of(model)
    norm = weights.pop("model.norm.weight")
    if fault == "unknown":
        weights |= {"model.norm.weight": norm, "model.norm.bias": norm}
    elif fault == "another shape":
        weights["model.norm.weight"] = norm[:-1]
    with pytest.raises(TinyAlignError, match=r"model\.norm\.(weight|bias) in the source"):
        write_model(tmp_path, type(model), model.config, weights)


def test_a_full_disk_is_an_error_of_the_system(tmp_path, full_disk):
    model = tiny_llama()
    with full_disk(3000), pytest.raises(OSError):
        write_model(tmp_path, type(model), model.config, weights_of(model))


# --- GGUF ---


def test_a_gguf_file_becomes_the_checkpoint_it_was_made_of(tmp_path):
    pytest.importorskip("gguf", reason="GGUF files are read and written with gguf")
    from tests.support.tiny_ggufs import source
    from tests.support.tiny_llms import make_model

    make_model("smollm2", tmp_path / "llm")
    gguf_format.write_llm(
        source(tmp_path / "llm", "llama", "gpt-2").write(tmp_path / "llm.gguf"),
        tmp_path / "checkpoint",
    )
    kind = transformers.LlamaForCausalLM
    assert_same_weights(tmp_path / "checkpoint", load_whole(kind, tmp_path / "llm"))
    expected = load_pretrained(transformers.AutoTokenizer, tmp_path / "llm")
    tokenizer = load_pretrained(transformers.AutoTokenizer, tmp_path / "checkpoint")
    text = "two three 12<|im_end|>"
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.eos_token == expected.eos_token
    assert tokenizer.chat_template == expected.chat_template


# --- .ort ---


def write_ort(path: Path, codes: np.ndarray) -> None:
    """A product by a quantised matrix within a condition, a bias, a group norm, an embedding."""
    onnx = pytest.importorskip("onnx", reason="the graph is made with onnx")
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, value) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value), name)

    quantised = ["m_quantized", "m_scale", "m_zero_point"]
    product = helper.make_node(
        "DynamicQuantizeMatMul",
        ["normed", *quantised, "layers.0.fc.bias_merged_0"],
        ["product"],
        name="/layers.0/fc/MatMul_quant",
        domain="com.microsoft",
    )
    other = helper.make_node("MatMul", ["normed", "other"], ["product2"], name="/other/MatMul")
    output = helper.make_tensor_value_info("product", TensorProto.FLOAT, [None, 3])
    output2 = helper.make_tensor_value_info("product2", TensorProto.FLOAT, [None, 3])
    nodes = [
        helper.make_node("Gather", ["e_quantized", "ids"], ["rows"], name="/embed_tokens/Gather"),
        helper.make_node(
            "DequantizeLinear", ["rows", "e_scale", "e_zero_point"], ["x"], name="/embed_tokens/Q"
        ),
        helper.make_node("Mul", ["x", "onnx::Mul_7"], ["scaled"], name="/groupnorm/Mul"),
        helper.make_node("Add", ["scaled", "onnx::Add_8"], ["normed"], name="/groupnorm/Add"),
        helper.make_node(
            "If",
            ["condition"],
            ["y"],
            then_branch=helper.make_graph([product], "then", [], [output]),
            else_branch=helper.make_graph([other], "else", [], [output2]),
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, [None]),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [
            constant("m_quantized", codes),
            constant("m_scale", np.float32(0.5)),
            constant("m_zero_point", np.uint8(7)),
            constant("e_quantized", codes),
            constant("e_scale", np.float32(0.25)),
            constant("e_zero_point", np.uint8(9)),
            constant("layers.0.fc.bias_merged_0", np.float32([1, 2, 3])),
            constant("other", np.ones((3, 3), np.float32)),
            constant("onnx::Mul_7", np.float32([[4, 5, 6]])),
            constant("onnx::Add_8", np.float32([[7, 8, 9]])),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def test_weights_of_an_ort_file_have_their_modules_names(tmp_path):
    codes = np.arange(9, dtype=np.uint8).reshape(3, 3)
    write_ort(tmp_path / "model.ort", codes)
    weights = read_weights(tmp_path / "model.ort")
    expected = {
        "layers.0.fc.weight": (codes.astype(np.float32) - 7).T * 0.5,
        "layers.0.fc.bias": [1, 2, 3],
        "embed_tokens.weight": (codes.astype(np.float32) - 9) * 0.25,
        "groupnorm.weight": [4, 5, 6],
        "groupnorm.bias": [7, 8, 9],
    }
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        assert weights[name].dtype == np.float32
        np.testing.assert_array_equal(weights[name], np.asarray(array, np.float32), err_msg=name)


# --- Moonshine's vocabulary ---


def test_a_vocabulary_is_read_and_its_tokenizer_writes_what_it_reads(tmp_path):
    pieces = [b"<unk>", b"<s>", b"</s>"] + [bytes([i]) for i in range(256)]
    pieces += [text.encode() for text in ("▁a", "bc", "▁abc", "▁", "a", "b", "c", "<<ST_0>>")]
    path = tmp_path / "tokenizer.bin"
    path.write_bytes(b"".join(bytes([len(piece)]) + piece for piece in pieces))
    tokens = moonshine.read_vocabulary(path)
    assert tokens[:5] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"] and tokens[258] == "<0xFF>"
    tokenizer = vocabularies.sentencepiece_tokenizer(
        tokens, [], unknown="<unk>", begin="<s>", space_before=True
    )
    assert tokenizer.encode("abc ü").tokens == ["<s>", "▁abc", "▁", "<0xC3>", "<0xBC>"]
    assert tokenizer.decode(tokenizer.encode("abc a ü").ids[1:]) == "abc a ü"


# --- CTranslate2 ---


def write_variables(path: Path, variables: dict[str, np.ndarray]) -> None:
    codes = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        data += text(name) + struct.pack("<B", array.ndim)
        data += struct.pack(f"<{array.ndim}I", *array.shape)
        data += struct.pack("<BI", codes[str(array.dtype)], array.nbytes) + array.tobytes()
    data += struct.pack("<I", 1) + text("decoder/projection/weight") + text("an alias")
    path.write_bytes(data)


def test_variables_of_a_model_bin_come_back(tmp_path):
    variables = {
        "a/b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "c": np.float32([1.5]),
        "n": np.array(8, np.int16),
    }
    write_variables(tmp_path / "model.bin", variables)
    got = read_variables(tmp_path / "model.bin")
    assert got.keys() == variables.keys()
    for name, array in variables.items():
        assert got[name].dtype == array.dtype and np.array_equal(got[name], array)
        assert got[name].shape == array.shape


def test_a_model_bin_of_another_version_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 9))
    with pytest.raises(TinyAlignError, match="version 9: expected CTranslate2's 6"):
        read_variables(tmp_path / "model.bin")


def as_ctranslate2(model) -> dict[str, np.ndarray]:
    """A Whisper's weights under CTranslate2's names, its products joined as there."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    variables = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}
    variables["decoder/num_heads"] = np.array(1, np.int16)
    variables["decoder/alignment_layer"] = np.array(-1, np.int16)

    def put(target: str, *modules: str) -> None:
        weights = [state[f"{module}.weight"] for module in modules]
        zeros = np.zeros(len(weights[0]), np.float16)
        biases = [state.get(f"{module}.bias", zeros) for module in modules]
        kinds = ("gamma", "beta") if "norm" in target else ("weight", "bias")
        variables[f"{target}/{kinds[0]}"] = np.concatenate(weights)
        variables[f"{target}/{kinds[1]}"] = np.concatenate(biases)

    for half in ("encoder", "decoder"):
        positions = state[f"model.{half}.embed_positions.weight"]
        variables[f"{half}/position_encodings/encodings"] = positions
        put(f"{half}/layer_norm", f"model.{half}.layer_norm")
        for number in range(2):
            layer = f"model.{half}.layers.{number}"
            target = f"{half}/layer_{number}"
            own = [f"{layer}.self_attn.{name}_proj" for name in ("q", "k", "v")]
            put(f"{target}/self_attention/linear_0", *own)
            put(f"{target}/self_attention/linear_1", f"{layer}.self_attn.out_proj")
            put(f"{target}/self_attention/layer_norm", f"{layer}.self_attn_layer_norm")
            put(f"{target}/ffn/linear_0", f"{layer}.fc1")
            put(f"{target}/ffn/linear_1", f"{layer}.fc2")
            put(f"{target}/ffn/layer_norm", f"{layer}.final_layer_norm")
            if half == "decoder":
                cross = f"{layer}.encoder_attn"
                put(f"{target}/attention/linear_0", f"{cross}.q_proj")
                put(f"{target}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                put(f"{target}/attention/linear_2", f"{cross}.out_proj")
                put(f"{target}/attention/layer_norm", f"{cross}_layer_norm")
    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    return variables


def test_a_whisper_in_ctranslate2_is_the_model_it_was(tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=12,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=20,
        max_target_positions=10,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = randomise(transformers.WhisperForConditionalGeneration(config)).half()
    write_variables(tmp_path / "model.bin", as_ctranslate2(model))
    settings = {"lang_ids": [2], "alignment_heads": [[0, 0]], "suppress_ids": [5]}
    settings["suppress_ids_begin"] = [6]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    special = ("endoftext", "startoftranscript", "en", "transcribe", "translate")
    special += ("notimestamps", "startofprev")
    added = [{"content": f"<|{name}|>", "id": i} for i, name in enumerate(special)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_whisper(
        tmp_path / "model.bin", tmp_path / "settings.json", tmp_path / "tokenizer.json", folder
    )
    assert_same_weights(folder, model)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["lang_to_id"] == {"<|en|>": 2} and generation["max_length"] == 10
    assert json.loads((folder / "preprocessor_config.json").read_text())["feature_size"] == 80
