"""`tiny-align export`: encoder, projector and LLM from transformers' models into a bundle."""

import argparse
import contextlib
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_align.export.options import ExportOptions
from tiny_align.runtime.commands.options import add_options, option, read_options


@dataclass(frozen=True, kw_only=True)
class NewBundleOptions:
    out: Path = field(metadata=option("folder of the new bundle", metavar="DIR"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `run` reads; the dispatcher adds `--json`."""
    add_options(parser, ExportOptions)
    add_options(parser, NewBundleOptions)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export, and report the size of the bundle and each graph's precision and parity.

    "tensorrt_violations" counts the nodes by the rule of TensorRT that they break.
    """
    from tiny_align.export.bundle import export_bundle, tensorrt_violations
    from tiny_align.runtime.bundle.tensorrt_rules import count_by_rule

    options = read_options(args, ExportOptions)
    out = read_options(args, NewBundleOptions).out
    if args.name is None:
        options = dataclasses.replace(options, name=out.name)
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        manifest = export_bundle(options, out)
    refused = tensorrt_violations(out, manifest)
    graphs = {}
    for name, graph in manifest.graphs.items():
        graphs[name] = {
            "precision": graph.precision,
            "parity": graph.parity,
            "tensorrt_violations": count_by_rule(refused.get(name, [])),
        }
    size = sum((out / file).stat().st_size for file in manifest.files)
    return {"path": str(out), "bytes": size, "graphs": graphs}
