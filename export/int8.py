"""INT8 products for an encoder: every weight that a MatMul takes in INT8, one scale per column.

The codes have 7 bits: x86 without VNNI adds two products of a uint8 and an int8 in 16 bits, and 2 x 255 x 64 fits.

The plain graph dequantises them (DequantizeLinear, which TensorRT takes). The one for ONNX Runtime also quantises what
comes in, by its range in this very call, so that no calibration is needed (DynamicQuantizeLinear, MatMulInteger).
Convolutions stay FP32: one scale for a whole recording is too coarse for them.
"""

import onnx_ir as ir

from tiny_align.export.packing import make_initializer
from tiny_align.export.quantise import quantise_blocks

BITS = 7


def store_int8(program: ir.Model) -> None:
    """Put a DequantizeLinear of INT8 codes in the place of every FP32 weight (K, N) of a MatMul."""
    graph, made = program.graph, {}
    for node in list(graph):
        if (
            node.op_type == "MatMul"
            and (weight := node.inputs[1]).const_value is not None
            and len(weight.shape) == 2
        ):
            if weight not in made:
                made[weight] = _dequantised(graph, weight)
                graph.insert_before(node, made[weight])
            node.replace_input_with(1, made[weight].outputs[0])
    for weight in made:
        del graph.initializers[weight.name]


def _dequantised(graph: ir.Graph, weight: ir.Value) -> ir.Node:
    codes, scales = quantise_blocks(weight.const_value.numpy(), BITS)
    inputs = [
        make_initializer(graph, f"{weight.name}.{name}", v)
        for name, v in (("codes", codes), ("scales", scales))
    ]
    return ir.node("DequantizeLinear", inputs, attributes={"axis": 1})


def multiply_int8(program: ir.Model) -> None:
    """Multiply the codes that `store_int8` made with what comes in quantised too; ONNX Runtime fuses each product."""
    graph, quantised = program.graph, {}
    for node in list(graph):
        weight = node.inputs[1].producer() if node.op_type == "MatMul" else None
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        rows = node.inputs[0]
        if rows not in quantised:
            quantised[rows] = ir.node("DynamicQuantizeLinear", [rows], num_outputs=3)
            graph.insert_before(node, quantised[rows])
        nodes = _integer_product(*quantised[rows].outputs, *weight.inputs)
        graph.insert_before(node, nodes)
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].dtype = (
            node.outputs[0].shape,
            node.outputs[0].dtype,
        )
        node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if not weight.outputs[0].uses():
            graph.remove(weight, safe=True)


def _integer_product(rows, rows_scale, rows_zero, codes, scales) -> list[ir.Node]:
    """rows (.., K) uint8 @ codes (K, N) int8 -> (.., N) float32, in the order ONNX Runtime looks for."""
    product = ir.node("MatMulInteger", [rows, codes, rows_zero])
    floats = ir.node("Cast", [product.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    scale = ir.node("Mul", [rows_scale, scales])
    return [product, floats, scale, ir.node("Mul", [floats.outputs[0], scale.outputs[0]])]
