"""The ONNX Runtime backend, on the CPU. Values that are kept stay OrtValues, so nothing is copied per token."""

from pathlib import Path

import numpy as np

from tiny_align.runtime.backend import Runner
from tiny_align.runtime.bundle import GraphSpec
from tiny_align.runtime.errors import BackendError


class OrtRunner(Runner):
    """A graph in an ONNX Runtime session; `threads` limits its intra-op threads (None: all cores)."""

    name = "onnxruntime"

    def __init__(self, path: Path, spec: GraphSpec, threads: int | None = None):
        super().__init__(spec)
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", "4"
        )  # INT4 weights: int8 dot products
        if threads:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has no common base class
            raise BackendError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._outputs = [o.name for o in self._session.get_outputs()]

    def _run(self, feed: dict, keep: tuple[str, ...]) -> dict:
        if self._session is None:
            raise BackendError(f"{self.spec.file} is closed: load the bundle again")
        values = {n: self._value(v) if isinstance(v, np.ndarray) else v for n, v in feed.items()}
        results = self._session.run_with_ort_values(self._outputs, values)
        return {n: v if n in keep else v.numpy() for n, v in zip(self._outputs, results)}

    def close(self) -> None:
        self._session = None
