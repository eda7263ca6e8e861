"""Transformers models -> ONNX graphs -> a bundle, on a workstation. Nothing here is needed on the device."""

import os

# Before transformers is imported: no code from the hub, no usage data, and nobody is asked to convert a model.
os.environ["USE_HUB_KERNELS"] = "NO"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
