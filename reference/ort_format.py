"""The weights in an .ort file, ONNX Runtime's own format, under the names of PyTorch's modules.

Covers what PyTorch exports and ONNX Runtime quantises dynamically: a matrix is codes, a scale and a
zero point, and the node that uses it keeps its module's name. ONNX Runtime's own classes read the
file.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.Graph import Graph
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.Node import Node

DTYPES = {1: np.float32, 2: np.uint8}  # TensorDataType in the format's schema: FLOAT, UINT8
APPENDED = re.compile(r"_add_tensor$|_merged_\d+$")  # to a name, by the tools that made the file
CODES = "_quantized"
SCALE = "_scale"
ZERO_POINT = "_zero_point"
AFFINE = {"Mul": "weight", "Add": "bias"}  # the last two nodes of a group norm


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The weights of an .ort file: PyTorch's name of a parameter -> float32 array."""
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs.InferenceSession import (
        InferenceSession,
    )

    session = InferenceSession.GetRootAs(path.read_bytes(), 0)
    graphs = list(_with_branches(session.Model().Graph()))
    constants = {}
    for graph in graphs:
        constants.update(_constants(graph))
    weights = {}
    for name, array in constants.items():
        parameter = APPENDED.sub("", name)
        if parameter.endswith((".weight", ".bias")):
            weights[parameter] = array
    for graph in graphs:
        for i in range(graph.NodesLength()):
            weights.update(_weights_of_node(graph.Nodes(i), constants))
    return weights


def _with_branches(graph: "Graph") -> Iterator["Graph"]:
    """A graph, and those of its conditions: with and without a KV cache."""
    yield graph
    for i in range(graph.NodesLength()):
        node = graph.Nodes(i)
        for j in range(node.AttributesLength()):
            branch = node.Attributes(j).G()
            if branch is not None:
                yield from _with_branches(branch)


def _constants(graph: "Graph") -> dict[str, np.ndarray]:
    """The float32 and uint8 constants of a graph by name."""
    constants = {}
    for i in range(graph.InitializersLength()):
        tensor = graph.Initializers(i)
        dtype = DTYPES.get(tensor.DataType())
        if dtype is not None:
            shape = [tensor.Dims(axis) for axis in range(tensor.DimsLength())]
            data = tensor.RawDataAsNumpy().copy()
            constants[tensor.Name().decode()] = data.view(dtype).reshape(shape)
    return constants


def _weights_of_node(node: "Node", constants: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights whose constants bear no module's name: quantised matrices, and group norms."""
    *modules, operator = node.Name().decode().strip("/").split("/")
    module = ".".join(modules)
    weights = {}
    for j in range(node.InputsLength()):
        name = node.Inputs(j).decode()
        if name not in constants:
            continue
        if name.endswith(CODES):
            stem = name.removesuffix(CODES)
            codes = constants[name].astype(np.float32)
            zero_point = constants[stem + ZERO_POINT].astype(np.float32)
            matrix = (codes - zero_point) * constants[stem + SCALE]
            is_product = operator.startswith("MatMul")  # (in, out); an embedding is not turned
            weights[f"{module}.weight"] = matrix.T if is_product else matrix
        elif module.endswith("groupnorm") and operator in AFFINE:
            weights[f"{module}.{AFFINE[operator]}"] = constants[name].reshape(-1)
    return weights
