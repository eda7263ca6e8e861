"""What goes into a bundle. No heavy package is imported, so that the command starts at once."""

from dataclasses import dataclass

BLOCKS = (128, 64, 32)  # weights along the input that share a scale; the first is the default


@dataclass(frozen=True)
class ExportOptions:
    """What goes into a bundle; paths are local folders or hub ids."""

    encoder: str
    llm: str

    # "fp32", or "int8": the weights, and on ONNX Runtime the products
    encoder_precision: str = "fp32"

    # Hidden states that make the features, the shortcut's first; -1: the last layer's
    encoder_layers: tuple[int, ...] = (-1,)

    # A text file: what a user may be asked to read and may say, a sentence per line
    sentences: str | None = None

    # The name of one of the LLM's, or a file; None: its default or only fitting one
    chat_template: str | None = None

    # A safetensors file; None: an untrained projector
    projector: str | None = None

    # Of the LLM's weights: see quantise.BITS
    precision: str = "int4"

    # Of its output layer; None: "int8" with "int4", else the layers'
    head_precision: str | None = None

    # Weights in integers that share a scale
    block_size: int = BLOCKS[0]

    name: str = "bundle"
    instruction: str = "Answer the user."
    repeat_instruction: str = "Repeat what the user says."

    # Positions of prompt and answer together
    max_context: int = 256

    # The number that the projector pools to; None: length follows the speech
    soft_tokens: int | None = None

    # For a projector that pools, see runtime/readout.py
    merge_cosine: float | None = 0.85

    # Seconds of the windows in which speech is encoded while it is spoken; 0: as a whole
    window_s: float = 3.84

    # Of an untrained projector
    seed: int = 0
