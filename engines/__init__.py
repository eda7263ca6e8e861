"""ONNX graphs of a bundle -> TensorRT engines for the GPU they will run on. No torch, and nothing runs engines here."""
