"""The LLM's graph for ONNX Runtime, products packed into one, and equal weights stored once."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from tiny_align.export.llm_ort import llm_ort_graph
from tiny_align.export.llms import load_llm
from tiny_align.export.packing import pack_products, share_weights
from tiny_align.runtime.backends.registry import load_decoder
from tiny_align.runtime.bundle.embeddings import load_table
from tiny_align.runtime.bundle.onnx_weights import data_files, load_graph
from tiny_align.runtime.errors import TinyAlignError


def make_graph(weights: dict[str, np.ndarray], shared_input: bool = True) -> onnx.ModelProto:
    """x (n, 8) times every weight, the products beside each other."""
    inputs = ["x"] if shared_input else ["x", "other"]
    nodes = []
    for i, name in enumerate(weights):
        factor = inputs[min(i, len(inputs) - 1)]
        nodes.append(helper.make_node("MatMul", [factor, name], [f"{name}_out"]))
    nodes.append(helper.make_node("Concat", [f"{name}_out" for name in weights], ["y"], axis=-1))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in inputs]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "products", values, [out], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def save(model: onnx.ModelProto, path) -> None:
    onnx.save(
        model,
        str(path),
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=16,
    )


def run(path, **feed) -> np.ndarray:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0]


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        f"w{i}": rng.standard_normal((8, width)).astype(np.float32)
        for i, width in enumerate((3, 5, 1))
    }


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)


def test_products_of_one_value_are_packed_into_one(weights, x, tmp_path):
    program = ir.serde.deserialize_model(make_graph(weights))
    pack_products(program)
    assert sorted(node.op_type for node in program.graph) == ["Concat", "MatMul", "Split"]
    ir.save(program, str(tmp_path / "packed.onnx"))
    expected = np.concatenate([x @ weight for weight in weights.values()], axis=1)
    np.testing.assert_allclose(run(tmp_path / "packed.onnx", x=x), expected, rtol=1e-6)


def test_products_of_different_values_are_not_packed(weights):
    program = ir.serde.deserialize_model(
        make_graph(dict(list(weights.items())[:2]), shared_input=False)
    )
    pack_products(program)
    assert [node.op_type for node in program.graph] == ["MatMul", "MatMul", "Concat"]


def test_equal_weights_are_stored_once(weights, x, tmp_path):
    keeper = tmp_path / "keeper.onnx"
    other = tmp_path / "other.onnx"
    save(make_graph(weights), keeper)
    save(make_graph({"a": weights["w1"], "b": weights["w0"] + 1}), other)
    before = run(other, x=x)
    share_weights(keeper, other)
    np.testing.assert_array_equal(run(other, x=x), before)
    assert (tmp_path / "other.onnx.data").stat().st_size == weights["w0"].nbytes
    files = ["keeper.onnx", "keeper.onnx.data", "other.onnx", "other.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


def test_graph_without_weights_of_its_own_has_no_data_file(weights, x, tmp_path):
    keeper = tmp_path / "keeper.onnx"
    other = tmp_path / "other.onnx"
    save(make_graph(weights), keeper)
    save(make_graph({"a": weights["w2"]}), other)
    share_weights(keeper, other)
    assert not (tmp_path / "other.onnx.data").exists()
    np.testing.assert_allclose(run(other, x=x), x @ weights["w2"], rtol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_weights_of_both_llm_graphs_are_stored_once(tiny_llm, tmp_path, precision):
    """But for the output layer in INT8, which is two INT4 weights for TensorRT."""
    from tiny_align.export.llm_files import LlmSource, write_llm
    from tiny_align.export.options import ExportOptions

    llm, _ = load_llm(str(tiny_llm))
    options = ExportOptions(encoder="", llm=str(tiny_llm), precision=precision, max_bits=0)
    spec = write_llm(tmp_path, LlmSource(llm, 64, [1, 2]), options)
    other = spec.on("onnxruntime")
    assert (spec.file, other.file, spec.on("tensorrt")) == ("llm.onnx", "llm.ort.onnx", spec)
    own = tmp_path / f"{other.file}.data"
    own_bytes = own.stat().st_size if own.exists() else 0
    head_bytes = 1.07 * llm.config.vocab_size * llm.config.hidden_size if precision == "int4" else 0
    assert own_bytes <= head_bytes + 0.01 * (tmp_path / "llm.onnx.data").stat().st_size
    kinds = [node.op_type for node in load_graph(tmp_path / other.file).graph.node]
    assert kinds.count("GroupQueryAttention") == llm.config.num_hidden_layers


def test_large_tied_table_is_int8_and_stored_once(tmp_path, monkeypatch):
    from tiny_align.export import llm_files
    from tiny_align.export.options import ExportOptions

    monkeypatch.setattr(llm_files, "LARGE_VOCABULARY", 10)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    exact = llm.get_input_embeddings().weight.detach().numpy().copy()
    options = ExportOptions(encoder="", llm="", precision="int8")
    spec = llm_files.write_llm(tmp_path, llm_files.LlmSource(llm, 64, [1, 2]), options)
    table = load_table(tmp_path)
    assert len(table) == len(exact) and table.codes.dtype == np.uint8
    np.testing.assert_allclose(table.rows(), exact, atol=0.01 * np.abs(exact).max())
    np.testing.assert_array_equal(table.rows([3, 5]), table.rows()[[3, 5]])
    ort = load_graph(tmp_path / spec.on("onnxruntime").file)
    assert "token_embeddings.npy" in data_files(ort)
    assert ort.graph.node[-1].op_type == "MatMulNBits"
    assert "token_embeddings.npy" not in data_files(load_graph(tmp_path / spec.file))
    assert 0 < spec.parity["kl_to_pytorch"] < 0.01


@pytest.mark.parametrize("is_tied", [True, False])
def test_table_lies_row_by_row(is_tied, tmp_path):
    """Its bytes bind projectors; export maps the weights transposed."""
    from tiny_align.export.llm_files import LlmSource, write_llm
    from tiny_align.export.options import ExportOptions

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 90}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": is_tied}
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    exact = llm.get_input_embeddings().weight.detach().numpy().astype(np.float16)
    options = ExportOptions(encoder="", llm="", precision="fp32")
    write_llm(tmp_path, LlmSource(llm, 64, [1]), options)
    codes = load_table(tmp_path).codes
    assert codes.flags.c_contiguous
    np.testing.assert_array_equal(codes, exact)


def test_caches_are_independent(tiny_llm, tmp_path):
    llm, _ = load_llm(str(tiny_llm))
    spec = llm_ort_graph(llm).save(tmp_path / "llm.onnx")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 9, llm.config.hidden_size)).astype(np.float32)
    with load_decoder(tmp_path / "llm.onnx", spec, "onnxruntime", 1) as decoder, torch.no_grad():
        caches = [decoder.open_cache(16) for _ in rows]
        for position in range(9):
            read = [
                decoder.run(row[position : position + 1], c, position)
                for row, c in zip(rows, caches)
            ]
        got = [scores.logits for scores in read]
        expected = [
            llm(inputs_embeds=torch.from_numpy(row)[None]).logits[0, -1].numpy() for row in rows
        ]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_later_positions_of_a_cache_are_overwritten(tiny_llm, tmp_path):
    llm, _ = load_llm(str(tiny_llm))
    spec = llm_ort_graph(llm).save(tmp_path / "llm.onnx")
    rows = np.random.default_rng(0).standard_normal((12, llm.config.hidden_size)).astype(np.float32)
    with load_decoder(tmp_path / "llm.onnx", spec, "onnxruntime", 1) as decoder:
        cache, fresh = decoder.open_cache(16), decoder.open_cache(16)
        decoder.run(rows, cache, 0)
        got = decoder.run(rows[:2], cache, 5).logits
        decoder.run(rows[:5], fresh, 0)
        np.testing.assert_allclose(got, decoder.run(rows[:2], fresh, 5).logits, atol=1e-5)


def test_a_grown_cache_keeps_what_it_holds(tiny_llm, tmp_path):
    llm, _ = load_llm(str(tiny_llm))
    spec = llm_ort_graph(llm).save(tmp_path / "llm.onnx")
    rows = np.random.default_rng(0).standard_normal((12, llm.config.hidden_size)).astype(np.float32)
    with load_decoder(tmp_path / "llm.onnx", spec, "onnxruntime", 1) as decoder:
        cache = decoder.open_cache(4)
        decoder.run(rows[:4], cache, 0)
        for past, end in ((4, 6), (6, 12)):
            decoder.grow(cache, end)
            logits = decoder.run(rows[past:end], cache, past).logits
        whole = decoder.open_cache(12)
        np.testing.assert_allclose(logits, decoder.run(rows, whole, 0).logits, atol=1e-5)
        for name, array in whole.present(12).items():
            np.testing.assert_allclose(cache.present(12)[name], array, atol=1e-5)


def test_head_size_that_onnx_runtime_does_not_support_is_refused(tiny_llm):
    llm, _ = load_llm(str(tiny_llm))
    llm.config.head_dim = 12
    with pytest.raises(TinyAlignError, match=r"heads have the size 12: .* multiples of 8"):
        llm_ort_graph(llm)
