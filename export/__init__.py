"""Transformers models -> ONNX graphs -> a bundle, on a workstation; no device needs it."""

import os

# Before transformers is imported: no code of the hub, no usage data, no request to convert a model.
os.environ["USE_HUB_KERNELS"] = "NO"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
