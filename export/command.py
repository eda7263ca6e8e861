"""`tiny-align export`: encoder, projector and LLM from transformers' models into a bundle."""

import argparse
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from tiny_align.export.options import ExportOptions
from tiny_align.runtime.commands.options import add_options, read_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `run` reads; the dispatcher adds `--json`."""
    add_options(parser, ExportOptions)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the new bundle"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export, and report the precision and parity of the graphs and the size of the bundle."""
    from tiny_align.export.bundle import export_bundle

    options = read_options(args, ExportOptions)
    if args.name is None:
        options = dataclasses.replace(options, name=args.out.name)
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        manifest = export_bundle(options, args.out)
    graphs = {}
    for name, graph in manifest.graphs.items():
        graphs[name] = {"precision": graph.precision, "parity": graph.parity}
    size = sum((args.out / file).stat().st_size for file in manifest.files)
    return {"path": str(args.out), "bytes": size, "graphs": graphs}
