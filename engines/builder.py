"""Which builder of engines is installed, and for which GPU it will build.

TensorRT where it is importable, else TensorRT-RTX. TensorRT builds on the GPU it builds for; TensorRT-RTX builds for
any RTX generation, with or without a GPU, but what it builds runs on RTX GPUs only. Nothing is built here.
"""

import importlib.util
from dataclasses import asdict, dataclass

from tiny_align.runtime.bundle.engines import PACKAGES, engines_key, import_tensorrt
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import gpu_compute_capability, l4t_release

TOOLS = ("polygraphy", "onnx", "tqdm")  # what else a build imports
DEFAULT_RTX_COMPUTE_CAPABILITY = 86  # without a GPU to ask


@dataclass(frozen=True)
class Builder:
    """An installed builder and its target."""

    package: str  # import name
    version: str
    compute_capability: int  # 87 for 8.7
    jetpack: str | None = None  # the L4T release of this machine

    @property
    def facts(self) -> dict:
        """What its engines are bound to, as runtime compares it."""
        return asdict(self)

    @property
    def key(self) -> str:
        """Name of the folder under engines/ that holds what this builder makes for this target."""
        return engines_key(self.facts)


def find_builder(compute_capability: int | None = None) -> Builder:
    """The builder a build will use.

    Args:
        compute_capability: the target, 86 for 8.6; None: this machine's GPU or, with TensorRT-RTX and no GPU, 86.

    Raises:
        BackendError: no builder or a broken one is installed, or it cannot build for that target.
    """
    for package in PACKAGES:
        module = import_tensorrt(package, "Builder")
        if module is not None:
            _require_tools()
            target = _rtx_target if package == "tensorrt_rtx" else _tensorrt_target
            return Builder(
                package, module.__version__, target(module, compute_capability), l4t_release()
            )
    raise BackendError(
        "neither TensorRT nor TensorRT-RTX is installed for this Python. On a Jetson TensorRT comes with JetPack and "
        "has no pip wheel: install tiny-align in a venv made with `python3 -m venv --system-site-packages`. Elsewhere: "
        "`pip install tiny-align[trt] tensorrt-rtx`"
    )


def _require_tools() -> None:
    missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(
            f"building engines needs {', '.join(missing)}: `pip install tiny-align[trt]`"
        )


def _tensorrt_target(_module, wanted: int | None) -> int:
    here = gpu_compute_capability()
    if here is None:
        raise BackendError(
            "TensorRT builds on the GPU it builds for, and the CUDA driver finds none here: build on the device. "
            "To build for an RTX GPU on this machine, use tensorrt-rtx in a venv without TensorRT"
        )
    if wanted not in (None, here):
        raise BackendError(
            f"compute capability {wanted} is not this machine's: TensorRT builds for the GPU it runs on, "
            f"here {here}. Build on the other device, or leave the compute capability out"
        )
    return here


def _rtx_target(module, wanted: int | None) -> int:
    target = wanted or gpu_compute_capability() or DEFAULT_RTX_COMPUTE_CAPABILITY
    known = sorted(
        int(name[2:]) for name in module.ComputeCapability.__members__ if name.startswith("SM")
    )
    if target not in known:
        raise BackendError(
            f"TensorRT-RTX {module.__version__} does not build for compute capability {target}: give "
            f"--compute-capability with one of {', '.join(map(str, known))}"
        )
    return target
