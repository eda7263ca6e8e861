"""`tiny-align export`: encoder, projector and LLM from transformers' models into a bundle."""

import contextlib
import sys
from pathlib import Path


def add_arguments(parser) -> None:
    parser.add_argument(
        "--encoder",
        required=True,
        help="folder or hub id of the ASR encoder: wav2vec2, Whisper, ...",
    )
    parser.add_argument(
        "--encoder-layers",
        type=int,
        nargs="+",
        default=[-1],
        help="layers whose outputs are the features, the shortcut reads the first (default: last)",
    )
    parser.add_argument(
        "--encoder-precision",
        choices=("fp32", "int8"),
        default="fp32",
        help="of the encoder: int8 is faster on a CPU, its cost is in the manifest (default: fp32)",
    )
    parser.add_argument("--llm", required=True, help="folder or hub id of the LLM")
    parser.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="one of the LLM's named chat templates, or a jinja file (default: its default, or the only fitting one)",
    )
    parser.add_argument(
        "--sentences", help="text file: what a person may be asked to read, and may say"
    )
    parser.add_argument(
        "--projector", help="safetensors file of a trained projector (default: an untrained one)"
    )
    parser.add_argument(
        "--soft-tokens",
        type=int,
        help="pool to so many, as the paper does (default: as many as said)",
    )
    parser.add_argument(
        "--window-s",
        type=float,
        default=3.84,
        help="encode speech in windows of so many seconds, while it is spoken (default: 3.84; 0: as a whole)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    parser.add_argument(
        "--precision",
        default="int4",
        help="of the LLM's weights: int4 (default), int8, fp16 or fp32",
    )
    parser.add_argument(
        "--head-precision",
        help="of the LLM's output layer (default: int8 with int4, else the same)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=128,
        help="weights in integers that share a scale (default: 128)",
    )
    parser.add_argument("--name", help="the bundle's name (default: the folder's)")
    parser.add_argument(
        "--max-context", type=int, default=256, help="positions of prompt and answer together"
    )


def run(args) -> dict:
    from tiny_align.export.bundle import ExportOptions, export_bundle

    names = (
        "encoder",
        "encoder_layers",
        "encoder_precision",
        "llm",
        "projector",
        "precision",
        "head_precision",
    )
    names += ("block_size", "max_context", "soft_tokens", "sentences", "window_s", "chat_template")
    options = ExportOptions(
        **{n: getattr(args, n) for n in names},
        name=args.name or args.out.name,
    )
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        manifest = export_bundle(options, args.out)
    graphs = {n: {"precision": g.precision, "parity": g.parity} for n, g in manifest.graphs.items()}
    size = sum((args.out / f).stat().st_size for f in manifest.files)
    return {"path": str(args.out), "bytes": size, "graphs": graphs}
