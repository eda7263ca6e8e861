"""What TensorRT refuses of QuantizeLinear and DequantizeLinear: rules of tensorrt_rules.py.

Each function tells what was expected of a node and what was found, None if the rule is kept. Its
docstring begins with the source, as tensorrt_rules.py names them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiny_align.runtime.bundle.tensorrt_graph import (
    Mismatch,
    RuleGraph,
    Shape,
    node_attribute,
    node_input,
)

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class _Quantisation:
    """A QuantizeLinear or DequantizeLinear: what is quantised, and how many scales there are."""

    granularity: str  # one scale per "tensor", "channel" or "block"
    data: str
    codes: str
    shape: Shape  # of both
    scales: Shape
    axis: int
    block: int  # 0: the attribute is not there

    @property
    def size(self) -> int | str | None:
        """The data's size along the axis; None if there is no such axis."""
        return self.shape[self.axis] if 0 <= self.axis < len(self.shape) else None


def _quantisation(
    node: "onnx.NodeProto", graph: RuleGraph, *granularities: str
) -> _Quantisation | None:
    """None if a shape is not known, or the granularity is another one."""
    data = node.input[0]
    codes = data if node.op_type == "DequantizeLinear" else node.output[0]
    shape = graph.shapes.get(data)
    scale = graph.constant(node.input[1])
    scales = graph.shapes.get(node.input[1]) if scale is None else tuple(scale.dims)
    if shape is None or scales is None:
        return None
    granularity = "channel" if len(scales) == 1 else "block"
    if all(size == 1 for size in scales):
        granularity = "tensor"
    if granularity not in granularities:
        return None
    axis = node_attribute(node, "axis", 1)
    if axis < 0:
        axis += len(shape)
    block = node_attribute(node, "block_size", 0)
    return _Quantisation(granularity, data, codes, shape, scales, axis, block)


def constant_scale(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """NvInfer.h (10.3), IQuantizeLayer: the scale is a constant, or a constant that is cast."""
    if graph.constant(node.input[1]) is not None:
        return None
    return "a constant scale", f"the computed {node.input[1]!r}"


def positive_scale(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """importer: "Scale coefficients must all be positive"; NvInfer.h: "strictly"."""
    tensor = graph.constant(node.input[1])
    if tensor is None:
        return None
    scales = graph.values(tensor)
    n_refused = scales.size - np.count_nonzero(scales > 0)  # a NaN is refused too
    if n_refused == 0:
        return None
    return "scales > 0", f"{n_refused} of {scales.size} that are not, down to {scales.min():g}"


def zero_point(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """importer: "only symmetric quantization"; NvInfer.h: a constant of zeros, one per scale."""
    name = node_input(node, 2)
    if not name:
        return None
    expected = "no zero point, or a constant zero per scale"
    tensor = graph.constant(name)
    if tensor is None:
        return expected, f"the computed {name!r}"
    if not graph.is_zero(tensor):
        return expected, "others than zero"
    scale = graph.constant(node.input[1])
    if scale is not None and np.prod(tensor.dims) != np.prod(scale.dims):
        return expected, f"{tuple(tensor.dims)} zeros for {tuple(scale.dims)} scales"
    return None


def code_type(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """importer, QuantDequantLinearHelper: UINT8, ONNX's default, is refused or read as INT8."""
    accepted = graph.table.operators["DequantizeLinear"]
    found = graph.types.get(node.output[0], "UINT8")
    if found in accepted:
        return None
    return f"codes of {' or '.join(accepted)}", found


def scale_shape(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """importer: a scale per channel, or the data's shape with blocks along one dimension."""
    quantisation = _quantisation(node, graph, "channel", "block")
    if quantisation is None:
        return None
    shape = quantisation.shape
    size = quantisation.size
    if quantisation.granularity == "channel":
        expected: Shape = (size,)
    elif isinstance(size, int) and quantisation.block:
        n_blocks = -(-size // quantisation.block)  # rounded up
        axis = quantisation.axis
        expected = (*shape[:axis], n_blocks, *shape[axis + 1 :])
    else:
        return None  # whole_blocks tells
    if quantisation.scales == expected:
        return None
    return f"scales of shape {expected}", f"{quantisation.scales} for data of shape {shape}"


def written_axis(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """importer: without the attribute 10.1 takes axis 0, where ONNX's default is 1."""
    is_written = any(attribute.name == "axis" for attribute in node.attribute)
    if is_written or _quantisation(node, graph, "channel", "block") is None:
        return None
    return "the attribute axis", "none"


def channel_of_weight(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """NvInfer.h: "Activations cannot be quantized per-channel"."""
    quantisation = _quantisation(node, graph, "channel")
    if quantisation is None or graph.is_weight(quantisation.data):
        return None
    return "one scale, or a constant", f"{quantisation.scales[0]} scales of computed data"


def block_type(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """NvInfer.h (10.3): "block quantization (supported for DataType::kINT4 only)"."""
    quantisation = _quantisation(node, graph, "block")
    if quantisation is None:
        return None
    found = graph.types.get(quantisation.codes, "UINT8")
    if found in graph.table.block_types:
        return None
    return f"blocks of {' or '.join(graph.table.block_types)}", found


def block_of_weight(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """NvInfer.h (10.3): "only for 2-D input tensors [...] rooted at an IConstantLayer"."""
    quantisation = _quantisation(node, graph, "block")
    if quantisation is None:
        return None
    kind = "constant" if graph.is_weight(quantisation.data) else "computed tensor"
    n_dims = len(quantisation.shape)
    if kind == "constant" and n_dims == 2:
        return None
    return "blocks of a 2-D constant", f"a {n_dims}-D {kind}"


def whole_blocks(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """importer: the block size is the ratio of the shapes, its attribute is not read.

    So a shorter last block is refused, or makes the others shorter too. A single block is read as
    one of the data's size, whatever its attribute.
    """
    quantisation = _quantisation(node, graph, "block")
    if quantisation is None:
        return None
    size = quantisation.size
    block = quantisation.block
    if isinstance(size, int) and block > 1 and (size % block == 0 or size < block):
        return None
    return f"blocks that divide {size}", f"blocks of {block}"


def even_rows(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """importer: "not supported for tensors with an odd last dimension", as INT4 is packed."""
    quantisation = _quantisation(node, graph, "tensor", "channel", "block")
    if quantisation is None or graph.types.get(quantisation.codes) not in ("INT4", "FP4"):
        return None
    last = quantisation.shape[-1] if quantisation.shape else 1
    if not isinstance(last, int) or last % 2 == 0:
        return None
    return "an even last dimension of 4-bit codes", str(last)
