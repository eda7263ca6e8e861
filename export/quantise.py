"""The LLM's weights in fewer bits, as standard ONNX that ONNX Runtime and TensorRT both read.

A weight is cut into blocks along its input, each with a scale per column: symmetric INT4 or INT8
behind a DequantizeLinear (opset 21), which ONNX Runtime fuses into MatMulNBits when it loads. FP16
weights are multiplied in FP16. Everything between the products, and the graph's inputs and outputs,
stays FP32. Weights go from file to file some rows at a time, so that they need no memory. The
encoder and the projector stay as they are (a 4-bit projector makes an audio LLM erratic).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tiny_align.export.options import BLOCKS
from tiny_align.runtime.bundle.onnx_weights import (
    Place,
    append_weight,
    find_place,
    load_graph,
    quantise_columns,
    read_weight,
    set_place,
    weight_products,
)
from tiny_align.runtime.errors import TinyAlignError

BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}  # by precision

INLINE_BYTES = 256  # smaller tensors stay in the graph: shape inference reads them
TILE = (128, 4096)  # rows and columns worked on at once: they fit the processor's cache
DTYPES = {16: TensorProto.FLOAT16, 8: TensorProto.INT8, 4: TensorProto.INT4}


@dataclass(frozen=True)
class Form:
    """How weights are stored: floats of 32 or 16 bits, or integers of 8 or 4 in blocks."""

    bits: int
    block: int = BLOCKS[0]


def forms(precision: str, head: str | None = None, block: int = BLOCKS[0]) -> tuple[Form, Form]:
    """The forms of the layers and of the output layer.

    Args:
        head: the output layer's precision; None: the layers', but at least "int8".
    Raises:
        TinyAlignError: an unknown precision or block size.
    """
    _check_choice("precision", precision, BITS)
    _check_choice("head-precision", head or precision, BITS)
    _check_choice("block-size", block, BLOCKS)
    bits = BITS[precision]
    head_bits = BITS[head] if head else max(bits, 8)
    return Form(bits, block), Form(head_bits, block)


def _check_choice(name: str, value: str | int, choices: Iterable[str | int]) -> None:
    if value not in choices:
        raise TinyAlignError(f"--{name} is {value}: choose one of {', '.join(map(str, choices))}")


# By a weight's place in FP32 and its form: the tensor that stores it, or its codes and scales.
Stored = dict[tuple[Place | None, Form], list[TensorProto]]


def quantise(
    source: Path, target: Path, layers: Form, head: Form, stored: Stored | None = None
) -> None:
    """Write `target` (+ .data): the FP32 graph `source` with its products' weights in other forms.

    Args:
        head: the form of the output layer's weight, which is the embedding table if they are tied.
        stored: what earlier calls have written for graphs over the same weights, from one folder to
            one other; it is referred to, and what this call writes is added.
    Raises:
        TinyAlignError: a weight that float16 cannot hold.
    """
    model = load_graph(source)
    products = weight_products(model.graph)
    form_of = {node.input[1]: layers for node in products}
    form_of[output_layer(model).input[1]] = head
    stored = {} if stored is None else stored
    with open(f"{target}.data", "wb") as data:
        for tensor in list(model.graph.initializer):
            values = read_weight(tensor, source.parent)
            form = form_of.get(tensor.name, Form(32))
            if form.bits == 32 and values.nbytes < INLINE_BYTES:
                tensor.CopyFrom(numpy_helper.from_array(np.array(values), tensor.name))
                continue
            key = (find_place(tensor), form)
            if key not in stored or key[0] is None:
                stored[key] = _store_form(tensor, values, form, data)
            _refer(model.graph, tensor, stored[key], form)
    if not Path(data.name).stat().st_size:
        Path(data.name).unlink()
    fp16_outputs = {node.output[0] for node in products if form_of[node.input[1]].bits == 16}
    _multiply_in_fp16(model.graph, fp16_outputs)
    onnx.save(model, str(target))


def output_layer(model: onnx.ModelProto) -> onnx.NodeProto:
    """The MatMul that makes the logits; a soft cap may follow it."""
    producers = {}
    for node in model.graph.node:
        for output in node.output:
            producers[output] = node
    node = producers["logits"]
    while node.op_type != "MatMul":
        inputs = [producers[name] for name in node.input if name in producers]
        node = next(producer for producer in inputs if producer.op_type != "Constant")
    return node


def _store_form(
    tensor: TensorProto, values: np.ndarray, form: Form, data: BinaryIO
) -> list[TensorProto]:
    """Write weights in a form: one tensor, or codes and scales."""
    if form.bits == 32:
        return [_store(tensor.data_type, values.shape, [values], data)]
    if form.bits == 16:
        return [_store(DTYPES[16], values.shape, _fp16_rows(tensor.name, values), data)]
    scales: list[np.ndarray] = []
    codes = _store(DTYPES[form.bits], values.shape, _code_rows(values, form, scales), data)
    return [codes, _store(TensorProto.FLOAT, (len(scales), values.shape[1]), scales, data)]


def _store(
    dtype: int, shape: Sequence[int], pieces: Iterable[np.ndarray], data: BinaryIO
) -> TensorProto:
    """Write the pieces of a tensor to the data file; returns it, without a name."""
    place = append_weight(pieces, data, Path(data.name).name)
    tensor = TensorProto(data_type=dtype, dims=shape)
    set_place(tensor, place)
    return tensor


def _refer(
    graph: onnx.GraphProto, tensor: TensorProto, parts: list[TensorProto], form: Form
) -> None:
    """Replace weights by what stores them; codes and scales by a DequantizeLinear of their name."""
    name = tensor.name
    tensor.CopyFrom(parts[0])
    tensor.name = name
    if len(parts) == 1:
        return
    tensor.name = f"{name}.codes"
    scales = graph.initializer.add()
    scales.CopyFrom(parts[1])
    scales.name = f"{name}.scales"
    inputs = [tensor.name, scales.name]
    node = helper.make_node("DequantizeLinear", inputs, [name], axis=0, block_size=form.block)
    graph.node.insert(0, node)


def _fp16_rows(name: str, values: np.ndarray) -> Iterator[np.ndarray]:
    """Weights (K, N) in float16, some rows at a time."""
    for start in range(0, len(values), TILE[0]):
        with np.errstate(over="ignore"):
            rows = values[start : start + TILE[0]].astype(np.float16)
        if not np.isfinite(rows).all():
            raise TinyAlignError(
                f"the LLM's weight {name} goes beyond float16: choose another --precision than fp16"
            )
        yield rows


def _code_rows(values: np.ndarray, form: Form, scales: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The codes of weights (K, N) as stored, a row of blocks at a time; appends to `scales`."""
    for start in range(0, len(values), form.block):
        rows = values[start : start + form.block]
        tile_codes = []
        tile_scales = []
        for column in range(0, rows.shape[1], TILE[1]):
            tile = rows[:, column : column + TILE[1]]
            codes, scale = quantise_columns(tile, form.bits)
            tile_codes.append(codes)
            tile_scales.append(scale)
        scales.append(np.concatenate(tile_scales))
        codes = np.concatenate(tile_codes, axis=1)
        yield _pack_int4(codes) if form.bits == 4 else codes


def _pack_int4(codes: np.ndarray) -> np.ndarray:
    """INT4 codes, two to a byte, the first in its lower half."""
    low = codes.ravel()[::2] & 15
    high = codes.ravel()[1::2] << 4
    low[: len(high)] |= high
    return low.view(np.uint8)


def _multiply_in_fp16(graph: onnx.GraphProto, outputs: set[str]) -> None:
    """Compute the products with these outputs in float16, between casts."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        output = node.output[0]
        if output not in outputs:
            graph.node.append(node)
            continue
        factor = node.input[0]
        node.input[0] = f"{output}.in"
        node.output[0] = f"{output}.half"
        cast_in = helper.make_node("Cast", [factor], [node.input[0]], to=TensorProto.FLOAT16)
        cast_out = helper.make_node("Cast", [node.output[0]], [output], to=TensorProto.FLOAT)
        graph.node.extend([cast_in, node, cast_out])
