"""The options of an export, of the command and of Python. No heavy package is imported here."""

from dataclasses import dataclass, field

from tiny_align.runtime.checks import RANGES
from tiny_align.runtime.commands.options import option

BLOCKS = (32, 64, 128)  # weights along the input that share a scale; the first is the default
ROUNDINGS = ("nearest", "gptq")
ALL_POSITIONS = int(RANGES["max_context"].max)  # more than any LLM has


def positions(text: str) -> int:
    """A number of positions, or "max"."""
    return ALL_POSITIONS if text == "max" else int(text)


@dataclass(frozen=True)
class ExportOptions:
    """What goes into a bundle; paths are local folders, hub ids or, of an LLM, GGUF files."""

    encoder: str = field(
        metadata=option("folder or hub id of the ASR encoder: wav2vec2, Whisper, ...")
    )
    llm: str = field(metadata=option("folder, hub id or .gguf file of the LLM"))
    encoder_precision: str = field(
        default="fp32",
        metadata=option(
            "precision of the encoder's weights and, on ONNX Runtime, its products: int8 is faster "
            "on a CPU, its cost is in the manifest (default: fp32)",
            choices=("fp32", "int8"),
        ),
    )
    encoder_layers: tuple[int, ...] = field(
        default=(-1,),
        metadata=option(
            "hidden states that make the features, the first of which the shortcut reads; -1: the "
            "last layer's (default: -1)",
            metavar="N",
        ),
    )
    sentences: str | None = field(
        default=None,
        metadata=option(
            "text file of sentences, one per line, that a user may be asked to read, and may say",
            metavar="FILE",
        ),
    )
    chat_template: str | None = field(
        default=None,
        metadata=option(
            "one of the LLM's named chat templates, or a jinja file (default: its default, or the "
            "only fitting one)",
            metavar="NAME|FILE",
        ),
    )
    projector: str | None = field(
        default=None,
        metadata=option(
            "safetensors file of a trained projector (default: an untrained one)", metavar="FILE"
        ),
    )
    precision: str = field(
        default="int4",
        metadata=option(
            "precision of the LLM's weights: int4 (default; the matrices that cost most are int8), "
            "int8, fp16 or fp32"
        ),
    )
    head_precision: str | None = field(
        default=None,
        metadata=option(
            "precision of the LLM's output layer (default: int8 with int4, else the same)"
        ),
    )
    block_size: int = field(
        default=BLOCKS[0],
        metadata=option(
            f"weights in integers that share a scale (default: {BLOCKS[0]})", metavar="N"
        ),
    )
    max_bits: float = field(
        default=6.25,
        metadata=option(
            "bits of a weight in the layers, on average, up to which int4 gives matrices int8; 0: "
            "to none (default: 6.25)",
            metavar="N",
        ),
    )
    rounding: str = field(
        default="nearest",
        metadata=option(
            "how weights become integers: nearest (default), or gptq, which is better and takes "
            "minutes more",
            choices=ROUNDINGS,
        ),
    )
    name: str = field(
        default="bundle", metadata=option("the bundle's name (default: the folder's)")
    )
    instruction: str | None = field(
        default=None,
        metadata=option(
            "what the LLM does with the speech, unless a command says otherwise (default: the "
            "system text of its own chat template, or none)",
            metavar="TEXT",
        ),
    )
    repeat_instruction: str = "Repeat what the user says."
    max_context: int = field(
        default=2048,
        metadata=option(
            "maximum number of positions of prompt and answer together, or max: all that the LLM "
            "has (default: 2048, or the LLM's own if fewer; --max-context is the older name)",
            metavar="N|max",
            flag="--context",
            aliases=("--max-context",),
            parse=positions,
        ),
    )
    soft_tokens: int | None = field(
        default=None,
        metadata=option(
            "pool speech to N soft tokens, as the paper does (default: its length decides)",
            metavar="N",
        ),
    )
    merge_cosine: float | None = 0.85  # for a projector that pools, see runtime/readout.py
    window_s: float = field(
        default=3.84,
        metadata=option(
            "encode speech while it is spoken, in windows of S seconds; 0: as a whole (default: "
            "3.84)",
            metavar="S",
        ),
    )
    seed: int = 0  # of an untrained projector
