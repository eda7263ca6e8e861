"""What exporting an LLM of full size takes: seconds, peak memory and bytes, with random weights of a named shape.

    python -m benchmarks.export_size [--json]

The LLM's part of `tiny-align export`: the FP32 graph, its comparison with PyTorch, the quantised graph and what that
costs. Llama-3.2-1B's shape needs 12 GB of memory and 7 GB of disk. Writes benchmarks/results/export_size.json; the last
line of stdout is the same document.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks.training_cost import SHAPES, build_llm
from tiny_align.runtime.files import write_json
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parent / "results" / "export_size.json"
COMMAND = "python -m benchmarks.export_size"


def export(shape: str, precision: str, threads: int) -> dict:
    """Build the LLM and export it to a folder that is removed; this process's peak memory counts both."""
    import torch

    from tiny_align.engines.build_one import peak_memory_bytes
    from tiny_align.export.bundle import ExportOptions, _write_llm

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        llm = build_llm(SHAPES[shape], torch.float32)
        start, size = time.perf_counter(), sum(p.nbytes for p in llm.parameters())
        _write_llm(Path(folder), llm, ExportOptions("", "", precision=precision), 256)
        seconds = time.perf_counter() - start
        written = sum(p.stat().st_size for p in Path(folder).iterdir())
    return {"seconds": seconds, "peak_bytes": peak_memory_bytes(), "fp32_bytes": size, "bytes": written}


def table(report: dict) -> str:
    """The report as the README's table."""
    lines = [
        "| LLM's shape | precision | FP32 | exported | seconds | peak memory | peak / FP32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["exports"]:
        sizes = " | ".join(f"{row[name] / 1e9:.2f} GB" for name in ("fp32_bytes", "bytes"))
        peak, ratio = row["peak_bytes"] / 1e9, row["peak_bytes"] / row["fp32_bytes"]
        lines.append(
            f"| {row['shape']} | {row['precision']} | {sizes} | {row['seconds']:.0f} | {peak:.1f} GB | {ratio:.1f} |"
        )
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        row = pool.apply(export, (args.shape, args.precision, args.threads))
    report = {"machine": describe(), "date": str(date.today()), "command": COMMAND}
    report["exports"] = [{"shape": args.shape, "precision": args.precision, **row}]
    write_json(args.out, report)
    print(table(report), file=sys.stderr if args.json else sys.stdout)
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
