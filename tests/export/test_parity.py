"""Parity refuses a wrong graph, and takes a right one whatever the scale of its outputs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export runs in torch")

from tests.support.damaged_graphs import DAMAGES, damage  # noqa: E402 - needs the packages above
from tests.support.tiny_llms import make_model  # noqa: E402
from tiny_align.export import parity  # noqa: E402
from tiny_align.export.llm_ort import llm_ort_graph  # noqa: E402
from tiny_align.export.llms import llm_graph, load_llm  # noqa: E402
from tiny_align.export.parity import TOLERANCE, Differences  # noqa: E402
from tiny_align.runtime.backends.registry import load_decoder, load_runner  # noqa: E402
from tiny_align.runtime.errors import TinyAlignError  # noqa: E402

GRAPHS = {"llm.onnx": llm_graph, "llm.ort.onnx": llm_ort_graph}


def compare(path, spec, prompts) -> Differences:
    """As the export does: the standard graph as a function, ONNX Runtime's with its own cache."""
    if path.name.endswith("llm.ort.onnx"):
        with load_decoder(path, spec, "onnxruntime") as decoder:
            return parity.decoder_parity(decoder, prompts)
    with load_runner(path, spec, "onnxruntime") as runner:
        return parity.llm_parity(runner, prompts)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A tiny LLM with gains, and what PyTorch computes."""
    folder = tmp_path_factory.mktemp("llm")
    make_model("llama", folder)
    model, _ = load_llm(str(folder))
    lengths = parity.llm_lengths(model.config, model.config.max_position_embeddings)
    return model, parity.llm_prompts(model, lengths=lengths)


@pytest.fixture(scope="module", params=GRAPHS)
def graph(request, llm, tmp_path_factory):
    """Its graph, standard or ONNX Runtime's: path and specification."""
    path = tmp_path_factory.mktemp("graph") / request.param
    return path, GRAPHS[request.param](llm[0]).save(path)


def test_a_right_graph_is_far_below_the_tolerance(graph, llm):
    differences = compare(*graph, llm[1])
    parity.check("llm", differences)
    assert max(differences.relative.values()) < TOLERANCE / 10
    assert differences.relative.keys() == differences.absolute.keys() == differences.outputs.keys()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_graph_is_refused(graph, llm, name):
    path, spec = graph
    differences = compare(damage(path, name), spec, llm[1])
    with pytest.raises(TinyAlignError, match=r"differs from PyTorch by .* standard deviations of"):
        parity.check("llm", differences)
    assert max(differences.relative.values()) > 10 * TOLERANCE


def test_a_difference_is_relative_to_the_spread_of_its_output():
    logits = np.linspace(-50, 50, 100, dtype=np.float32)
    differences = Differences()
    differences.add("1+0", {"logits": logits + 0.002}, {"logits": logits})
    parity.check("llm", differences)
    assert differences.absolute["1+0"] == pytest.approx(0.002, rel=1e-2)
    values = logits / 1e4
    differences.add(
        "1+1", {"logits": logits, "values": values + 1e-5}, {"logits": logits, "values": values}
    )
    assert differences.outputs["1+1"] == "values"
    with pytest.raises(TinyAlignError, match=r"deviations of values at length 1\+1"):
        parity.check("llm", differences)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_refused(wrong):
    right = np.ones((1, 4), np.float32)
    differences = Differences()
    differences.add("1", {"x": right, "y": right * wrong}, {"x": right, "y": right})
    differences.add("2", {"x": right, "y": right}, {"x": right, "y": right})
    with pytest.raises(TinyAlignError, match="the exported llm differs from PyTorch"):
        parity.check("llm", differences)


def test_outputs_without_any_spread_must_be_equal():
    zeros = np.zeros((1, 4), np.float32)
    differences = Differences()
    differences.add("1", {"x": zeros}, {"x": zeros})
    parity.check("projector", differences)
    differences.add("2", {"x": zeros + 1e-9}, {"x": zeros})
    with pytest.raises(TinyAlignError, match="the exported projector differs"):
        parity.check("projector", differences)


def test_the_manifest_states_differences_and_bound():
    differences = Differences()
    array = np.array([[-1.0, 1.0]], np.float32)
    differences.add("3", {"x": array}, {"x": array})
    assert differences.figures() == {
        "max_abs_diff_to_pytorch": {"3": 0.0},
        "max_diff_over_std": {"3": 0.0},
        "max_diff_over_std_allowed": TOLERANCE,
    }
