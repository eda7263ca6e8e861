"""ONNX graphs of a bundle -> TensorRT engines for the GPU they will run on.

Without torch. Engines are not run here: runtime/backends does that.
"""
