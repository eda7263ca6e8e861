"""The torch-free runtime: load a bundle, talk to it. Names are loaded when first used."""

import os

from tiny_align.runtime.privacy.telemetry import turn_off

turn_off()  # before any other library is loaded

# numpy's products are small here, and the threads that OpenBLAS gives them wait by spinning, beside the graphs' own. It
# is read when numpy is loaded: where that was before, or the variable is set, nothing changes.
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


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
