"""`tiny-align export`: encoder, projector and LLM from transformers' models into a bundle."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_align.export.options import ExportOptions
from tiny_align.runtime.bundle.manifest import GraphSpec, Manifest
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

    "cache_bytes_per_position" is what a conversation takes with each position of the context.
    "tensorrt_violations" counts the nodes by the rule of TensorRT that they break.
    """
    from tiny_align.export.bundle import export_bundle, tensorrt_violations
    from tiny_align.export.messages import messages_to_log
    from tiny_align.export.progress import progress_bar
    from tiny_align.runtime.backends.budget import position_bytes
    from tiny_align.runtime.bundle.tensorrt_rules import count_by_rule

    options = read_options(args, ExportOptions)
    out = read_options(args, NewBundleOptions).out
    if args.name is None:
        options = dataclasses.replace(options, name=out.name)
    with messages_to_log() as screen, progress_bar(screen, quiet=args.json) as begin:
        manifest = export_bundle(options, out, begin)
    refused = tensorrt_violations(out, manifest)
    graphs = {}
    for name, graph in manifest.graphs.items():
        graphs[name] = {
            "precision": graph.precision,
            "parity": graph.parity,
            "tensorrt_violations": count_by_rule(refused.get(name, [])),
        }
    size = sum((out / file).stat().st_size for file in manifest.files)
    if not args.json:
        print(summary(out, manifest, size))
    return {
        "path": str(out),
        "bytes": size,
        "context": manifest.llm.max_context,
        "cache_bytes_per_position": position_bytes(manifest.graphs["llm"]),
        "graphs": graphs,
    }


# --- the table ---


def summary(folder: Path, manifest: Manifest, size: int) -> str:
    """A table of the graphs: form, bytes and how far each is from PyTorch.

    Args:
        size: of the bundle's files, in bytes.
    """
    from tiny_align.runtime.backends.budget import position_bytes

    rows = []
    for name, graph in manifest.graphs.items():
        cells = [name, graph.precision.upper(), f"{graph_bytes(folder, graph):,}"]
        rows.append([*cells, *_figures(graph.parity)])
    rows.append(["all files", "", f"{size:,}"])
    head = ["graph", "form", "bytes", "parity", "in this form"]
    context = manifest.llm.max_context
    position = position_bytes(manifest.graphs["llm"])
    return (
        f"{columns(head, rows)}\ncontext of {context:,} positions, each {position:,} bytes of a "
        f"conversation's KV cache: {context * position >> 20} MiB when it is full\n"
        f"bundle in {folder}"
    )


def graph_bytes(folder: Path, graph: GraphSpec) -> int:
    """Bytes of a graph's ONNX files, of every backend, and of their weights."""
    from tiny_align.runtime.bundle.onnx_weights import data_files, load_graph

    files: set[str] = set()
    for file in {graph.file, *(spec.file for spec in graph.backends.values())}:
        files |= {file, *data_files(load_graph(folder / file))}
    return sum((folder / file).stat().st_size for file in files)


def _figures(parity: dict[str, Any]) -> list[str]:
    """The worst figure in FP32, then those of the graph's own form; "" if there are none."""
    exact = ""
    if "max_diff_over_std" in parity:
        exact = f"{max(parity['max_diff_over_std'].values()):.1e}"
    in_form = []
    if "kl_to_pytorch" in parity:
        in_form.append(f"KL {parity['kl_to_pytorch']:.2g}")
        in_form.append(f"{parity['same_next_token']:.0%} same next token")
        in_form.append(f"{parity['bits_per_weight']:.2f} bits")
    if "int8_cosine_to_pytorch" in parity:
        in_form.append(f"cosine {min(parity['int8_cosine_to_pytorch'].values()):.5f}")
    return [exact, ", ".join(in_form)]


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns of equal width."""
    widths = [len(cell) for cell in head]
    for row in rows:
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], len(cell))
    lines = []
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
