"""Turn the telemetry of libraries off; `tiny_align.runtime` does so before it loads any of them.

ONNX Runtime (1.29 and later) reads the switch when it is imported. With telemetry on it writes an
identifier below HOME, and nothing stops its uploader afterwards: `disable_telemetry_events` only
makes it report less. For programs that import ONNX Runtime before us, setup.py installs a line
that Python executes at its start (tiny_align_telemetry_off.pth).
"""

import os
import sys
import warnings

ONNX_RUNTIME = "ORT_DISABLE_TELEMETRY"
OFF = {
    ONNX_RUNTIME: "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub and the libraries that download with it
    "DO_NOT_TRACK": "1",  # a convention of several other libraries
}
FIRST_WITH_UPLOADER = (1, 29)  # of ONNX Runtime, outside of Windows


def turn_off() -> None:
    """Set the environment variables that the libraries read; warn if that is too late."""
    onnxruntime = sys.modules.get("onnxruntime")
    switch = os.environ.get(ONNX_RUNTIME, "").strip().lower()
    was_off = switch in ("1", "true", "yes", "on", "y")  # as ONNX Runtime reads it
    os.environ.update(OFF)
    if onnxruntime is None or was_off:
        return
    onnxruntime.disable_telemetry_events()
    major, minor = onnxruntime.__version__.split(".")[:2]
    if (int(major), int(minor)) >= FIRST_WITH_UPLOADER:
        warnings.warn(
            f"onnxruntime was imported with its telemetry on and may use the network: set "
            f"{ONNX_RUNTIME}=1, or import tiny_align.runtime first",
            RuntimeWarning,
            stacklevel=2,
        )
