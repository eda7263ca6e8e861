"""Switches the telemetry of libraries off. `tiny_align.runtime` does so before it loads any of them.

ONNX Runtime (1.29 and later) decides when it is imported. It then writes an identifier below HOME,
and nothing stops its uploader afterwards: `disable_telemetry_events` only makes it report less. For
programs that import it before us, setup.py installs a line that Python executes at its start
(tiny_align_telemetry_off.pth).
"""

import os
import sys
import warnings

ONNX_RUNTIME = "ORT_DISABLE_TELEMETRY"
OFF = {
    ONNX_RUNTIME: "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub and all that download by it
    "DO_NOT_TRACK": "1",  # what several others agree on
}
FIRST_WITH_UPLOADER = (1, 29)  # of ONNX Runtime, outside of Windows


def turn_off() -> None:
    """Set what the libraries read; warn where that is too late."""
    onnxruntime = sys.modules.get("onnxruntime")
    was_off = _is_true(os.environ.get(ONNX_RUNTIME, ""))
    os.environ.update(OFF)
    if onnxruntime is None or was_off:
        return
    onnxruntime.disable_telemetry_events()
    if _version(onnxruntime) >= FIRST_WITH_UPLOADER:
        warnings.warn(
            f"onnxruntime was imported with its telemetry on and may use the network: set "
            f"{ONNX_RUNTIME}=1, or import tiny_align.runtime first",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_true(value: str) -> bool:
    """As ONNX Runtime reads it."""
    return value.strip().lower() in ("1", "true", "yes", "on", "y")


def _version(package) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])
