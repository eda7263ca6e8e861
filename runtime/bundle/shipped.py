"""The reference bundle and the recordings of a voice that an installation ships."""

from importlib.util import find_spec
from pathlib import Path

from tiny_align.runtime.errors import TinyAlignError

PACKAGE = "tiny_align.reference"  # located as a folder of data: its code is never imported


def shipped(name: str) -> Path:
    """The shipped folder "bundle" or "voice"; read only, it may lie in site-packages.

    Raises:
        TinyAlignError: this installation has no such folder.
    """
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / name
        if path.is_dir():
            return path
    raise TinyAlignError(
        f"this installation lacks the shipped {name} ({PACKAGE}): install tiny-align again, "
        "or give folders of your own (--bundle, --data)"
    )


def shipped_bundle() -> Path:
    """The reference bundle."""
    return shipped("bundle")


def shipped_voice() -> Path:
    """Recordings of a voice that the reference encoder was not trained on, with transcripts."""
    return shipped("voice")
