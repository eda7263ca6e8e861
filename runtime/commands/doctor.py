"""`tiny-align doctor`: what this machine has, what is wrong with it, and the command that mends it.

A list of findings (runtime/findings.py). Each is fine, wrong, or neither: a fact, or something
missing that not every user needs. The machine is examined here, each backend by its own `check`.
The doctor reads and changes nothing; machine.py has the files that it reads. No package is
imported to learn its version: its metadata and files are read.
"""

import argparse
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiny_align.runtime import machine
from tiny_align.runtime.backends import registry
from tiny_align.runtime.bundle.shipped import shipped_bundle, shipped_voice
from tiny_align.runtime.commands.options import add_options, option, read_options
from tiny_align.runtime.findings import (
    DOCS,
    Finding,
    Subject,
    assess,
    optional,
    version_numbers,
)

GIB = 2**30
MIN_L4T = (36, 4)  # JetPack 6.1, the first with TensorRT 10.3
MIN_AVAILABLE = 1 * GIB
MIN_CMA = 900 << 20
MIN_SWAP = 4 * GIB
THROTTLES_WITHIN_C = 5.0
MARKS = {True: "ok", False: "!!", None: "  "}


def examine(subject: Subject) -> list[Finding]:
    """All findings, in the order of CHECKS."""
    findings: list[Finding] = []
    for check in CHECKS:
        findings += check(subject)
    return findings


def check_board(subject: Subject) -> Iterator[Finding]:
    described = machine.describe(subject.root)
    name = described.get("jetson") or described.get("processor") or platform.machine()
    online, present = machine.cores(subject.root)
    cores = f"cores {online} of {present}" if online else f"{described['cores']} cores"
    yield Finding("machine", f"{name}, {cores}, Python {subject.python}")
    if subject.jetson:
        release = machine.l4t_release(subject.root)
        if release is None:
            value = "unknown: there is no /etc/nv_tegra_release, as in a container"
            yield Finding("JetPack", value)
            return
        value = f"{machine.JETPACKS.get(release, 'not one we know')} (Jetson Linux {release})"
        remedy = f"its TensorRT is older than 10.3: flash JetPack 6.2 or 7.2, see {DOCS}"
        yield assess("JetPack", value, version_numbers(release) >= MIN_L4T, remedy)


def check_gpu(subject: Subject) -> Iterator[Finding]:
    capability = subject.compute_capability
    if capability is not None:
        yield Finding("GPU", f"compute capability {capability // 10}.{capability % 10}", True)
    elif subject.jetson:
        remedy = (
            "start a container with --runtime nvidia (JetPack 6) or --gpus all (JetPack 7); "
            "outside of one the board's driver does not work: restart, or flash JetPack again"
        )
        yield Finding("GPU", "none that the CUDA driver finds", False, remedy)
    else:
        yield Finding("GPU", "none with a CUDA driver: ONNX Runtime works on the CPU")


def check_cuda(subject: Subject) -> Iterator[Finding]:
    version = machine.cuda_toolkit(subject.root)
    if version or subject.jetson:
        value = version or "no toolkit"
        yield assess("CUDA", value, bool(version), "sudo apt install nvidia-jetpack")


def check_backends(subject: Subject) -> Iterator[Finding]:
    """What each backend needs."""
    for name in registry.names():
        yield from registry.find_backend(name).check(subject)


def check_torch(subject: Subject) -> Iterator[Finding]:
    torch = subject.package("torch")
    if torch is None:
        wheel = f"a wheel for the board, see {DOCS}, then " if subject.jetson else ""
        remedy = f"to train: {wheel}pip install 'tiny-align[align]'"
        yield Finding("PyTorch", "not installed", None, remedy)
        return
    source = machine.read(Path(str(torch.locate_file("torch/version.py"))))
    found = re.search(r"^cuda\b.*?= *'([\d.]+)'", source, re.MULTILINE)
    cuda = found[1] if found else None  # the version that PyTorch was built for
    toolkit = machine.cuda_toolkit(subject.root)
    fits = not (cuda and toolkit) or cuda.split(".")[0] == toolkit.split(".")[0]
    value = f"{torch.version}, " + (f"CUDA {cuda}" if cuda else "for the CPU")
    remedy = f"the machine has CUDA {toolkit}: install a build for it, see {DOCS}"
    yield assess("PyTorch", value, fits, remedy)


def check_extras(subject: Subject) -> Iterator[Finding]:
    remedy = "to evaluate: pip install 'tiny-align[align]'"
    yield optional(subject, "evaluation", ("rouge-score",), remedy)
    remedy = "to build engines: pip install 'tiny-align[trt]'"
    yield optional(subject, "Polygraphy", ("polygraphy",), remedy)
    if not subject.jetson:
        remedy = "to export: pip install 'tiny-align[export]'"
        yield optional(subject, "transformers", ("transformers",), remedy)


def check_power(subject: Subject) -> Iterator[Finding]:
    mode = machine.power_mode(subject.root)
    if mode:
        is_fastest = mode.fastest in (None, mode.name)
        remedy = (
            f"{mode.fastest} is faster, if power and cooling allow: "
            f"sudo nvpmodel -m {mode.fastest_id}"
        )
        yield assess("power mode", mode.name, is_fastest, remedy)
    events = machine.power_shortages(subject.root)
    if events is not None:
        value = f"fell short {events} times since the start"
        remedy = "the board slowed down: use a stronger power supply, or a lower mode of nvpmodel"
        yield assess("power supply", value, events == 0, remedy)


def check_clocks(subject: Subject) -> Iterator[Finding]:
    clock = machine.gpu_clock(subject.root)
    if clock is None:
        return
    now = round(clock.now / 1e6)
    if clock.locked:
        yield Finding("GPU clock", f"{now} MHz, locked")
    else:
        value = f"{now} MHz of {round(clock.min / 1e6)} to {round(clock.max / 1e6)}"
        yield Finding("GPU clock", value, None, "before measuring: sudo jetson_clocks")


def check_heat(subject: Subject) -> Iterator[Finding]:
    zones = machine.temperatures(subject.root)
    if zones:
        hottest = min(zones, key=lambda zone: zone.limit - zone.celsius)
        cool = hottest.celsius < hottest.limit - THROTTLES_WITHIN_C
        value = f"{hottest.celsius:.0f} °C at {hottest.zone}, slowed down from {hottest.limit:.0f}"
        remedy = "clean or add a fan, or choose a lower power mode"
        yield assess("temperature", value, cool, remedy)


def check_memory(subject: Subject) -> Iterator[Finding]:
    memory = subject.memory
    if "MemAvailable" in memory:
        available = memory["MemAvailable"]
        value = f"{available / GIB:.1f} GiB available of {memory['MemTotal'] / GIB:.1f}"
        yield assess(
            "memory", value, available >= MIN_AVAILABLE, "close other programs, or restart"
        )
    if subject.small_board and machine.starts_a_desktop(subject.root):
        remedy = "takes over 1 GiB: sudo systemctl set-default multi-user.target, then restart"
        yield Finding("desktop", "started with the board", False, remedy)
    pages = machine.huge_pages(subject.root)
    if pages:
        yield Finding("huge pages", pages)


def check_cma(subject: Subject) -> Iterator[Finding]:
    total = subject.memory.get("CmaTotal", 0)
    if subject.jetson and total:
        value = f"{subject.memory.get('CmaFree', 0) >> 20} MiB free of {total >> 20}"
        enough = total >= MIN_CMA or not subject.small_board
        remedy = (
            "TensorRT runs out of contiguous memory first: add cma=950M to the APPEND line of "
            f"/boot/extlinux/extlinux.conf, then restart, see {DOCS}"
        )
        yield assess("contiguous memory", value, enough, remedy)


def check_swap(subject: Subject) -> Iterator[Finding]:
    areas = machine.swaps(subject.root)
    value = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in areas.items()) or "none"
    if not subject.small_board:
        yield Finding("swap", value)
        return
    on_disk = sum(size for name, size in areas.items() if not name.startswith("/dev/zram"))
    remedy = f"builds need some on an NVMe disk, at least {MIN_SWAP / GIB:.0f} GiB: see {DOCS}"
    yield assess("swap", value, on_disk >= MIN_SWAP, remedy)


def check_sound(subject: Subject) -> Iterator[Finding]:
    names = machine.microphones(subject.root)
    if names:
        yield Finding("microphone", ", ".join(names), True)
    else:
        remedy = (
            "to enroll by voice plug in a USB microphone (`arecord -l` lists it); recordings in "
            "files need none"
        )
        yield Finding("microphone", "none", None, remedy)


CHECKS = (
    check_board,
    check_gpu,
    check_cuda,
    check_backends,
    check_torch,
    check_extras,
    check_power,
    check_clocks,
    check_heat,
    check_memory,
    check_cma,
    check_swap,
    check_sound,
)


# --- the command ---


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    bundle: Path | None = field(
        default=None,
        metadata=option("check this bundle too", metavar="DIR"),
    )
    prove_private: bool = field(
        default=False,
        metadata=option("answer a recording in a sealed process, and try to get out of it"),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, DoctorOptions)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """{"machine", "findings", "wrong"}; with --bundle "bundle", with --prove-private "private".

    Raises:
        BundleError: a damaged bundle; whatever else is wrong is in the report.
        TinyAlignError: a process cannot be sealed here.
    """
    options = read_options(args, DoctorOptions)
    bundle = _bundle(options.bundle) if options.bundle else None
    findings = examine(Subject(machine.gpu_compute_capability()))
    if bundle:
        value = f"{bundle['name']}: every file is there and unchanged"
        findings.append(Finding("bundle", value, True))
    private = _private(options.bundle) if options.prove_private else None
    if private:
        findings.append(_privacy(private))
    if not args.json:
        show(findings)
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "findings": [asdict(finding) for finding in findings],
        "wrong": [finding.what for finding in findings if finding.ok is False],
    }
    if bundle:
        report["bundle"] = bundle
    if private:
        report["private"] = private
        report["exit_status"] = int(private["proved"] is False)
    return report


def _bundle(path: Path) -> dict[str, Any]:
    """What the document says about a bundle."""
    from tiny_align.runtime.bundle.bundle import Bundle
    from tiny_align.runtime.bundle.user_folders import users_directories
    from tiny_align.runtime.bundle.users import user_names

    bundle = Bundle.open(path)
    users: set[str] = set()
    for directory in users_directories(bundle):
        users.update(user_names(directory))
    engines = sorted(record.parent.name for record in path.glob("engines/[!.]*/engine.json"))
    name = bundle.manifest.name
    return {"name": name, "whole": True, "users": sorted(users), "engines": engines}


def _private(bundle: Path | None) -> dict[str, Any]:
    """A recording that ships, answered in a sealed process by `bundle` or the one that ships."""
    from tiny_align.runtime.commands.proof import prove

    return prove(bundle or shipped_bundle(), shipped_voice() / "test-100.flac")


def _privacy(private: dict[str, Any]) -> Finding:
    from tiny_align.runtime.commands.proof import REFUSALS

    denied = private["denied"]
    opened = [way for way, error in denied.items() if error not in REFUSALS]
    value = f"sealed, {len(denied) - len(opened)} of {len(denied)} ways out denied; attempted: "
    if private["proved"] is None:
        return Finding("privacy", value + private["covered"], None, "sudo apt install strace")
    counts = (private["attempted"] or {}).items()
    value += ", ".join(f"{kind} {count}" for kind, count in counts) or "?"
    remedy = f"not denied: {', '.join(opened) or 'none'}. Do not rely on it here, and report it"
    return assess("privacy", value, private["proved"], remedy)


def show(findings: list[Finding]) -> None:
    """Print a table for the user."""
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        print(f"{MARKS[finding.ok]}  {finding.what:{width}s}  {finding.value}")
        if finding.remedy:
            print(f"{'':{width + 4}s}  -> {finding.remedy}")
