"""The projector of a bundle: its weights, its graph, and where the graph has the weights.

The manifest records where each weight is in the graph's data file, because a user's projector is
the same graph with other weights.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from onnx import TensorProto
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tiny_align.align.model.projector import BridgeFormer, build_projector
from tiny_align.export.encoders import LayeredEncoder
from tiny_align.export.graphs import OPSET, Graph
from tiny_align.export.options import ExportOptions
from tiny_align.export.pretrained import refuse_not_finite
from tiny_align.runtime.bundle.manifest import TensorSpec, WeightSpec
from tiny_align.runtime.bundle.onnx_weights import find_place, load_graph, read_weight
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLE_FEATURES = 217  # a size that no other dimension has
UNTRAINED = "Leave --projector out and train one with `tiny-align align --general`"


def make_projector(
    encoder: LayeredEncoder, llm: "PreTrainedModel", options: ExportOptions
) -> BridgeFormer:
    """A projector between the two, with the weights of `options.projector` or random ones.

    Raises:
        TinyAlignError: a file that is no projector for these two.
    """
    torch.manual_seed(options.seed)
    projector = build_projector(
        {
            "kind": "bridgeformer",
            "feature_size": encoder.feature_size,
            "embedding_size": llm.config.hidden_size,
            "soft_tokens": options.soft_tokens,
            "shortcut_size": encoder.config.hidden_size,
        }
    ).eval()
    if options.projector:
        projector.load_state_dict(_fitting_weights(options.projector, projector.state_dict()))
        return projector
    # No two parameters may be equal: `find_weights` tells them apart by their values.
    for value in projector.parameters():
        value.data += torch.randn_like(value) * 1e-4
    return projector


def _fitting_weights(path: str, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which must have the names and sizes of `expected`."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TinyAlignError(f"{path} is no projector for this encoder and LLM: {error}") from error
    for name in sorted(expected.keys() | weights.keys()):
        shape = list(weights[name].shape) if name in weights else "absent"
        expected_shape = list(expected[name].shape) if name in expected else "absent"
        if shape != expected_shape:
            raise TinyAlignError(
                f"{path} is no projector for this encoder and LLM: expected its {name} to be "
                f"{expected_shape}, got {shape}. {UNTRAINED}"
            )
    refuse_not_finite(path, weights)
    return weights


def check_binding(path: str, embeddings_sha256: str) -> None:
    """Compare the embedding table that a projector's file was trained for with the bundle's.

    Sizes alone do not tell two LLMs apart. An older file names no table: it is taken.

    Raises:
        TinyAlignError: it was trained for another LLM.
    """
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    bound_to = metadata.get("embeddings_sha256", embeddings_sha256)
    if bound_to != embeddings_sha256:
        raise TinyAlignError(
            f"{path} was trained for another LLM: expected embeddings {embeddings_sha256[:12]}, "
            f"got {bound_to[:12]}. {UNTRAINED}"
        )


def projector_graph(projector: BridgeFormer) -> Graph:
    """features (1, features, Da) -> soft_tokens (1, T, D); without pooling (1, moments, D + 1)."""
    config = projector.config
    program = torch.onnx.export(
        projector,
        (),
        kwargs={"features": torch.randn(1, EXAMPLE_FEATURES, config.feature_size)},
        dynamic_shapes={"features": {1: torch.export.Dim("n", min=2, max=4096)}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    rows = config.soft_tokens or "moments"
    return Graph(
        program.model,
        inputs=(TensorSpec("features", "float32", (1, "features", config.feature_size)),),
        outputs=(TensorSpec("soft_tokens", "float32", (1, rows, config.output_size)),),
    )


def find_weights(graph: Path, projector: BridgeFormer) -> tuple[WeightSpec, ...]:
    """Where each projector parameter is in the graph's data file, found by its values.

    Raises:
        TinyAlignError: the exporter has changed or merged a parameter, so that it could not be
            replaced.
    """
    stored: list[tuple[int, np.ndarray]] = []  # offset and values
    for tensor in load_graph(graph).graph.initializer:
        place = find_place(tensor)  # None: a shape or a scalar, in the graph itself
        if place is not None and tensor.data_type == TensorProto.FLOAT:
            stored.append((place.offset, read_weight(tensor, graph.parent)))
    parameters = projector.state_dict().items()
    return tuple(_find(name, value.numpy(), stored) for name, value in parameters)


def _find(name: str, value: np.ndarray, stored: list[tuple[int, np.ndarray]]) -> WeightSpec:
    for offset, array in stored:
        if np.array_equal(array, value):
            return WeightSpec(name, offset, array.shape, transposed=False)
        if np.array_equal(array, value.T):
            return WeightSpec(name, offset, array.shape, transposed=True)
    raise TinyAlignError(
        f"the projector's {name} is not in the exported graph as it is: its weights could not be "
        "replaced. Report the versions of torch and onnxscript"
    )
