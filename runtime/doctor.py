"""`tiny-align doctor`: what this machine can run, build and train, and the command that adds what it lacks."""

from importlib import metadata
from pathlib import Path

from tiny_align.runtime.machine import describe, gpu_compute_capability, memory

PACKAGES = {  # what it is for -> distributions, any one of which does
    "run": ("onnxruntime", "onnxruntime-gpu"),
    "align": ("torch",),
    "evaluate": ("rouge-score",),
    "export": ("transformers",),
    "build-engines": ("tensorrt", "tensorrt-rtx"),
    "polygraphy": ("polygraphy",),
}
REMEDIES = {
    "run": "pip install tiny-align",
    "align": "pip install 'tiny-align[align]'",
    "evaluate": "pip install 'tiny-align[align]'",
    "export": "pip install 'tiny-align[export]' (on a workstation)",
    "build-engines": "on a Jetson TensorRT comes with JetPack: make the venv with --system-site-packages; "
    "elsewhere: pip install tensorrt-rtx",
    "polygraphy": "pip install 'tiny-align[trt]'",
}


def add_arguments(parser) -> None:
    parser.add_argument("--bundle", type=Path, help="check this bundle too")


def run(args) -> dict:
    report = {"machine": describe(), "compute_capability": gpu_compute_capability(), "memory": memory()}
    report["packages"] = {purpose: _version(names) for purpose, names in PACKAGES.items()}
    report["missing"] = {p: REMEDIES[p] for p, version in report["packages"].items() if version is None}
    if args.bundle:
        report["bundle"] = _bundle(args.bundle)
    if not args.json:
        _show(report)
    return report


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def _bundle(path: Path) -> dict:
    from tiny_align.runtime.bundle import Bundle

    manifest = Bundle.open(path).manifest
    users = sorted(p.parent.name for p in path.glob("users/*/user.json"))
    engines = sorted(p.parent.name for p in path.glob("engines/*/engine.json"))
    return {"name": manifest.name, "whole": True, "users": users, "engines": engines}


def _show(report: dict) -> None:
    for purpose, version in report["packages"].items():
        print(f"{purpose:14s} {version or 'missing: ' + REMEDIES[purpose]}")
    for name, size in report["memory"].items():
        print(f"{name:14s} {size / 2**30:.1f} GiB")
    if "bundle" in report:
        print(f"{'bundle':14s} {report['bundle']['name']}: every file is there and unchanged")
