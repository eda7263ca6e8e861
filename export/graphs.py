"""PyTorch modules -> ONNX graphs with the bundle's names, in FP32; encoders.py and llms.py use it.

Transformers models go through transformers' OnnxExporter. Graphs are plain ONNX (opset 21, batch 1), so that ONNX
Runtime and TensorRT take the same file; what is static is written as a number. No quantisation here.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir
import torch

from tiny_align.runtime.bundle.manifest import GraphSpec, TensorSpec

OPSET = 21
INLINE_BYTES = 128  # shapes and scalars stay in the graph: shape inference reads them
EXAMPLE_FRAMES = 217  # a size that no other dimension has


@dataclass(frozen=True)
class Graph:
    """An exported program and the names and shapes its file is to have."""

    program: onnx_ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def save(self, path: Path) -> GraphSpec:
        """Write the graph and, beside it, its weights as external data; the names are the specification's."""
        _rename(self.program, self.inputs, self.outputs)
        onnx_ir.save(
            self.program,
            str(path),
            external_data=f"{path.name}.data",
            size_threshold_bytes=INLINE_BYTES,
        )
        model = onnx.load(str(path), load_external_data=False)
        for value, spec in zip(
            [*model.graph.input, *model.graph.output], [*self.inputs, *self.outputs]
        ):
            _set_shape(value, spec.shape)
        _normalise_by_channel(model)
        _strip_traces(model)
        del model.graph.value_info[
            :
        ]  # the exporter's guesses at inner shapes, some static ones as symbols
        onnx.save(model, str(path))
        return GraphSpec(path.name, "fp32", self.inputs, self.outputs, quantised_activations="none")


def _normalise_by_channel(model: onnx.ModelProto) -> None:
    """A GroupNormalization of each channel by itself is an InstanceNormalization: ONNX Runtime has a kernel for it."""
    sizes = {t.name: list(t.dims) for t in model.graph.initializer}
    for node in model.graph.node:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "GroupNormalization" and sizes.get(node.input[1]) == [
            values["num_groups"]
        ]:
            made = onnx.helper.make_node(
                "InstanceNormalization",
                node.input,
                node.output,
                node.name,
                epsilon=values["epsilon"],
            )
            node.CopyFrom(made)


def _strip_traces(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes on every node (stack traces, module paths): half of a small graph's size."""
    for part in (
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.input,
        *model.graph.output,
        model.graph,
    ):
        del part.metadata_props[:]
        part.doc_string = ""


def _rename(program: onnx_ir.Model, inputs, outputs) -> None:
    for values, specs in ((program.graph.inputs, inputs), (program.graph.outputs, outputs)):
        if len(values) != len(specs):
            raise RuntimeError(
                f"the graph has {[v.name for v in values]}, expected were {[s.name for s in specs]}"
            )
        for value, spec in zip(values, specs):
            value.name = spec.name


def _set_shape(value: onnx.ValueInfoProto, shape: tuple[int | str, ...]) -> None:
    dims = value.type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        if isinstance(size, str):
            dim.dim_param = size
        else:
            dim.dim_value = size


def export_program(
    model,
    inputs: dict,
    dynamic: bool = True,
    dynamic_shapes: dict | None = None,
    ort_fusions: str | None = None,
) -> onnx_ir.Model:
    """A transformers model, or a module with its `config`, as ONNX.

    Args:
        dynamic: whether any dimension is; without `dynamic_shapes` (as torch.export takes them) all are.
        ort_fusions: the ONNX Runtime provider whose own operators are wanted, "cpu" or "cuda"; None: plain ONNX.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    options = {"dynamic": dynamic, "dynamic_shapes": dynamic_shapes, "ort_fusions": ort_fusions}
    config = OnnxConfig(opset_version=OPSET, **options)
    return OnnxExporter().export(model, inputs, config=config).program


def projector_graph(projector) -> Graph:
    """features (1, features, Da) -> soft_tokens (1, T, D), or (1, moments, D + 1) where nothing is pooled."""
    config = projector.config
    example = torch.randn(1, EXAMPLE_FRAMES, config.feature_size)
    shapes = {"features": {1: torch.export.Dim("n", min=2, max=4096)}}
    program = torch.onnx.export(
        projector,
        (),
        kwargs={"features": example},
        dynamic_shapes=shapes,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    ).model
    inputs = (TensorSpec("features", "float32", (1, "features", config.feature_size)),)
    outputs = (
        TensorSpec(
            "soft_tokens", "float32", (1, config.soft_tokens or "moments", config.output_size)
        ),
    )
    return Graph(program, inputs, outputs)
