"""`tiny-align doctor`: what this machine has, what is wrong with it, and the command that mends it.

A list of findings. Each is judged: fine, wrong, or neither - a fact, or something lacking that not everybody needs.
It reads and changes nothing; machine.py says where. No package is imported to learn its version: their metadata and
files are read.
"""

import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from tiny_align.runtime import machine

GIB = 2**30
MIN_TENSORRT = (10, 3)
LEAST_L4T = (36, 4)  # JetPack 6.1, the first with TensorRT 10.3
SMALL_BOARD = (
    12 * GIB
)  # below it CPU and GPU share too little for carelessness: an Orin Nano or NX of 8 GB
MIN_AVAILABLE, MIN_CMA, MIN_SWAP = 1 * GIB, 900 << 20, 4 * GIB
THROTTLES_WITHIN_C = 5.0
DOCS = "docs/jetson.md"
MARKS = {True: "ok", False: "!!", None: "  "}


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    value: str
    ok: bool | None = None  # None: a fact, or something lacking that not everybody needs
    remedy: str = ""


@dataclass(frozen=True)
class Subject:
    """The machine that is examined: this one, or a recorded one under `root`."""

    compute_capability: int | None  # of its GPU, 87 for 8.7
    root: Path = machine.ROOT
    packages: tuple[str, ...] = tuple(sys.path)  # where its Python looks for packages
    python: str = platform.python_version()

    @cached_property
    def jetson(self) -> bool:
        return bool(machine.jetson_model(self.root) or machine.l4t_release(self.root))

    @cached_property
    def memory(self) -> dict[str, int]:
        return machine.memory(("MemTotal", "MemAvailable", "CmaTotal", "CmaFree"), self.root)

    @property
    def small_board(self) -> bool:
        return self.jetson and self.memory.get("MemTotal", 0) < SMALL_BOARD

    def package(self, *names: str) -> metadata.Distribution | None:
        """The first of these distributions that is installed; a folder without metadata is none."""
        found = (
            d for name in names for d in metadata.distributions(name=name, path=list(self.packages))
        )
        return next((d for d in found if d.metadata["Name"]), None)


def examine(subject: Subject) -> list[Finding]:
    """Everything looked at, in the order of CHECKS."""
    return [finding for check in CHECKS for finding in check(subject)]


def _board(subject: Subject) -> Iterator[Finding]:
    described = machine.describe(subject.root)
    name = described.get("jetson") or described.get("processor") or platform.machine()
    online, present = machine.cores(subject.root)
    cores = f"cores {online} of {present}" if online else f"{described['cores']} cores"
    yield Finding("machine", f"{name}, {cores}, Python {subject.python}")
    if subject.jetson:
        yield _jetpack(machine.l4t_release(subject.root))


def _jetpack(release: str | None) -> Finding:
    if release is None:
        return Finding("JetPack", "unknown: there is no /etc/nv_tegra_release, as in a container")
    value = f"{machine.JETPACKS.get(release, 'not one we know')} (Jetson Linux {release})"
    remedy = f"its TensorRT is older than 10.3: flash JetPack 6.2 or 7.2, see {DOCS}"
    return _judged("JetPack", value, _numbers(release) >= LEAST_L4T, remedy)


def _gpu(subject: Subject) -> Iterator[Finding]:
    capability = subject.compute_capability
    if capability is not None:
        yield Finding("GPU", f"compute capability {capability // 10}.{capability % 10}", True)
    elif subject.jetson:
        yield Finding(
            "GPU",
            "none that the CUDA driver finds",
            False,
            "start a container with --runtime nvidia (JetPack 6) or --gpus all (JetPack 7); outside of one the board's "
            "driver is not at work: restart, or flash JetPack again",
        )
    else:
        yield Finding("GPU", "none with a CUDA driver: ONNX Runtime works on the CPU")


def _cuda(subject: Subject) -> Iterator[Finding]:
    version = machine.cuda_toolkit(subject.root)
    if version or subject.jetson:
        yield _judged(
            "CUDA", version or "no toolkit", bool(version), "sudo apt install nvidia-jetpack"
        )


def _tensorrt(subject: Subject) -> Iterator[Finding]:
    ours, system = subject.package("tensorrt"), machine.system_tensorrt(subject.root)
    if ours:
        yield _judged(
            "TensorRT",
            ours.version,
            _numbers(ours.version) >= MIN_TENSORRT,
            f"engines need 10.3 or later: flash JetPack 6.2 or 7.2, see {DOCS}",
        )
    elif system:
        yield _hidden_tensorrt(system, "python" + ".".join(subject.python.split(".")[:2]))
    elif subject.jetson:
        yield Finding("TensorRT", "not installed", False, "sudo apt install nvidia-jetpack")
    else:
        yield _optional(
            subject, "TensorRT-RTX", ("tensorrt-rtx",), "to build engines: pip install tensorrt-rtx"
        )


def _hidden_tensorrt(system: machine.SystemTensorRT, python: str) -> Finding:
    if not system.pythons:
        value, remedy = "has no Python bindings", "sudo apt install python3-libnvinfer"
    elif python not in system.pythons:
        value, remedy = (
            f"is for {', '.join(system.pythons)}, this is {python}",
            f"use {system.pythons[-1]}",
        )
    else:
        value, remedy = (
            "is not seen by this Python",
            "make the venv with `python3 -m venv --system-site-packages`",
        )
    return Finding("TensorRT", f"the system's {system.version} {value}", False, remedy)


def _onnx_runtime(subject: Subject) -> Iterator[Finding]:
    builds = {
        name: d for name in ("onnxruntime", "onnxruntime-gpu") if (d := subject.package(name))
    }
    if not builds:
        yield Finding("ONNX Runtime", "not installed", False, "pip install tiny-align")
        return
    versions = ", ".join(f"{name} {d.version}" for name, d in builds.items())
    yield _judged(
        "ONNX Runtime",
        f"{versions}: {', '.join(_providers(next(iter(builds.values()))))}",
        len(builds) == 1,
        "the two overwrite each other's files: pip uninstall onnxruntime onnxruntime-gpu, then install one of them",
    )


def _providers(distribution: metadata.Distribution) -> list[str]:
    """By the libraries that lie in the package's folder, which all builds share; the CPU is built in."""
    folder = Path(str(distribution.locate_file("onnxruntime/capi")))
    libraries = {"TensorRT": "tensorrt", "CUDA": "cuda"}
    return [
        n for n, part in libraries.items() if any(folder.glob(f"*onnxruntime_providers_{part}.*"))
    ] + ["CPU"]


def _torch(subject: Subject) -> Iterator[Finding]:
    torch = subject.package("torch")
    if torch is None:
        wheel = f"a wheel for the board, see {DOCS}, then " if subject.jetson else ""
        yield Finding(
            "PyTorch", "not installed", None, f"to train: {wheel}pip install 'tiny-align[align]'"
        )
        return
    cuda, toolkit = _torch_cuda(torch), machine.cuda_toolkit(subject.root)
    fits = not (cuda and toolkit) or cuda.split(".")[0] == toolkit.split(".")[0]
    value = f"{torch.version}, {f'CUDA {cuda}' if cuda else 'for the CPU'}"
    yield _judged(
        "PyTorch",
        value,
        fits,
        f"the machine has CUDA {toolkit}: install a build for it, see {DOCS}",
    )


def _torch_cuda(torch: metadata.Distribution) -> str | None:
    source = machine.read(Path(str(torch.locate_file("torch/version.py"))))
    found = re.search(r"^cuda\b.*?= *'([\d.]+)'", source, re.MULTILINE)
    return found[1] if found else None


def _extras(subject: Subject) -> Iterator[Finding]:
    yield _optional(
        subject, "evaluation", ("rouge-score",), "to evaluate: pip install 'tiny-align[align]'"
    )
    yield _optional(
        subject, "Polygraphy", ("polygraphy",), "to build engines: pip install 'tiny-align[trt]'"
    )
    if not subject.jetson:
        yield _optional(
            subject,
            "transformers",
            ("transformers",),
            "to export: pip install 'tiny-align[export]'",
        )


def _power(subject: Subject) -> Iterator[Finding]:
    mode = machine.power_mode(subject.root)
    if mode:
        faster = mode.fastest not in (None, mode.name)
        remedy = f"{mode.fastest} is faster, if power and cooling allow: sudo nvpmodel -m {mode.fastest_id}"
        yield _judged("power mode", mode.name, not faster, remedy)
    events = machine.power_shortages(subject.root)
    if events is not None:
        remedy = "the board slowed down: use a stronger power supply, or a lower mode of nvpmodel"
        yield _judged(
            "power supply", f"fell short {events} times since the start", events == 0, remedy
        )


def _clocks(subject: Subject) -> Iterator[Finding]:
    clock = machine.gpu_clock(subject.root)
    if clock:
        now, least, greatest = (
            round(hertz / 1e6) for hertz in (clock.now, clock.min, clock.max)
        )
        value = f"{now} MHz, locked" if clock.locked else f"{now} MHz of {least} to {greatest}"
        yield Finding(
            "GPU clock", value, None, "" if clock.locked else "before measuring: sudo jetson_clocks"
        )


def _heat(subject: Subject) -> Iterator[Finding]:
    zones = machine.temperatures(subject.root)
    if zones:
        nearest = min(zones, key=lambda zone: zone.limit - zone.celsius)
        cool = nearest.celsius < nearest.limit - THROTTLES_WITHIN_C
        value = f"{nearest.celsius:.0f} °C at {nearest.zone}, slowed down from {nearest.limit:.0f}"
        yield _judged(
            "temperature", value, cool, "clean or add a fan, or choose a lower power mode"
        )


def _memory(subject: Subject) -> Iterator[Finding]:
    told = subject.memory
    if "MemAvailable" in told:
        value = f"{told['MemAvailable'] / GIB:.1f} GiB available of {told['MemTotal'] / GIB:.1f}"
        yield _judged(
            "memory",
            value,
            told["MemAvailable"] >= MIN_AVAILABLE,
            "close other programs, or restart",
        )
    if subject.small_board and machine.starts_a_desktop(subject.root):
        remedy = "takes over 1 GiB: sudo systemctl set-default multi-user.target, then restart"
        yield Finding("desktop", "started with the board", False, remedy)
    pages = machine.huge_pages(subject.root)
    if pages:
        yield Finding("huge pages", pages)


def _cma(subject: Subject) -> Iterator[Finding]:
    total = subject.memory.get("CmaTotal", 0)
    if subject.jetson and total:
        value = f"{subject.memory.get('CmaFree', 0) >> 20} MiB free of {total >> 20}"
        remedy = (
            "TensorRT runs out of contiguous memory first: add cma=950M to the APPEND line of "
            f"/boot/extlinux/extlinux.conf, then restart, see {DOCS}"
        )
        yield _judged(
            "contiguous memory", value, total >= MIN_CMA or not subject.small_board, remedy
        )


def _swap(subject: Subject) -> Iterator[Finding]:
    areas = machine.swaps(subject.root)
    on_disk = sum(size for name, size in areas.items() if not name.startswith("/dev/zram"))
    value = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in areas.items()) or "none"
    if subject.small_board:
        remedy = f"builds need some on an NVMe disk, at least {MIN_SWAP / GIB:.0f} GiB: see {DOCS}"
        yield _judged("swap", value, on_disk >= MIN_SWAP, remedy)
    else:
        yield Finding("swap", value)


def _sound(subject: Subject) -> Iterator[Finding]:
    names = machine.microphones(subject.root)
    remedy = "to enroll by voice plug in a USB microphone (`arecord -l` lists it); recordings in files need none"
    yield Finding(
        "microphone", ", ".join(names) or "none", True if names else None, "" if names else remedy
    )


CHECKS = (
    _board,
    _gpu,
    _cuda,
    _tensorrt,
    _onnx_runtime,
    _torch,
    _extras,
    _power,
    _clocks,
    _heat,
    _memory,
    _cma,
    _swap,
    _sound,
)


def _judged(what: str, value: str, ok: bool, remedy: str) -> Finding:
    return Finding(what, value, ok, "" if ok else remedy)


def _optional(subject: Subject, what: str, names: tuple[str, ...], remedy: str) -> Finding:
    found = subject.package(*names)
    return (
        Finding(what, found.version, True)
        if found
        else Finding(what, "not installed", None, remedy)
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


# --- the command ---


def add_arguments(parser) -> None:
    parser.add_argument("--bundle", type=Path, help="check this bundle too")
    parser.add_argument(
        "--prove-private",
        action="store_true",
        help="answer a recording in a sealed process, and try to get out of it",
    )


def run(args) -> dict:
    """{"machine", "findings", "wrong"}; with --bundle "bundle", with --prove-private "private".

    Raises:
        BundleError: a damaged bundle; whatever else is wrong is in the report.
        TinyAlignError: a process cannot be sealed here.
    """
    bundle = _bundle(args.bundle) if args.bundle else None
    findings = examine(Subject(machine.gpu_compute_capability()))
    if bundle:
        findings.append(
            Finding("bundle", f"{bundle['name']}: every file is there and unchanged", True)
        )
    private = _private(args.bundle) if args.prove_private else None
    if private:
        findings.append(_privacy(private))
    if not args.json:
        show(findings)
    wrong = [finding.what for finding in findings if finding.ok is False]
    report = {
        "machine": machine.describe(),
        "findings": [asdict(f) for f in findings],
        "wrong": wrong,
    }
    report |= {"bundle": bundle} if bundle else {}
    if private:
        report |= {"private": private, "exit_status": int(private["proved"] is False)}
    return report


def _bundle(path: Path) -> dict:
    from tiny_align.runtime.bundle.bundle import Bundle

    manifest = Bundle.open(path).manifest
    users = sorted(p.parent.name for p in path.glob("users/*/user.json"))
    engines = sorted(p.parent.name for p in path.glob("engines/[!.]*/engine.json"))
    return {"name": manifest.name, "whole": True, "users": users, "engines": engines}


def _private(bundle: Path | None) -> dict:
    """A recording that ships, answered by `bundle`, or by the one that ships."""
    from importlib.resources import files

    from tiny_align.runtime.privacy.proof import prove

    shipped = Path(str(files("tiny_align.reference")))
    return prove(bundle or shipped / "bundle", shipped / "voice/test-100.flac")


def _privacy(private: dict) -> Finding:
    from tiny_align.runtime.privacy.proof import REFUSALS

    denied, attempted = private["denied"], private["attempted"]
    opened = [way for way, error in denied.items() if error not in REFUSALS]
    value = f"sealed, {len(denied) - len(opened)} of {len(denied)} ways out denied; attempted: "
    if private["proved"] is None:
        return Finding("privacy", value + private["covered"], None, "sudo apt install strace")
    value += ", ".join(f"{kind} {count}" for kind, count in attempted.items()) if attempted else "?"
    remedy = f"not denied: {', '.join(opened) or 'none'}. Do not rely on it here, and report it"
    return _judged("privacy", value, private["proved"], remedy)


def show(findings: list[Finding]) -> None:
    """A table for people."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{MARKS[finding.ok]}  {finding.what:{width}s}  {finding.value}")
        if finding.remedy:
            print(f"{'':{width + 4}s}  -> {finding.remedy}")
