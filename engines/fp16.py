"""A graph in FP16 with FP32 islands, and its twin: the same arithmetic in FP32, for ONNX Runtime.

Products are computed in FP16. Norms, softmax, reductions and other operators that lose their
precision in FP16 stay in FP32 (the islands). So does everything before the first product (a
front end, positions) and everything between two islands (the arithmetic inside a norm). Every
other operator takes the type of its inputs. Inputs and outputs of the graph keep their types.

The twin measures the error without a GPU. ONNX Runtime's CPU has hardly any FP16 kernels: it
computes such a graph in FP32 throughout and drops the casts in between, so that a value
beyond FP16's range comes out finite. The twin therefore rounds every value to FP16 that the
graph has in FP16. Sums within a product are FP32, as a GPU's tensor cores can compute them;
only the device can tell what TensorRT's kernels do.
"""

from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tiny_align.runtime.bundle.onnx_weights import ReadWeight, copy_model, drop_unused_weights

PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "QuantizeLinear", "DequantizeLinear"}
# fmt: off
ISLANDS = {
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization",
    "LpNormalization", "Softmax", "LogSoftmax",
    "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Div", "CumSum", "Sin", "Cos", "Range",
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceMax", "ReduceMin",
    "ReduceLogSumExp", "GlobalAveragePool", "AveragePool", "Resize", "TopK", "Cast",
}
# fmt: on


def to_fp16(model: onnx.ModelProto, read_weight: ReadWeight) -> onnx.ModelProto:
    """The graph in FP16 with FP32 islands.

    Args:
        model: the FP32 graph; its weights may be in other files.
        read_weight: gives the values of one of its tensors, float32.
    """
    return _rewrite(model, _Fp16(read_weight))


def twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in FP32; every value that `to_fp16` has in FP16 is rounded to FP16."""
    return _rewrite(model, _RoundedFp32())


class _Arithmetic(Protocol):
    """How a rewritten graph represents FP16."""

    def constant(
        self, tensor: onnx.TensorProto, name: str
    ) -> tuple[onnx.TensorProto | None, list[onnx.NodeProto]]:
        """A weight in FP16 as a new tensor, or None and the nodes that compute it."""

    def to_fp16(self, value: str, name: str) -> list[onnx.NodeProto]:
        """Nodes from the FP32 `value` to its FP16 form, `name`."""

    def to_fp32(self, value: str, name: str) -> list[onnx.NodeProto]:
        """Nodes from the FP16 `value` to its FP32 form, `name`."""

    def round_output(self, node: onnx.NodeProto, index: int) -> list[onnx.NodeProto]:
        """Nodes that round an output of a node that computes in FP16."""


class _Fp16:
    """FP16 is a type."""

    def __init__(self, read_weight: ReadWeight):
        self._read_weight = read_weight

    def constant(
        self, tensor: onnx.TensorProto, name: str
    ) -> tuple[onnx.TensorProto, list[onnx.NodeProto]]:
        with np.errstate(over="ignore"):  # measuring the rung finds an infinity
            values = self._read_weight(tensor).astype(np.float16)
        return numpy_helper.from_array(values, name), []

    def to_fp16(self, value: str, name: str) -> list[onnx.NodeProto]:
        return [helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT16)]

    def to_fp32(self, value: str, name: str) -> list[onnx.NodeProto]:
        return [helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT)]

    def round_output(self, node: onnx.NodeProto, index: int) -> list[onnx.NodeProto]:
        return []


class _RoundedFp32:
    """FP16 is a rounding. ONNX Runtime does not remove these casts, because they lose precision."""

    def constant(self, tensor: onnx.TensorProto, name: str) -> tuple[None, list[onnx.NodeProto]]:
        return None, self.to_fp16(tensor.name, name)

    def to_fp16(self, value: str, name: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Cast", [value], [f"{name}.16"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", [f"{name}.16"], [name], to=TensorProto.FLOAT),
        ]

    def to_fp32(self, value: str, name: str) -> list[onnx.NodeProto]:
        return [_identity(value, name)]

    def round_output(self, node: onnx.NodeProto, index: int) -> list[onnx.NodeProto]:
        """Not for dequantised weights: ONNX Runtime would no longer multiply by their codes."""
        if node.op_type == "DequantizeLinear":
            return []
        name = node.output[index]
        node.output[index] = f"{name}.exact"
        return self.to_fp16(node.output[index], name)


def _rewrite(model: onnx.ModelProto, arithmetic: _Arithmetic) -> onnx.ModelProto:
    result = copy_model(model)
    _Rewriter(result.graph, _fp32_values(model), arithmetic).run()
    return result


def _fp32_values(model: onnx.ModelProto) -> set[str]:
    """Names of the values of type FP32."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    names = set()
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            names.add(value.name)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            names.add(tensor.name)
    return names


class _Rewriter:
    """One pass over the nodes of a graph, in their order."""

    def __init__(self, graph: onnx.GraphProto, fp32_values: set[str], arithmetic: _Arithmetic):
        self._graph = graph
        self._fp32_values = fp32_values
        self._arithmetic = arithmetic
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._in_fp16: set[str] = set()  # values that are computed in FP16
        self._converted: dict[str, str] = {}  # value -> its name in the other type
        self._nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        nodes = list(self._graph.node)
        inner_names = self._rename_outputs()
        del self._graph.node[:]
        del self._graph.value_info[:]
        for node in nodes:
            self._add(node)
        for name, inner in inner_names.items():
            if inner in self._in_fp16:
                self._nodes.extend(self._arithmetic.to_fp32(inner, name))
            else:
                self._nodes.append(_identity(inner, name))
        self._graph.node.extend(self._nodes)
        drop_unused_weights(self._graph)

    def _rename_outputs(self) -> dict[str, str]:
        """Give the FP32 outputs of the graph other names inside it: output -> that name."""
        inner_names = {}
        for output in self._graph.output:
            if output.name in self._fp32_values:
                inner_names[output.name] = f"{output.name}.inner"
        for node in self._graph.node:
            for names in (node.input, node.output):
                names[:] = [inner_names.get(name, name) for name in names]
        self._fp32_values.update(inner_names.values())
        return inner_names

    def _add(self, node: onnx.NodeProto) -> None:
        """Add a node in FP16 or FP32, after nodes that convert its inputs where needed."""
        has_fp16_input = any(name in self._in_fp16 for name in node.input)
        in_fp16 = node.op_type in PRODUCTS or (has_fp16_input and node.op_type not in ISLANDS)
        for index, name in enumerate(node.input):
            if name in self._fp32_values and (name in self._in_fp16) != in_fp16:
                node.input[index] = self._convert(name)
        self._nodes.append(node)
        if not in_fp16:
            return
        for index, name in enumerate(node.output):
            if name in self._fp32_values:
                self._in_fp16.add(name)
                self._nodes.extend(self._arithmetic.round_output(node, index))

    def _convert(self, name: str) -> str:
        """The name of a value in the other type than the one it is computed in."""
        if name in self._converted:
            return self._converted[name]
        if name in self._in_fp16:
            converted = f"{name}.full"
            nodes = self._arithmetic.to_fp32(name, converted)
        elif name in self._constants:
            converted = f"{name}.half"
            tensor, nodes = self._arithmetic.constant(self._constants[name], converted)
            if tensor is not None:
                self._graph.initializer.append(tensor)
        else:
            converted = f"{name}.half"
            nodes = self._arithmetic.to_fp16(name, converted)
        self._nodes.extend(nodes)
        self._converted[name] = converted
        return converted


def _identity(value: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [value], [name])
