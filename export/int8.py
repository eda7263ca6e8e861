"""INT8 products for an encoder: a MatMul's weight becomes INT8 codes with one scale per column.

The codes have 7 bits: x86 without VNNI adds two products of a uint8 and an int8 in 16 bits, and
2 x 255 x 64 fits.

The graph for every backend dequantises them (DequantizeLinear, which TensorRT takes). The one for
ONNX Runtime also quantises the other factor, by its range in this very call, so that no calibration
is needed (DynamicQuantizeLinear, MatMulInteger). Convolutions stay FP32: one scale for a whole
recording is too coarse for them.
"""

import onnx_ir as ir

from tiny_align.export.program_weights import (
    add_weight,
    read_weight,
    remove_weight,
    weight_products,
)
from tiny_align.runtime.bundle.onnx_weights import quantise_columns

BITS = 7


def store_int8(program: ir.Model) -> None:
    """Replace every FP32 weight (K, N) of a MatMul by a DequantizeLinear of INT8 codes."""
    graph = program.graph
    dequantised: dict[ir.Value, ir.Node] = {}
    for product in weight_products(graph):
        weight = product.weight
        if weight not in dequantised:
            codes, scales = quantise_columns(read_weight(weight), BITS)
            inputs = [
                add_weight(graph, f"{weight.name}.codes", codes),
                add_weight(graph, f"{weight.name}.scales", scales),
            ]
            dequantised[weight] = ir.node("DequantizeLinear", inputs, attributes={"axis": 1})
            graph.insert_before(product.node, dequantised[weight])
        product.node.replace_input_with(1, dequantised[weight].outputs[0])
    for weight in dequantised:
        remove_weight(graph, weight)


def multiply_int8(program: ir.Model) -> None:
    """Multiply the codes of `store_int8` by a factor that is quantised too.

    ONNX Runtime fuses the nodes of each product.
    """
    graph = program.graph
    quantised: dict[ir.Value, ir.Node] = {}
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        factor, weight = node.inputs
        dequantise = weight.producer() if weight is not None else None
        if factor is None or dequantise is None or dequantise.op_type != "DequantizeLinear":
            continue
        if factor not in quantised:
            quantised[factor] = ir.node("DynamicQuantizeLinear", [factor], num_outputs=3)
            graph.insert_before(node, quantised[factor])
        nodes = _integer_product(quantised[factor], dequantise)
        graph.insert_before(node, nodes)
        output = node.outputs[0]
        product = nodes[-1].outputs[0]
        product.shape = output.shape
        product.type = output.type
        output.replace_all_uses_with(product, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if not dequantise.outputs[0].uses():
            graph.remove(dequantise, safe=True)


def _integer_product(quantise: ir.Node, dequantise: ir.Node) -> list[ir.Node]:
    """rows (..., K) uint8 @ codes (K, N) int8 -> (..., N) float32, as ONNX Runtime fuses it."""
    rows, rows_scale, rows_zero = quantise.outputs
    codes, scales = dequantise.inputs
    product = ir.node("MatMulInteger", [rows, codes, rows_zero])
    floats = ir.node("Cast", [product.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    scale = ir.node("Mul", [rows_scale, scales])
    return [product, floats, scale, ir.node("Mul", [floats.outputs[0], scale.outputs[0]])]
