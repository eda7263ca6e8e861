"""What fewer bits save: seconds, bits and speed on a sixteenth of Llama-3.2-1B, random weights."""

import itertools
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks.studies.quantisation_ways import WAYS, graph_bytes, load_library
from tiny_align.export.quantise import output_layer
from tiny_align.runtime.backends.base import Runner
from tiny_align.runtime.backends.registry import load_runner
from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec

LAYER = {  # weight -> its sizes in Llama-3.2-1B; the output layer's a sixteenth
    "query": (2048, 2048),
    "key": (2048, 512),
    "value": (2048, 512),
    "output": (2048, 2048),
    "gate": (2048, 8192),
    "up": (2048, 8192),
    "down": (8192, 2048),
    "logits": (2048, 128_256 // 16),
}


def cost(seconds: float, folder: Path) -> list[dict[str, float]]:
    """Every way's seconds, bits and time per token on a sixteenth of Llama-3.2-1B."""
    load_library()  # its import is no part of the seconds
    n_weights = sum(rows * columns for rows, columns in LAYER.values())
    spec = write_layer(folder / "layer.onnx")
    rows = []
    runners = []
    for i, way in enumerate(tqdm(WAYS, desc="weights", unit="form")):
        path = folder / f"{i}.onnx"
        began = time.perf_counter()
        way.write(folder / "layer.onnx", path)
        quantise_s = time.perf_counter() - began
        rows.append({"quantise_s": quantise_s, "bits": 8 * graph_bytes(path) / n_weights})
        runners.append(load_runner(path, spec, "onnxruntime", 1))
    for row, call_s in zip(rows, alternate_calls(runners, spec, seconds)):
        row["ms"] = 1e3 * float(np.median(call_s))
    exact_ms = rows[0]["ms"]
    for row in rows:
        row["speed"] = exact_ms / row["ms"]
        row["gb_s"] = row["bits"] * n_weights / 8e6 / row["ms"]
    return rows


def write_layer(path: Path) -> GraphSpec:
    """An FP32 graph of the weights in LAYER, each with an input of its own size."""
    import onnx

    rng = np.random.default_rng(0)
    weights = []
    nodes = []
    outputs = []
    for name, shape in LAYER.items():
        values = rng.standard_normal(shape, np.float32)
        names = [f"x{shape[0]}", f"{name}.weight"]
        weights.append(onnx.numpy_helper.from_array(values, names[1]))
        nodes.append(onnx.helper.make_node("MatMul", names, [name], name=name))
        outputs.append(TensorSpec(name, "float32", (1, 1, shape[1])))
    inputs = []
    for size in sorted({rows for rows, _ in LAYER.values()}):
        inputs.append(TensorSpec(f"x{size}", "float32", (1, 1, size)))
    spec = GraphSpec(path.name, "fp32", tuple(inputs), tuple(outputs))

    graph = onnx.helper.make_graph(
        nodes, "layer", _value_infos(inputs), _value_infos(outputs), weights
    )
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    assert output_layer(model).name == "logits"
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    return spec


def _value_infos(tensors: list[TensorSpec]) -> list:
    import onnx

    kind = onnx.TensorProto.FLOAT
    return [onnx.helper.make_tensor_value_info(t.name, kind, t.shape) for t in tensors]


def alternate_calls(runners: list[Runner], spec: GraphSpec, seconds: float) -> list[list[float]]:
    """Seconds of every call; the runners take turns, and together are larger than any cache."""
    rng = np.random.default_rng(0)
    feed = {}
    for tensor in spec.inputs:
        feed[tensor.name] = rng.standard_normal(tensor.shape, np.float32)
    call_s: list[list[float]] = [[] for _ in runners]
    started = time.perf_counter()
    for n_rounds in itertools.count():
        if n_rounds >= 5 and time.perf_counter() - started >= seconds:
            break
        for runner, seconds_of_runner in zip(runners, call_s):
            began = time.perf_counter()
            runner(feed)
            seconds_of_runner.append(time.perf_counter() - began)
    return [seconds_of_runner[1:] for seconds_of_runner in call_s]  # the first call warms up
