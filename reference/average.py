"""The encoder's weights as the weighted mean of two trainings, of which one continued the other.

Such a mean is better on other speech than either (Wortsman et al. 2022, "Model soups"; our figures
are in docs/reference-bundle.md).

    python -m tiny_align.reference.average BEFORE AFTER --share 0.3 --out reference/weights/encoder
"""

import argparse
import json
import shutil
from pathlib import Path


def mean(before: dict, after: dict, share: float) -> dict:
    """Tensors by name: `share` of `after`, the rest of `before`; counts are `after`'s."""
    return {
        name: before[name].lerp(value, share) if value.is_floating_point() else value
        for name, value in after.items()
    }


def main(argv=None) -> int:
    from safetensors.torch import load_file, save_file

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="an encoder's folder")
    parser.add_argument("after", type=Path, help="the folder of one that was trained on from it")
    parser.add_argument("--share", type=float, default=0.3, help="of the second")
    parser.add_argument("--out", type=Path, default=Path("reference/weights/encoder"))
    args = parser.parse_args(argv)
    shutil.copytree(args.after, args.out, dirs_exist_ok=True)
    files = [load_file(folder / "model.safetensors") for folder in (args.before, args.after)]
    save_file(mean(*files, args.share), args.out / "model.safetensors", {"format": "pt"})
    record = {
        "share": args.share,
        "of": json.loads((args.after / "training.json").read_text(encoding="utf-8")),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"share": args.share, "out": str(args.out)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
