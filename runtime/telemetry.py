"""No library reports on its user. `tiny_align.runtime` calls `turn_off` when it is imported, before it loads any other.

ONNX Runtime (1.29 and later) decides when it is loaded: it then writes an identifier below HOME, and nothing stops its
uploader afterwards; `disable_telemetry_events` only makes it report less. A program may import it before us, so
that setup.py also installs a line that Python executes when it starts (tiny_align_telemetry_off.pth).
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
REPORTS_SINCE = (1, 29)  # ONNX Runtime's first version with an uploader outside of Windows


def turn_off() -> None:
    """Set what the libraries read. A warning says where that is too late."""
    onnxruntime, decided = sys.modules.get("onnxruntime"), _is_set(os.environ.get(ONNX_RUNTIME, ""))
    os.environ.update(OFF)
    if onnxruntime is None or decided:
        return
    onnxruntime.disable_telemetry_events()
    if _version(onnxruntime) >= REPORTS_SINCE:
        warnings.warn(
            f"onnxruntime was imported with its telemetry on and will use the network: set {ONNX_RUNTIME}=1, or import "
            "tiny_align.runtime first",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_set(value: str) -> bool:
    """As ONNX Runtime reads it."""
    return value.strip().lower() in ("1", "true", "yes", "on", "y")


def _version(package) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])
