"""The LLM's weights in fewer bits, as standard ONNX that ONNX Runtime and TensorRT both read.

A weight goes into blocks along its input, each with a scale: symmetric INT4 or INT8 behind a DequantizeLinear (opset
21), which ONNX Runtime fuses into MatMulNBits when it loads. FP16 weights are multiplied in FP16. All between the
products, and what goes in and out of the graph, stays FP32. Weights go from file to file some rows at a time, so that
no memory is needed for them. The encoder and the projector stay as they are (a 4-bit projector makes an audio LLM
erratic).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from tiny_align.runtime.errors import TinyAlignError

BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}  # by precision
BLOCKS = (128, 64, 32)  # weights along the input that share a scale; the first is the default
INLINE_BYTES = 256  # smaller tensors stay in the graph: shape inference reads them
ALIGNMENT = 64  # bytes; of a tensor in the data file
TILE = (128, 4096)  # rows and columns worked on at once: they fit the processor's cache
DTYPES = {16: TensorProto.FLOAT16, 8: TensorProto.INT8, 4: TensorProto.INT4}


@dataclass(frozen=True)
class Form:
    """How weights are stored: floats of 32 or 16 bits, or integers of 8 or 4 in blocks."""

    bits: int
    block: int = BLOCKS[0]


def forms(precision: str, head: str | None = None, block: int = BLOCKS[0]) -> tuple[Form, Form]:
    """Of the layers and of the output layer, which has the layers' precision, but at least "int8", unless given.

    Raises:
        TinyAlignError: a precision or a block size that there is not.
    """
    for name, value, known in (
        ("precision", precision, BITS),
        ("head-precision", head or precision, BITS),
        ("block-size", block, BLOCKS),
    ):
        if value not in known:
            raise TinyAlignError(f"--{name} is {value}: choose one of {', '.join(map(str, known))}")
    bits = BITS[precision]
    return Form(bits, block), Form(BITS[head] if head else max(bits, 8), block)


def quantise(source: Path, target: Path, layers: Form, head: Form) -> None:
    """Write `target` (+ .data): the FP32 graph `source` with the weight of every MatMul in another form.

    Args:
        head: of the weight that makes the logits, which is the embedding table where they are tied.

    Raises:
        TinyAlignError: a weight that float16 cannot hold.
    """
    model = onnx.load(str(source), load_external_data=False)
    stored = {t.name: t for t in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in stored]
    chosen = {n.input[1]: layers for n in products} | {output_layer(model).input[1]: head}
    with open(f"{target}.data", "wb") as data:
        for name, tensor in stored.items():
            _write(
                model.graph,
                tensor,
                _values(source.parent, tensor),
                chosen.get(name, Form(32)),
                data,
            )
    _multiply_in_half(model.graph, {n.output[0] for n in products if chosen[n.input[1]].bits == 16})
    onnx.save(model, str(target))


def output_layer(model) -> onnx.NodeProto:
    """The MatMul that makes the logits."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    name = "logits"
    while made_by[name].op_type != "MatMul":  # back through a soft cap
        name = next(
            i for i in made_by[name].input if i in made_by and made_by[i].op_type != "Constant"
        )
    return made_by[name]


def _values(folder: Path, tensor) -> np.ndarray:
    """A tensor's values, those in the data file mapped."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return onnx.numpy_helper.to_array(tensor)
    place = {e.key: e.value for e in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(
        folder / place["location"], dtype, "r", int(place.get("offset", 0)), tuple(tensor.dims)
    )


def _write(graph, tensor, values: np.ndarray, form: Form, data) -> None:
    """Write a tensor's values in their new form to the data file; what is small goes into the graph."""
    if form.bits == 32 and values.nbytes < INLINE_BYTES:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(values), tensor.name))
    elif form.bits == 32:
        _store(tensor, tensor.data_type, values.shape, [values], data)
    elif form.bits == 16:
        _store(tensor, DTYPES[form.bits], values.shape, _halves(tensor.name, values), data)
    else:
        _store_blocks(graph, tensor, values, form, data)


def _store(tensor, dtype: int, shape, pieces, data) -> None:
    """Write the pieces one after the other, and their place into `tensor`."""
    data.write(bytes(-data.tell() % ALIGNMENT))
    name, start = tensor.name, data.tell()
    for piece in pieces:
        data.write(np.ascontiguousarray(piece).data)
    tensor.Clear()
    tensor.name, tensor.data_type, tensor.data_location = name, dtype, TensorProto.EXTERNAL
    tensor.dims.extend(shape)
    place = {"location": Path(data.name).name, "offset": start, "length": data.tell() - start}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))


def _halves(name: str, values: np.ndarray) -> Iterator[np.ndarray]:
    """(K, N) weights in float16, some rows at a time."""
    for start in range(0, len(values), TILE[0]):
        with np.errstate(over="ignore"):
            half = values[start : start + TILE[0]].astype(np.float16)
        if not np.isfinite(half).all():
            raise TinyAlignError(
                f"the LLM's weight {name} goes beyond float16: choose another --precision than fp16"
            )
        yield half


def _store_blocks(graph, tensor, values: np.ndarray, form: Form, data) -> None:
    """Codes and scales in the place of (K, N) weights, and the node whose output has the weights' name."""
    name, scales = tensor.name, []
    tensor.name, scale = f"{name}.codes", graph.initializer.add(name=f"{name}.scales")
    _store(tensor, DTYPES[form.bits], values.shape, _codes(values, form, scales), data)
    _store(scale, TensorProto.FLOAT, (len(scales), values.shape[1]), scales, data)
    made = onnx.helper.make_node(
        "DequantizeLinear", [tensor.name, scale.name], [name], axis=0, block_size=form.block
    )
    graph.node.insert(0, made)


def _codes(values: np.ndarray, form: Form, scales: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The codes of (K, N) weights as the file has them, a row of blocks at a time; its scales are added to `scales`."""
    for start in range(0, len(values), form.block):
        rows = values[start : start + form.block]
        tiles = [
            quantise_blocks(rows[:, n : n + TILE[1]], form.bits)
            for n in range(0, rows.shape[1], TILE[1])
        ]
        scales.append(np.concatenate([scale for _, scale in tiles]))
        codes = np.concatenate([codes for codes, _ in tiles], axis=1)
        yield _packed(codes) if form.bits == 4 else codes


def quantise_blocks(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A block of every column, rounded to nearest: rows (block, N) -> codes (block, N) int8, scales (N,) float32.

    With 4 bits the weight farthest from zero becomes the lowest code, as in llama.cpp's Q4_0 and onnxruntime's
    quantiser, so that a scale may be negative; with more TensorRT takes positive ones only.
    """
    highest = (1 << (bits - 1)) - 1
    farthest = np.take_along_axis(rows, np.abs(rows).argmax(axis=0)[None], axis=0)[0]
    scales = (
        farthest / np.float32(-highest - 1) if bits == 4 else np.abs(farthest) / np.float32(highest)
    )
    scales = np.where(scales == 0, np.float32(1), scales)
    return np.clip(np.rint(rows / scales), -highest - 1, highest).astype(np.int8), scales


def _packed(codes: np.ndarray) -> np.ndarray:
    """INT4 codes, two to a byte, the first in its lower half."""
    first, second = codes.ravel()[::2] & 15, codes.ravel()[1::2] << 4
    first[: len(second)] |= second
    return first.view(np.uint8)


def _multiply_in_half(graph, outputs: set[str]) -> None:
    """The products with these outputs are made in float16, between casts."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if (y := node.output[0]) in outputs:
            cast_in = onnx.helper.make_node(
                "Cast", [node.input[0]], [f"{y}.in"], to=TensorProto.FLOAT16
            )
            cast_out = onnx.helper.make_node("Cast", [f"{y}.half"], [y], to=TensorProto.FLOAT)
            node.input[0], node.output[0] = cast_in.output[0], cast_out.input[0]
            graph.node.extend([cast_in, node, cast_out])
        else:
            graph.node.append(node)
