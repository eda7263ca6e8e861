"""What `tiny-align doctor` finds: `Finding`, and `Subject`, the machine that is examined.

The doctor (commands/doctor.py) examines the machine; each backend examines what it needs itself
(`Backend.check`). Both use what is here. No package is imported to learn its version: its
metadata is read.
"""

import platform
import re
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

from tiny_align.runtime import machine

SMALL_BOARD = 12 << 30  # bytes; a Jetson with less (Orin Nano or NX of 8 GB) has no memory to spare
DOCS = "docs/jetson.md"


@dataclass(frozen=True)
class Finding:
    """One thing examined."""

    what: str
    value: str
    ok: bool | None = None  # None: a fact, or something missing that not every user needs
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
        """Bytes, by the field of /proc/meminfo."""
        return machine.memory(("MemTotal", "MemAvailable", "CmaTotal", "CmaFree"), self.root)

    @property
    def small_board(self) -> bool:
        return self.jetson and self.memory.get("MemTotal", 0) < SMALL_BOARD

    def package(self, *names: str) -> metadata.Distribution | None:
        """The first of these distributions that is installed; a folder without metadata is none."""
        for name in names:
            for found in metadata.distributions(name=name, path=list(self.packages)):
                if found.metadata["Name"]:
                    return found
        return None


def assess(what: str, value: str, ok: bool, remedy: str) -> Finding:
    """A finding that is fine or wrong; the remedy is shown only if it is wrong."""
    return Finding(what, value, ok, "" if ok else remedy)


def optional(subject: Subject, what: str, names: tuple[str, ...], remedy: str) -> Finding:
    """A finding about a package that not every user needs: the first of `names` that is there."""
    found = subject.package(*names)
    if found is None:
        return Finding(what, "not installed", None, remedy)
    return Finding(what, found.version, True)


def version_numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, to be compared: "10.16.2.10" -> (10, 16, 2)."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
