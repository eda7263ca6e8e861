"""A graph as the rules of tensorrt_rules.py read it, and what TensorRT's parser takes.

Types, shapes, producers and constants by the name of a tensor. The weights stay where they are
stored; a rule reads the few constants that it needs. onnx is imported inside the functions, as
everywhere in the runtime.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tiny_align.runtime.bundle.onnx_weights import find_place, read_bytes, read_weight
from tiny_align.runtime.bundle.profile import ShapeRange

if TYPE_CHECKING:
    import onnx

TABLES = Path(__file__).with_name("tensorrt_operators.json")
OLDEST = "10.1"  # the table for JetPack 6.2, which has TensorRT 10.3
ONNX_TYPES = {  # the tables' name of a type -> ONNX's, where they differ
    "FP32": "FLOAT",
    "FP16": "FLOAT16",
    "BF16": "BFLOAT16",
    "FP8": "FLOAT8E4M3FN",
    "FP4": "FLOAT4E2M1",
}
DTYPES = {  # attribute of a Constant node -> the type of its value
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
}

Shape = tuple[int | str | None, ...]  # a size, the name of a dynamic dimension, or unknown
Mismatch = tuple[str, str]  # what a rule expected of a node, and what it found


# --- what TensorRT's versions take ---


@dataclass(frozen=True)
class ParserTable:
    """What the parser of one version takes; types have ONNX's names."""

    operators: dict[str, list[str]]  # operator -> the types of its data; none: not supported
    block_types: list[str]  # of weights with one scale per block


@functools.cache
def parser_table(version: str = OLDEST) -> ParserTable:
    """The newest table that is not newer than a version; the oldest one for older versions."""
    tables = json.loads(TABLES.read_text(encoding="utf-8"))
    del tables["comment"]
    operators: dict[str, list[str]] = {}
    block_types: list[str] = []
    for name, table in tables.items():  # from old to new
        if not operators or _version_key(name) <= _version_key(version):
            for operator, types in table["operators"].items():
                operators[operator] = _onnx_names(types)
            block_types = _onnx_names(table["block_types"])
    return ParserTable(operators, block_types)


def _onnx_names(types: list[str]) -> list[str]:
    return [ONNX_TYPES.get(name, name) for name in types]


def _version_key(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


# --- a graph ---


class RuleGraph:
    """Types, shapes, producers and constants of a graph's tensors by name, for one version."""

    def __init__(
        self,
        model: "onnx.ModelProto",
        folder: Path,
        version: str = OLDEST,
        profile: Mapping[str, ShapeRange] | None = None,
    ):
        """Infer the types and shapes.

        Args:
            folder: of the ONNX file.
            profile: the shapes that an engine is built for.
        """
        import onnx

        self.table = parser_table(version)
        self.types: dict[str, str] = {}
        self.shapes: dict[str, Shape] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.nodes: list[onnx.NodeProto] = []
        self._folder = folder
        for graph in _with_subgraphs(onnx.shape_inference.infer_shapes(model).graph):
            self._add(graph)
        self.inputs: dict[str, Shape] = {}
        for value in model.graph.input:
            if value.name not in self.constants:
                self.inputs[value.name] = self.shapes.get(value.name, ())
        self.min_sizes = _min_sizes(self.inputs, profile or {})

    def _add(self, graph: "onnx.GraphProto") -> None:
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self.types[value.name] = _type_name(tensor.elem_type)
            if tensor.HasField("shape"):
                self.shapes[value.name] = tuple(_size(dim) for dim in tensor.shape.dim)
        for constant in graph.initializer:
            self._add_constant(constant.name, constant)
        for node in graph.node:
            self.nodes.append(node)
            for output in node.output:
                self.producers[output] = node
            value_of_node = _constant_value(node)
            if value_of_node is not None:
                self._add_constant(node.output[0], value_of_node)

    def _add_constant(self, name: str, tensor: "onnx.TensorProto") -> None:
        self.constants[name] = tensor
        self.types[name] = _type_name(tensor.data_type)
        self.shapes[name] = tuple(tensor.dims)

    def constant(self, name: str) -> "onnx.TensorProto | None":
        """The constant that a tensor is, or is cast from."""
        while name in self.producers and self.producers[name].op_type in ("Cast", "Identity"):
            name = self.producers[name].input[0]
        return self.constants.get(name)

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is a constant, or the codes of one that the graph quantises."""
        producer = self.producers.get(name)
        if producer is not None and producer.op_type == "QuantizeLinear":
            name = producer.input[0]
        return self.constant(name) is not None

    def values(self, tensor: "onnx.TensorProto") -> np.ndarray:
        """The values of a constant, mapped if they are in another file."""
        return read_weight(tensor, self._folder)

    def is_zero(self, tensor: "onnx.TensorProto") -> bool:
        """Whether a constant holds zeros only; INT4 in another file is not unpacked for that."""
        place = find_place(tensor)
        values = self.values(tensor) if place is None else read_bytes(place, self._folder)
        return not np.any(values)


def _with_subgraphs(graph: "onnx.GraphProto") -> Iterator["onnx.GraphProto"]:
    """A graph, and the bodies of its loops and branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _with_subgraphs(attribute.g)


def _min_sizes(inputs: Mapping[str, Shape], profile: Mapping[str, ShapeRange]) -> dict[str, int]:
    """The min of each dynamic dimension that a profile bounds."""
    sizes = {}
    for name, shape in inputs.items():
        if name in profile:
            for size, min_size in zip(shape, profile[name].min):
                if isinstance(size, str):
                    sizes[size] = min_size
    return sizes


def _type_name(number: int) -> str:
    import onnx

    return onnx.TensorProto.DataType.Name(number)


def _size(dim: "onnx.TensorShapeProto.Dimension") -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


# --- nodes ---


def _constant_value(node: "onnx.NodeProto") -> "onnx.TensorProto | None":
    """The value of a Constant node; None for strings and sparse tensors."""
    import onnx

    if node.op_type != "Constant":
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in DTYPES:
            value = onnx.helper.get_attribute_value(attribute)
            return onnx.numpy_helper.from_array(np.array(value, DTYPES[attribute.name]))
    return None


def node_name(node: "onnx.NodeProto") -> str:
    """The name of a node; of one without a name its operator and first output."""
    return node.name or f"{node.op_type} to {node.output[0]!r}"


def node_attribute(node: "onnx.NodeProto", name: str, default: int) -> int:
    """An attribute that is an integer."""
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute.i
    return default


def node_input(node: "onnx.NodeProto", index: int) -> str:
    """The name of an input; "" if it is left out."""
    return node.input[index] if index < len(node.input) else ""
