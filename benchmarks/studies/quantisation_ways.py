"""The forms of an LLM's weights that the study of quantisation compares."""

import contextlib
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tiny_align.export.llm_files import layer_weights
from tiny_align.export.quantise import Layout, quantise
from tiny_align.export.sensitivity import Sensitivity
from tiny_align.export.weight_forms import Form, LlmWeights, Rounding, forms


@dataclass(frozen=True)
class Way:
    """One way to store the weights."""

    precision: str
    block: int | None = None
    head: str = "int8"  # the output layer's precision
    algorithm: str = ""  # ONNX Runtime's, or "" for export's own
    max_bits: float = 0  # see export's option; needs sensitivities
    rounding: str = "nearest"  # or "gptq", which needs sensitivities with Hessians

    @property
    def needs_sensitivities(self) -> bool:
        return self.max_bits > 0 or self.rounding == "gptq"

    def write(
        self,
        source: Path,
        target: Path,
        layout: Layout = "onnxruntime",
        sensitivities: dict[str, Sensitivity] | None = None,
    ) -> None:
        """Quantise a graph; both have external data."""
        layers, head = forms(self.precision, self.head, self.block or 32)
        if not self.algorithm:
            rounding = Rounding(self.rounding, sensitivities or {}, self.max_bits)
            weights = LlmWeights(layers, head, rounding)
            weights.choose_forms(layer_weights(source))
            quantise(source, target, weights, layout)
            return
        with tempfile.TemporaryDirectory() as folder:
            # the library then finds no weight in the output layer
            with_head = Path(folder) / "head.onnx"
            quantise(source, with_head, LlmWeights(Form(32), head), layout)
            quantise_by_library(self.algorithm, self.block, with_head, target)


WAYS = [
    Way("fp32", head="fp32"),
    Way("fp16", head="fp16"),
    Way("int8", 32),
    Way("int8", 128),
    Way("int4", 32, head="fp32"),
    Way("int4", 32),
    Way("int4", 32, max_bits=6.25),  # export's default
    Way("int4", 32, max_bits=6.25, rounding="gptq"),
    Way("int4", 32, rounding="gptq"),
    Way("int4", 32, head="int4"),
    Way("int4", 64),
    Way("int4", 128),
    Way("int4", 128, head="int4"),
    Way("int4", 32, algorithm="asymmetric"),
    Way("int4", 128, algorithm="asymmetric"),
    Way("int4", 32, algorithm="HQQ"),
    Way("int4", 128, algorithm="HQQ"),
    Way("int4", 32, algorithm="k-quant"),
    Way("int4", 128, algorithm="k-quant"),
]


def quantise_by_library(algorithm: str, block: int, source: Path, target: Path) -> None:
    """INT4 by ONNX Runtime's quantisers with any zero point, which TensorRT does not take."""
    import onnx
    from onnxruntime.quantization import QuantFormat

    library = load_library()
    if algorithm == "asymmetric":
        config = library.DefaultWeightOnlyQuantConfig(block, False, quant_format=QuantFormat.QDQ)
    elif algorithm == "HQQ":
        config = library.HQQWeightOnlyQuantConfig(block)
    else:
        config = library.KQuantWeightOnlyQuantConfig()
    quantizer = library.MatMulNBitsQuantizer(
        onnx.load(str(source)),
        block_size=block,
        is_symmetric=False,
        accuracy_level=4,
        algo_config=config,
    )
    with contextlib.redirect_stdout(sys.stderr):  # its progress
        quantizer.process()
    model = quantizer.model.model
    if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(
        model,
        str(target),
        save_as_external_data=True,
        location=f"{target.name}.data",
        size_threshold=256,
    )


def load_library() -> ModuleType:
    """ONNX Runtime's module of quantisers, which would log every weight."""
    import torch  # noqa: F401 - HQQ's; a second import costs nothing
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("neural_compressor").setLevel(logging.WARNING)
    return matmul_nbits_quantizer


def graph_bytes(path: Path) -> int:
    """A graph's size with its external data."""
    return path.stat().st_size + path.with_name(f"{path.name}.data").stat().st_size
