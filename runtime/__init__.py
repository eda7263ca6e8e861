"""The torch-free runtime: load a bundle, talk to it. Names are loaded when first used."""

import os
from typing import Any

from tiny_align.runtime.privacy.telemetry import turn_off

turn_off()  # before any other library is loaded

# numpy's products are small here, and OpenBLAS's threads wait by spinning, beside the graphs' own.
# It reads the variable when numpy is loaded: if that was before, or if it is set, nothing changes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_EXPORTS = {
    "Answer": "assistant",
    "Assistant": "assistant",
    "Bundle": "bundle.bundle",
    "Decoding": "llm",
    "Event": "events",
    "NothingHeard": "events",
    "Seal": "privacy.sealing",
    "TinyAlignError": "errors",
    "Token": "events",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
