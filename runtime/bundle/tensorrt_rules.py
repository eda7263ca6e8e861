"""What TensorRT's ONNX parser and builder refuse, found without TensorRT.

TensorRT-RTX, which builds engines on machines without a GPU, takes graphs that the TensorRT of a
board refuses. `violations` finds them: export asks it after writing a graph, build-engines before
building one.

A graph that breaks no rule may still fail on a device: what depends on memory or kernels, and
restrictions of operators that no exported graph has, are not checked. The oldest version that we
support decides unless a version is given: a bundle is exported without knowing its board.

Sources, as the rules below name them:

    operators.md        github.com/onnx/onnx-tensorrt, docs/operators.md, 10.1-GA and 10.15;
                        as data in tensorrt_operators.json
    importer            the same repository, onnxOpImporters.cpp, 10.1-GA
    NvInfer.h           github.com/NVIDIA/TensorRT, include/NvInfer.h, release/10.3 and 10.16
    NvInferRuntime.h    beside it
    TopK.html           docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/TopK.html
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_align.runtime.bundle import tensorrt_quantisation as quantisation
from tiny_align.runtime.bundle.profile import ShapeRange
from tiny_align.runtime.bundle.tensorrt_graph import (
    OLDEST,
    Mismatch,
    RuleGraph,
    node_attribute,
    node_input,
    node_name,
)

if TYPE_CHECKING:
    import onnx

CONSTANT_INPUTS = {  # operator -> the input that must be a constant, if it is there
    "CumSum": 1,
    "Dropout": 2,
    "OneHot": 1,
    "ReduceL1": 1,
    "ReduceL2": 1,
    "ReduceLogSum": 1,
    "ReduceLogSumExp": 1,
    "ReduceMax": 1,
    "ReduceMean": 1,
    "ReduceMin": 1,
    "ReduceProd": 1,
    "ReduceSum": 1,
    "ReduceSumSquare": 1,
    "Slice": 3,
    "Squeeze": 1,
    "Unsqueeze": 1,
}
MAX_TOPK = 3839


@dataclass(frozen=True)
class Violation:
    """A node that TensorRT refuses, and why."""

    node: str
    rule: str  # the name of one of RULES, or PROFILE
    expected: str
    found: str

    def __str__(self) -> str:
        return (
            f"{self.node} breaks the rule {self.rule!r}: expected {self.expected}, got {self.found}"
        )


def violations(
    model: "onnx.ModelProto",
    folder: Path,
    profile: Mapping[str, ShapeRange] | None = None,
    version: str = OLDEST,
) -> list[Violation]:
    """The nodes of a graph that break a rule, in the order of the graph.

    Of the weights in other files only scales and zero points are read.

    Args:
        model: as `onnx_weights.load_graph` gives it.
        folder: of the ONNX file.
        profile: the shapes that an engine is built for, as `graph_profile` gives them.
        version: of TensorRT; rules that depend on it are those of the newest table up to it.
    """
    graph = RuleGraph(model, folder, version, profile)
    found = []
    if profile is not None:
        for name, bounds in _profile_mismatches(graph, profile):
            found.append(Violation(f"input {name!r}", PROFILE, *bounds))
    for node in graph.nodes:
        for rule in RULES:
            if rule.operators and node.op_type not in rule.operators:
                continue
            mismatch = rule.check(node, graph)
            if mismatch is not None:
                found.append(Violation(node_name(node), rule.name, *mismatch))
    return found


def count_by_rule(found: list[Violation]) -> dict[str, int]:
    """How many nodes break each rule, rules that none breaks left out."""
    counts: dict[str, int] = {}
    for violation in found:
        counts[violation.rule] = counts.get(violation.rule, 0) + 1
    return counts


def summary(found: list[Violation]) -> str:
    """The first violation of each rule, and how many more nodes break it."""
    parts = []
    for rule, count in count_by_rule(found).items():
        first = next(violation for violation in found if violation.rule == rule)
        more = f" ({count - 1} more nodes break it)" if count > 1 else ""
        parts.append(f"{first}{more}")
    return "; ".join(parts)


# --- operators ---


def _operator(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """operators.md: every operator but ONNX's own needs a plugin."""
    if node.domain in ("", "ai.onnx") and graph.table.operators.get(node.op_type):
        return None
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return "an operator that TensorRT's parser knows", name


def _data_type(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """operators.md: the types of an operator's data."""
    accepted = graph.table.operators.get(node.op_type)
    if not accepted:
        return None  # _operator tells
    tensors = [[*node.input, *node.output][0]]
    if node.op_type == "Cast":
        tensors.append(node.output[0])
    elif node.op_type == "ConstantOfShape":
        tensors = [node.output[0]]
    elif node.op_type == "Where":
        tensors = [node.input[1]]
    for tensor in tensors:
        if graph.types.get(tensor, accepted[0]) not in accepted:
            return f"data of {' or '.join(accepted)}", graph.types[tensor]
    return None


def _first_output(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """operators.md: only the first output of these is supported."""
    others = [name for name in node.output[1:] if name]
    if not others:
        return None
    return "the first output only", f"{len(others)} more"


def _constant_input(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """operators.md: axes and the like must be initializers."""
    name = node_input(node, CONSTANT_INPUTS[node.op_type])
    if not name or name in graph.constants:
        return None
    return f"a constant as input {CONSTANT_INPUTS[node.op_type]}", f"the computed {name!r}"


# --- TopK ---


def _topk_sorted(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """operators.md: "`sorted` must be 1"."""
    if node_attribute(node, "sorted", 1) == 1:
        return None
    return "sorted=1", "sorted=0"


def _topk_axis(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """NvInfer.h, addTopK: "it must be one of the last four dimensions"."""
    axis = node_attribute(node, "axis", -1)
    shape = graph.shapes.get(node.input[0])
    if shape is None:
        return None
    from_the_end = -axis if axis < 0 else len(shape) - axis
    if from_the_end <= 4:
        return None
    return "one of the last four dimensions", f"axis {axis} of {len(shape)}"


def _topk_number(node: "onnx.NodeProto", graph: RuleGraph) -> Mismatch | None:
    """operators.md: "less than 3840"; TopK.html: no more than the dimension, at its min."""
    tensor = graph.constant(node_input(node, 1))
    if tensor is None:
        return None  # a computed K is taken since 8.6
    number = int(graph.values(tensor).ravel()[0])
    allowed = MAX_TOPK
    shape = graph.shapes.get(node.input[0])
    if shape is not None:
        size = shape[node_attribute(node, "axis", -1)]
        min_size = graph.min_sizes.get(size) if isinstance(size, str) else size
        if min_size is not None:
            allowed = min(allowed, min_size)
    if number <= allowed:
        return None
    return f"K up to {allowed}", str(number)


# --- the profile ---


def _profile_mismatches(
    graph: RuleGraph, profile: Mapping[str, ShapeRange]
) -> Iterator[tuple[str, Mismatch]]:
    """Inputs whose shapes break IOptimizationProfile::setDimensions (NvInferRuntime.h)."""
    for name, shape in graph.inputs.items():
        is_static = all(isinstance(size, int) for size in shape)
        if name not in profile:
            if not is_static:
                yield name, ("its min, opt and max shape", "none")
            continue
        bounds = profile[name]
        lengths = {len(bounds.min), len(bounds.opt), len(bounds.max)}
        if lengths != {len(shape)}:
            yield name, (f"shapes of {len(shape)} dimensions", str(sorted(lengths)))
            continue
        for size, min_size, opt, max_size in zip(shape, *bounds):
            found = f"{min_size}, {opt}, {max_size}"
            if isinstance(size, int) and {min_size, opt, max_size} != {size}:
                yield name, (f"min = opt = max = {size}", found)
            elif not 0 <= min_size <= opt <= max_size:
                yield name, ("0 <= min <= opt <= max", found)
    for name in profile:
        if name not in graph.inputs:
            yield name, ("an input of the graph", "a name that it does not have")


# --- all rules ---


@dataclass(frozen=True)
class Rule:
    """A check of every node with one of these operators."""

    name: str
    operators: tuple[str, ...]  # none: all
    check: Callable[["onnx.NodeProto", RuleGraph], Mismatch | None]


QUANTISE = ("QuantizeLinear", "DequantizeLinear")
PROFILE = "profile bounds"
RULES = (
    Rule("operator", (), _operator),
    Rule("data type", (), _data_type),
    Rule("first output", ("LayerNormalization", "MaxPool"), _first_output),
    Rule("constant input", tuple(CONSTANT_INPUTS), _constant_input),
    Rule("constant scale", QUANTISE, quantisation.constant_scale),
    Rule("positive scale", QUANTISE, quantisation.positive_scale),
    Rule("zero point", QUANTISE, quantisation.zero_point),
    Rule("type of codes", ("QuantizeLinear",), quantisation.code_type),
    Rule("shape of scales", QUANTISE, quantisation.scale_shape),
    Rule("written axis", QUANTISE, quantisation.written_axis),
    Rule("channels of weights", QUANTISE, quantisation.channel_of_weight),
    Rule("type in blocks", QUANTISE, quantisation.block_type),
    Rule("blocks of weights", QUANTISE, quantisation.block_of_weight),
    Rule("whole blocks", QUANTISE, quantisation.whole_blocks),
    Rule("even rows of INT4", QUANTISE, quantisation.even_rows),
    Rule("sorted TopK", ("TopK",), _topk_sorted),
    Rule("axis of TopK", ("TopK",), _topk_axis),
    Rule("K of TopK", ("TopK",), _topk_number),
)
