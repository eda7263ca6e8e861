"""`tiny-align export`: encoder, projector and LLM from transformers' models into a bundle."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path

from tiny_align.export.options import BLOCKS, ExportOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; those with a default get it from ExportOptions, see `run`."""
    parser.add_argument(
        "--encoder",
        required=True,
        help="folder or hub id of the ASR encoder: wav2vec2, Whisper, ...",
    )
    parser.add_argument(
        "--encoder-layers",
        type=int,
        nargs="+",
        help="layers whose outputs are the features; the shortcut reads the first (default: last)",
    )
    parser.add_argument(
        "--encoder-precision",
        choices=("fp32", "int8"),
        help="precision of the encoder: int8 is faster on a CPU, its cost is in the manifest "
        f"(default: {ExportOptions.encoder_precision})",
    )
    parser.add_argument("--llm", required=True, help="folder or hub id of the LLM")
    parser.add_argument(
        "--chat-template",
        metavar="NAME|FILE",
        help="one of the LLM's named chat templates, or a jinja file (default: its default, or the "
        "only fitting one)",
    )
    parser.add_argument(
        "--sentences", help="text file of sentences that a user may be asked to read, and may say"
    )
    parser.add_argument(
        "--projector", help="safetensors file of a trained projector (default: an untrained one)"
    )
    parser.add_argument(
        "--soft-tokens",
        type=int,
        help="pool speech to so many soft tokens, as the paper does (default: its length decides)",
    )
    parser.add_argument(
        "--window-s",
        type=float,
        help="encode speech in windows of so many seconds while it is spoken; 0: as a whole "
        f"(default: {ExportOptions.window_s})",
    )
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    parser.add_argument(
        "--precision",
        help="precision of the LLM's weights: int4, int8, fp16 or fp32 "
        f"(default: {ExportOptions.precision})",
    )
    parser.add_argument(
        "--head-precision",
        help="precision of the LLM's output layer (default: int8 with int4, else the same)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        help=f"weights in integers that share a scale (default: {BLOCKS[0]})",
    )
    parser.add_argument("--name", help="the bundle's name (default: the folder's)")
    parser.add_argument(
        "--max-context",
        type=int,
        help="maximum number of positions of prompt and answer together "
        f"(default: {ExportOptions.max_context})",
    )


def run(args: argparse.Namespace) -> dict:
    """Export, and report the graphs' precision and parity and the size of the bundle."""
    from tiny_align.export.bundle import export_bundle

    values = {"name": args.out.name}
    for field in dataclasses.fields(ExportOptions):
        value = getattr(args, field.name, None)
        if value is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        manifest = export_bundle(ExportOptions(**values), args.out)
    graphs = {}
    for name, graph in manifest.graphs.items():
        graphs[name] = {"precision": graph.precision, "parity": graph.parity}
    size = sum((args.out / file).stat().st_size for file in manifest.files)
    return {"path": str(args.out), "bytes": size, "graphs": graphs}
