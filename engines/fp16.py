"""A graph in FP16 with FP32 islands, and its twin: the same graph in FP32, rounded wherever the first one is FP16.

Products are made in FP16. Norms, softmax, reductions and what else loses its way in FP16 stay FP32; so does all that
comes before the first product (a front end, positions) or between two islands (a norm's own arithmetic). Every other
operator takes the type of what it is given. Inputs and outputs of the graph keep theirs.

The twin is there to be measured without a GPU: ONNX Runtime's CPU has hardly a kernel for FP16, computes such a graph
in FP32 throughout and drops the casts between, so that a value beyond FP16's range comes out finite. The twin's sums
within a product are FP32, as a GPU's tensor cores can have them; what TensorRT's kernels do only the device can tell.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "QuantizeLinear", "DequantizeLinear"}
ISLANDS = {
    *(
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "BatchNormalization",
        "LpNormalization",
    ),
    *(
        "Softmax",
        "LogSoftmax",
        "Exp",
        "Log",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Div",
        "CumSum",
        "Sin",
        "Cos",
        "Range",
    ),
    *(
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL2",
        "ReduceMax",
        "ReduceMin",
        "ReduceLogSumExp",
    ),
    *("GlobalAveragePool", "AveragePool", "Resize", "TopK", "Cast"),
}


def half(model: onnx.ModelProto, values) -> onnx.ModelProto:
    """The graph in FP16 with FP32 islands.

    Args:
        model: the FP32 graph; its weights may lie in other files.
        values: a tensor of it -> its values, float32.
    """
    return _rewritten(model, _Halves(values))


def twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in FP32, every value rounded to FP16 that `half` has in FP16."""
    return _rewritten(model, _Rounded())


class _Halves:
    """FP16 is a type."""

    def __init__(self, values):
        self._values = values

    def constant(self, tensor, name: str):
        """The tensor in FP16 and the nodes that make it."""
        with np.errstate(over="ignore"):  # an infinity is found by measuring
            return numpy_helper.from_array(self._values(tensor).astype(np.float16), name), []

    def enter(self, value: str, name: str) -> list:
        return [helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT16)]

    def leave(self, value: str, name: str) -> list:
        return [helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT)]

    def made(self, node, output: int) -> list:
        return []


class _Rounded:
    """FP16 is a rounding. ONNX Runtime leaves these casts alone, because they lose precision."""

    def constant(self, tensor, name: str):
        return None, self.enter(tensor.name, name)

    def enter(self, value: str, name: str) -> list:
        return _Halves(None).enter(value, f"{name}.16") + _Halves(None).leave(f"{name}.16", name)

    def leave(self, value: str, name: str) -> list:
        return _copy(value, name)

    def made(self, node, output: int) -> list:
        """Rounds an output; not dequantised weights, which ONNX Runtime would no longer multiply by their codes."""
        if node.op_type == "DequantizeLinear":
            return []
        name = node.output[output]
        node.output[output] = f"{name}.exact"
        return self.enter(node.output[output], name)


def _rewritten(model: onnx.ModelProto, form) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _Rewriter(result.graph, _float_values(model), form).run()
    return result


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of the values of type FP32."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    types |= {t.name: t.data_type for t in graph.initializer}
    return {name for name, kind in types.items() if kind == TensorProto.FLOAT}


class _Rewriter:
    """One pass over the nodes, in their order."""

    def __init__(self, graph, floats: set[str], form):
        self._graph, self._floats, self._form = graph, floats, form
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._halves: set[str] = set()  # values that are made in FP16
        self._others: dict[str, str] = {}  # value -> its name in the other type
        self._nodes: list = []

    def run(self) -> None:
        nodes, inner = list(self._graph.node), self._hide_outputs()
        del self._graph.node[:], self._graph.value_info[:]
        for node in nodes:
            self._take(node)
        for name, value in inner.items():
            self._nodes.extend(
                self._form.leave(value, name) if value in self._halves else _copy(value, name)
            )
        self._graph.node.extend(self._nodes)
        drop_unused(self._graph)

    def _hide_outputs(self) -> dict[str, str]:
        """FP32 outputs of the graph -> the names that their values have inside it."""
        inner = {o.name: f"{o.name}.inner" for o in self._graph.output if o.name in self._floats}
        for node in self._graph.node:
            for names in (node.input, node.output):
                names[:] = [inner.get(name, name) for name in names]
        self._floats |= set(inner.values())
        return inner

    def _take(self, node) -> None:
        given_half = any(name in self._halves for name in node.input)
        in_half = node.op_type in PRODUCTS or (given_half and node.op_type not in ISLANDS)
        for index, name in enumerate(node.input):
            if name in self._floats and (name in self._halves) != in_half:
                node.input[index] = self._other(name)
        self._nodes.append(node)
        for index, name in enumerate(node.output):
            if in_half and name in self._floats:
                self._halves.add(name)
                self._nodes.extend(self._form.made(node, index))

    def _other(self, name: str) -> str:
        """The value in the other type than the one it is made in."""
        if name not in self._others:
            self._others[name] = other = f"{name}.{'full' if name in self._halves else 'half'}"
            self._nodes.extend(self._change(name, other))
        return self._others[name]

    def _change(self, name: str, other: str) -> list:
        if name in self._halves:
            return self._form.leave(name, other)
        if name not in self._constants:
            return self._form.enter(name, other)
        tensor, nodes = self._form.constant(self._constants[name], other)
        self._graph.initializer.extend([tensor] if tensor is not None else [])
        return nodes


def _copy(value: str, name: str) -> list:
    return [helper.make_node("Identity", [value], [name])]


def drop_unused(graph) -> None:
    """Leave out the initialisers that no node reads."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
