"""Transformers models -> ONNX graphs -> a bundle, on a workstation. Nothing here is needed on the device."""
