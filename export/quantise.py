"""The LLM's weights in fewer bits, in forms that ONNX Runtime and TensorRT both take.

A weight is cut into blocks along its input, each with a positive scale per output. INT4 is one
DequantizeLinear in both graphs. INT8 is one in ONNX Runtime's; TensorRT has no INT8 in blocks, and
its graph holds the same numbers as two INT4 weights on top of each other, high and low: 16 h + l.
A minimum per block, which files of llama.cpp have (Q4_1), is a thin product beside: the sums of the
input's blocks times the minima. FP16 weights are multiplied in FP16.

Scales have 16 bits on disk and are cast: TensorRT takes a constant that is cast, ONNX Runtime does
it when it loads, and then makes MatMulNBits of a DequantizeLinear and its product. Everything
between the products, and the graph's inputs and outputs, stays FP32. Weights go from file to file
some rows at a time. The encoder and the projector stay as they are (a 4-bit projector makes an
audio LLM erratic).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tiny_align.export.rounding import MAX_CODE, round_nearest
from tiny_align.export.weight_forms import Blocks, LlmWeights, Table, dequantised
from tiny_align.runtime.bundle.onnx_weights import (
    Place,
    append_weight,
    find_place,
    load_graph,
    read_weight,
    set_place,
    weight_products,
)
from tiny_align.runtime.errors import TinyAlignError

Layout = Literal["tensorrt", "onnxruntime"]

INLINE_BYTES = 256  # smaller tensors stay in the graph: shape inference reads them
ROWS = 128  # of a weight that are worked on at once
DTYPES = {16: TensorProto.FLOAT16, 8: TensorProto.INT8, 4: TensorProto.INT4}
INT8_PRODUCTS = 4  # accuracy level of MatMulNBits, see runtime/backends/onnxruntime.py


# A weight's place in FP32 and the form of a part of it -> where that part is stored.
Stored = dict[tuple[Place, str], Place]


def quantise(
    source: Path,
    target: Path,
    weights: LlmWeights,
    layout: Layout,
    stored: Stored | None = None,
) -> None:
    """Write `target` (+ .data): the FP32 graph `source` with its products' weights in other forms.

    Args:
        layout: how weights in 8 bits are stored, and where the embedding table is the output
            layer's weight too.
        stored: what earlier calls have written for graphs over the same weights, from one folder to
            one other; it is referred to, and what this call writes is added.
    Raises:
        TinyAlignError: a weight that float16 cannot hold.
    """
    stored = {} if stored is None else stored
    data_path = target.with_name(f"{target.name}.data")
    with open(data_path, "wb") as data:
        writer = _Writer(load_graph(source), source.parent, weights, layout, stored, data)
        writer.write()
    if not data_path.stat().st_size:
        data_path.unlink()
    onnx.save(writer.model, str(target))


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


class _Writer:
    """Rewrites one graph; a product's weight is replaced as its form wants it."""

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path,
        weights: LlmWeights,
        layout: Layout,
        stored: Stored,
        data: BinaryIO,
    ):
        self.model = model
        self._folder = folder
        self._weights = weights
        self._layout = layout
        self._stored = stored
        self._data = data
        self._source: Place | None = None  # of the weight in FP32 that is worked on
        self._before: list[onnx.NodeProto] = []  # nodes that come first: constants only
        self._replaced: dict[int, list[onnx.NodeProto]] = {}  # index of a MatMul -> its nodes
        self._shared: set[str] = set()  # values that several products read

    def write(self) -> None:
        graph = self.model.graph
        head = output_layer(self.model).input[1]
        products = products_of_weights(graph)
        for tensor in list(graph.initializer):
            self._source = find_place(tensor)
            values = read_weight(tensor, self._folder)
            indices = products.get(tensor.name, [])
            form = self._weights.get(tensor.name, values, tensor.name == head) if indices else None
            if form is None and values.nbytes < INLINE_BYTES:
                tensor.CopyFrom(numpy_helper.from_array(np.array(values), tensor.name))
            elif form is None:
                self._store("fp32", tensor, tensor.data_type, values.shape, [values])
            elif form == "fp16":
                rows = _fp16_rows(tensor.name, values)
                self._store("fp16", tensor, DTYPES[16], values.shape, rows)
                for index in indices:
                    self._replaced[index] = _multiply_in_fp16(graph.node[index])
            elif self._layout == "tensorrt" and values.shape[1] % 2:
                # Two INT4 codes of a row would share a byte with the next row's.
                rows = _fp16_rows(tensor.name, dequantised(form))
                self._store("dequantised", tensor, DTYPES[16], values.shape, rows)
                for index in indices:
                    self._replaced[index] = _multiply_in_fp16(graph.node[index])
            elif form.table is not None and self._layout == "onnxruntime":
                self._read_table(tensor, form.table, form.block, indices)
            else:
                self._store_blocks(tensor, form, indices)
        nodes = self._before
        for index, node in enumerate(graph.node):
            nodes.extend(self._replaced.get(index, [node]))
        for node in nodes:
            node.name = node.name or f"{node.output[0]}.node"  # some tools find nodes by name
        rewritten = onnx.GraphProto(node=nodes)
        del graph.node[:]
        graph.node.extend(rewritten.node)

    def _store(
        self,
        part: str,
        tensor: TensorProto,
        dtype: int,
        shape: Sequence[int],
        pieces: Iterable[np.ndarray],
    ) -> None:
        """Write the pieces of a tensor, unless they are stored, and their place into `tensor`.

        Args:
            part: of the weight that is worked on, and its form.
        """
        place = None if self._source is None else self._stored.get((self._source, part))
        if place is None:
            place = append_weight(pieces, self._data, Path(self._data.name).name)
        if self._source is not None:
            self._stored[self._source, part] = place
        _point(tensor, dtype, shape, place)

    def _store_blocks(self, tensor: TensorProto, blocks: Blocks, indices: list[int]) -> None:
        """Replace weights (K, N) by codes, scales and a DequantizeLinear that has their name."""
        name = tensor.name
        if blocks.bits == 8 and self._layout == "tensorrt":
            blocks = _within_two_int4(blocks)
        n_inputs, n_outputs = blocks.codes.shape
        scales = blocks.scales
        tensor.name = f"{name}.codes"
        if blocks.bits == 4:
            self._store("int4", tensor, DTYPES[4], blocks.codes.shape, _int4_rows(blocks.codes))
        elif self._layout == "onnxruntime":
            self._store("int8", tensor, DTYPES[8], blocks.codes.shape, [blocks.codes])
        else:
            shape = (2 * n_inputs, n_outputs)
            self._store("high and low", tensor, DTYPES[4], shape, _high_and_low(blocks.codes))
            scales = np.concatenate([scales * scales.dtype.type(16), scales])
        self._store_floats(f"{name}.scales", scales)
        inputs = [tensor.name, f"{name}.scales.fp32"]
        node = helper.make_node("DequantizeLinear", inputs, [name], axis=0, block_size=blocks.block)
        self._before.append(node)
        products = self.model.graph.node
        if blocks.bits == 8 and self._layout == "tensorrt":
            for index in indices:
                self._replaced[index] = self._multiply_twice(products[index])
        if blocks.minima is not None:
            self._store_floats(f"{name}.minima", blocks.minima)
            for index in indices:
                self._replaced[index] = self._add_minima(products[index], n_inputs, blocks.block)

    def _store_floats(self, name: str, values: np.ndarray) -> None:
        """A constant `name`.fp32, stored as `values` are."""
        tensor = self.model.graph.initializer.add(name=name)
        dtype = helper.np_dtype_to_tensor_dtype(values.dtype)
        part = f"{name} {len(values)}"
        self._store(part, tensor, dtype, values.shape, [values])
        cast = helper.make_node("Cast", [name], [f"{name}.fp32"], to=TensorProto.FLOAT)
        self._before.append(cast)

    def _multiply_twice(self, product: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A factor twice, one behind the other: times the high codes and the low ones."""
        factor = product.input[0]
        twice = f"{factor}.twice"
        nodes = []
        if twice not in self._shared:
            self._shared.add(twice)
            nodes.append(helper.make_node("Concat", [factor, factor], [twice], axis=-1))
        product.input[0] = twice
        return [*nodes, product]

    def _add_minima(
        self, product: onnx.NodeProto, n_inputs: int, block: int
    ) -> list[onnx.NodeProto]:
        """The product plus the sums of its factor's blocks times their minima."""
        factor = product.input[0]
        output = product.output[0]
        minima = f"{product.input[1]}.minima.fp32"
        sums = f"{factor}.sums"
        nodes = []
        if sums not in self._shared:
            self._shared.add(sums)
            shape = np.array([0, 0, n_inputs // block, block], np.int64)
            constants = {f"{sums}.shape": shape, f"{sums}.axis": np.array([3], np.int64)}
            for name, array in constants.items():
                self.model.graph.initializer.append(numpy_helper.from_array(array, name))
            in_blocks = f"{factor}.blocks"
            nodes.append(helper.make_node("Reshape", [factor, f"{sums}.shape"], [in_blocks]))
            inputs = [in_blocks, f"{sums}.axis"]
            nodes.append(helper.make_node("ReduceSum", inputs, [sums], keepdims=0))
        product.output[0] = f"{output}.codes"
        thin = f"{output}.minima"
        nodes.append(product)
        nodes.append(helper.make_node("MatMul", [sums, minima], [thin]))
        nodes.append(helper.make_node("Add", [product.output[0], thin], [output]))
        return nodes

    def _read_table(
        self, tensor: TensorProto, table: Table, block: int, indices: list[int]
    ) -> None:
        """Let the products read the embedding table where the bundle has it."""
        name = tensor.name
        n_inputs, n_outputs = tensor.dims
        n_blocks = n_inputs // block
        tensor.name = f"{name}.codes"
        _point(tensor, TensorProto.UINT8, (n_outputs, n_blocks, block), table.codes)
        scales = self.model.graph.initializer.add(name=f"{name}.scales")
        _point(scales, TensorProto.FLOAT16, (n_outputs, n_blocks), table.scales)
        cast = helper.make_node(
            "Cast", [scales.name], [f"{scales.name}.fp32"], to=TensorProto.FLOAT
        )
        self._before.append(cast)
        for index in indices:
            node = self.model.graph.node[index]
            product = helper.make_node(
                "MatMulNBits",
                [node.input[0], tensor.name, f"{scales.name}.fp32"],
                node.output,
                domain="com.microsoft",
                K=n_inputs,
                N=n_outputs,
                bits=8,
                block_size=block,
                accuracy_level=INT8_PRODUCTS,
            )
            self._replaced[index] = [product]


def products_of_weights(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """The name of a weight (K, N) -> the indices of the MatMul nodes that it is a factor of."""
    outputs = {node.output[0] for node in weight_products(graph)}
    indices: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        if node.output[0] in outputs:
            indices.setdefault(node.input[1], []).append(index)
    return indices


def _point(tensor: TensorProto, dtype: int, shape: Sequence[int], place: Place) -> None:
    """Make `tensor` one whose values are in another file."""
    name = tensor.name
    tensor.Clear()
    tensor.name = name
    tensor.data_type = dtype
    tensor.dims.extend(shape)
    set_place(tensor, place)


def _fp16_rows(name: str, values: np.ndarray) -> Iterator[np.ndarray]:
    """Weights (K, N) in float16, some rows at a time."""
    for start in range(0, len(values), ROWS):
        with np.errstate(over="ignore"):
            rows = values[start : start + ROWS].astype(np.float16)
        if not np.isfinite(rows).all():
            raise TinyAlignError(
                f"the LLM's weight {name} goes beyond float16: choose another --precision than fp16"
            )
        yield rows


def _int4_rows(codes: np.ndarray) -> Iterator[np.ndarray]:
    """INT4 codes as stored, some rows at a time."""
    for start in range(0, len(codes), ROWS):
        yield _pack_int4(codes[start : start + ROWS])


def _within_two_int4(blocks: Blocks) -> Blocks:
    """Blocks whose codes two INT4 codes can hold; llama.cpp's Q8_0 goes to 127: rounded anew."""
    if np.abs(blocks.codes).max() <= MAX_CODE[8]:
        return blocks
    codes, new_scales = round_nearest(dequantised(blocks), 8, blocks.block)
    return dataclasses.replace(blocks, codes=codes, scales=new_scales)


def _high_and_low(codes: np.ndarray) -> Iterator[np.ndarray]:
    """Codes -119 to 119 as the INT4 weights h and l, one below the other: 16 h + l."""
    for start in range(0, len(codes), ROWS):
        yield _pack_int4((codes[start : start + ROWS] + np.int8(8)) >> 4)
    for start in range(0, len(codes), ROWS):
        rows = codes[start : start + ROWS]
        yield _pack_int4(rows - 16 * ((rows + np.int8(8)) >> 4))


def _pack_int4(codes: np.ndarray) -> np.ndarray:
    """INT4 codes, two to a byte, the first in its lower half."""
    low = codes.ravel()[::2] & 15
    high = codes.ravel()[1::2] << 4
    low[: len(high)] |= high
    return low.view(np.uint8)


def _multiply_in_fp16(product: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The product in float16, between casts."""
    factor = product.input[0]
    output = product.output[0]
    product.input[0] = f"{output}.in"
    product.output[0] = f"{output}.half"
    cast_in = helper.make_node("Cast", [factor], [product.input[0]], to=TensorProto.FLOAT16)
    cast_out = helper.make_node("Cast", [product.output[0]], [output], to=TensorProto.FLOAT)
    return [cast_in, product, cast_out]
