"""Puts the reference bundle together from the trained weights: export, general projector, the
demo's voice.

python -m tiny_align.reference.build
"""

import argparse
import json
from pathlib import Path

from tiny_align.reference import corpus, projector, recordings

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
    args = parser.parse_args(argv)
    from tiny_align.export.bundle import ExportOptions, export_bundle

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
        instruction=corpus.ANSWER_INSTRUCTIONS[0],  # the LLM was trained on instructions
        block_size=32,  # the LLM was trained with its weights rounded so
        projector=str(args.start) if args.start else None,
    )
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


if __name__ == "__main__":
    raise SystemExit(main())
