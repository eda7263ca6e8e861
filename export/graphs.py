"""PyTorch modules -> ONNX graphs with the bundle's names, in FP32: what every export shares.

Transformers models go through transformers' OnnxExporter. Graphs are standard ONNX (opset 21, batch
1), so that ONNX Runtime and TensorRT take the same file; static dimensions are numbers. No
quantisation here.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import onnx_ir
import torch

from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec
from tiny_align.runtime.bundle.onnx_weights import Place, append_weight, load_graph, read_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPSET = 21
COMPARED_BYTES = 1 << 20  # larger constants are parameters, whose names are theirs in every graph
PIECE_ROWS = 256  # of a weight, written at once
INLINE_BYTES = 128  # shapes and scalars stay in the graph: shape inference reads them


@dataclass(frozen=True)
class Graph:
    """An exported program, and the names and shapes that its file gets."""

    program: onnx_ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def save(self, path: Path, stored: dict[str, Place] | None = None) -> GraphSpec:
        """Write the graph, with the specification's names, and its weights as external data.

        Args:
            stored: name of a weight -> where another graph in the same folder has stored it; these
                are not written again, those that are now written are added.
        """
        _rename(self.program.graph.inputs, self.inputs)
        _rename(self.program.graph.outputs, self.outputs)
        with _weights_in_file(self.program.graph, path, {} if stored is None else stored):
            onnx_ir.save(self.program, str(path))
        model = load_graph(path)
        graph = model.graph
        for value, spec in zip(
            [*graph.input, *graph.output], [*self.inputs, *self.outputs], strict=True
        ):
            _set_shape(value, spec.shape)
        _normalise_by_channel(graph)
        _strip_traces(graph)
        # The exporter guesses at inner shapes, some static ones as symbols.
        del graph.value_info[:]
        onnx.save(model, str(path))
        return GraphSpec(path.name, "fp32", self.inputs, self.outputs, quantised_activations="none")

    def forget_weights(self) -> None:
        """Drop the weights, once the graph is saved; it cannot be saved again.

        They would stay in memory with it: onnxscript's rules hold on to the last graph they saw.
        """
        for value in self.program.graph.initializers.values():
            value.const_value = None
        gc.collect()


@contextlib.contextmanager
def _weights_in_file(graph: onnx_ir.Graph, path: Path, stored: dict[str, Place]) -> Iterator[None]:
    """Write the weights to <path>.data, one after another; within the block they are there.

    onnx_ir's own writer would copy what is stored already.
    """
    tensors = {}
    data_path = path.with_name(f"{path.name}.data")
    with open(data_path, "wb") as data:
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes <= INLINE_BYTES:
                continue
            if name not in stored or not _is_stored(tensor, stored[name], path.parent):
                stored[name] = append_weight(_pieces(tensor.numpy()), data, data_path.name)
            tensors[name] = tensor
            value.const_value = _external(tensor, name, stored[name], path.parent)
    if not data_path.stat().st_size:
        data_path.unlink()
    try:
        yield
    finally:
        for name, tensor in tensors.items():
            graph.initializers[name].const_value = tensor


def _is_stored(tensor: onnx_ir.TensorProtocol, place: Place, folder: Path) -> bool:
    """Whether a small constant has these bytes: the exporter's own names mean others elsewhere."""
    if tensor.nbytes > COMPARED_BYTES:
        return place.length == tensor.nbytes
    return read_bytes(place, folder).tobytes() == np.ascontiguousarray(tensor.numpy()).tobytes()


def _external(
    tensor: onnx_ir.TensorProtocol, name: str, place: Place, folder: Path
) -> onnx_ir.ExternalTensor:
    return onnx_ir.ExternalTensor(
        place.file,
        place.offset,
        place.length,
        tensor.dtype,
        shape=onnx_ir.Shape(tensor.shape.numpy()),
        name=name,
        base_dir=str(folder),
    )


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array in rows: of a transposed one, a copy of each piece is made and no other."""
    if not array.ndim:
        yield array
    for start in range(0, len(array), PIECE_ROWS):
        yield array[start : start + PIECE_ROWS]


def _rename(values: Iterable[onnx_ir.Value], specs: tuple[TensorSpec, ...]) -> None:
    values = list(values)
    if len(values) != len(specs):
        got = [value.name for value in values]
        raise RuntimeError(f"expected a graph with {[spec.name for spec in specs]}, got {got}")
    for value, spec in zip(values, specs):
        value.name = spec.name


def _set_shape(value: onnx.ValueInfoProto, shape: tuple[int | str, ...]) -> None:
    dims = value.type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size


def _normalise_by_channel(graph: onnx.GraphProto) -> None:
    """Write a GroupNormalization of single channels as an InstanceNormalization.

    They compute the same, and ONNX Runtime has a kernel for the latter.
    """
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "GroupNormalization":
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        scale = node.input[1]
        if sizes.get(scale) != [attributes["num_groups"]]:
            continue
        same = onnx.helper.make_node(
            "InstanceNormalization",
            node.input,
            node.output,
            node.name,
            epsilon=attributes["epsilon"],
        )
        node.CopyFrom(same)


def _strip_traces(graph: onnx.GraphProto) -> None:
    """Drop the exporter's notes on every node: half of a small graph's size.

    They are stack traces and module paths.
    """
    for part in (*graph.node, *graph.initializer, *graph.input, *graph.output, graph):
        del part.metadata_props[:]
        part.doc_string = ""


def export_program(
    model: "PreTrainedModel | torch.nn.Module",
    inputs: dict[str, Any],
    dynamic: bool = True,
    dynamic_shapes: dict[str, Any] | None = None,
    ort_fusions: Literal["cpu", "cuda"] | None = None,
) -> onnx_ir.Model:
    """A transformers model, or a module with its `config`, as ONNX.

    Args:
        inputs: tensors, and lists and caches of them, by the name of the argument.
        dynamic: whether any dimension is; without `dynamic_shapes` all are.
        dynamic_shapes: as torch.export takes them.
        ort_fusions: the ONNX Runtime provider whose own operators are wanted; None: plain ONNX.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(
        opset_version=OPSET,
        dynamic=dynamic,
        dynamic_shapes=dynamic_shapes,
        ort_fusions=ort_fusions,
    )
    exporter = OnnxExporter()
    # It takes any module with a `config`.
    return exporter.export(model, inputs, config=config).program  # type: ignore[arg-type]
