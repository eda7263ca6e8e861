"""Puts the reference bundle together from the trained weights: export, general projector, the
demo's voice.

python -m tiny_align.reference.build
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tiny_align.reference import corpus, projector, recordings

if TYPE_CHECKING:
    from tiny_align.export.options import ExportOptions
    from tiny_align.runtime.bundle.manifest import GraphSpec

ENCODER_LAYERS = (1, 3, 4, -1)  # low layers know more about a new voice


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reference",
        type=Path,
        default=Path("reference"),
        help="folder of weights, bundle and voice",
    )
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument(
        "--start", type=Path, help="a projector's weights to start from (default: random)"
    )
    parser.add_argument("--steps", type=int, default=4000, help="of the projector's training")
    parser.add_argument(
        "--llm-only",
        action="store_true",
        help="write the LLM's graphs anew; all other files of the bundle stay",
    )
    args = parser.parse_args(argv)
    from tiny_align.export.bundle import export_bundle
    from tiny_align.export.options import ExportOptions

    weights, bundle = args.reference / "weights", args.reference / "bundle"
    args.work.mkdir(parents=True, exist_ok=True)
    sentences = args.work / "sentences.txt"  # what a user may be asked to read
    sentences.write_text("".join(f"{s.text}\n" for s in corpus.sentences(600, 5)), encoding="utf-8")
    options = ExportOptions(
        encoder=str(weights / "encoder"),
        encoder_layers=ENCODER_LAYERS,
        llm=str(weights / "llm"),
        sentences=str(sentences),
        name="reference",
        max_context=256,
        instruction=corpus.ANSWER_INSTRUCTIONS[0],  # the LLM was trained on instructions
        projector=str(args.start) if args.start else None,
    )
    if args.llm_only:
        graph = replace_llm(bundle, options)
        print(json.dumps({"bundle": str(bundle), "parity": {"llm": graph.parity}}))
        return 0
    manifest = export_bundle(options, bundle)
    out = weights / "projector.safetensors"
    projector.main(
        [
            "--bundle",
            str(bundle),
            "--out",
            str(out),
            "--work",
            str(args.work),
            "--steps",
            str(args.steps),
        ]
    )
    recordings.main(["--out", str(args.reference / "voice")])
    print(
        json.dumps(
            {"bundle": str(bundle), "parity": {n: g.parity for n, g in manifest.graphs.items()}}
        )
    )
    return 0


def replace_llm(bundle: Path, options: "ExportOptions") -> "GraphSpec":
    """Write the LLM's graphs of a bundle anew; its other files stay as they are."""
    from tiny_align.export.bundle import load_sources
    from tiny_align.export.llm_files import write_llm
    from tiny_align.runtime.bundle.embeddings import EMBEDDINGS
    from tiny_align.runtime.bundle.manifest import read_manifest, write_manifest

    manifest = read_manifest(bundle)
    source = load_sources(options).llm_source()
    with tempfile.TemporaryDirectory(dir=bundle.parent) as temporary:
        folder = Path(temporary)
        graph = write_llm(folder, source, options)
        (folder / EMBEDDINGS).unlink()  # projectors are bound to the bundle's own
        for old in bundle.glob("llm.*"):
            old.unlink()
        for file in folder.iterdir():
            file.replace(bundle / file.name)
    graphs = {**manifest.graphs, "llm": graph}
    write_manifest(bundle, dataclasses.replace(manifest, graphs=graphs))
    return graph


if __name__ == "__main__":
    raise SystemExit(main())
