"""INT4 weights for the LLM: symmetric blocks of 32 along the input, as standard ONNX (opset 21 DequantizeLinear).

That form is read by ONNX Runtime, which fuses it into MatMulNBits when it loads, and by TensorRT; the encoder and the
projector stay as they are (a 4-bit projector makes an audio LLM erratic).
"""

import logging
from pathlib import Path

BLOCK = 32


def quantise_int4(source: Path, target: Path) -> None:
    """Write `target` (+ .data): `source` with every large MatMul weight in INT4; the output layer stays FP32."""
    import onnx
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model = onnx.load(str(source))
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, quant_format=QuantFormat.QDQ)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config, nodes_to_exclude=_output_layer(model))
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer.process()
    onnx.save(
        quantizer.model.model,
        str(target),
        save_as_external_data=True,
        location=f"{target.name}.data",
        size_threshold=256,
    )
    target.with_name(f"{target.name}.data").chmod(0o644)  # onnx makes it readable by its owner only


def _output_layer(model) -> list[str]:
    """The MatMul that makes the logits: it shares the embedding table and decides between near tokens."""
    made_by = {output: node for node in model.graph.node for output in node.output}
    name = next(o.name for o in model.graph.output if o.name == "logits")
    while made_by[name].op_type != "MatMul":  # back through a soft cap
        name = next(i for i in made_by[name].input if i in made_by and made_by[i].op_type != "Constant")
    return [made_by[name].name]
