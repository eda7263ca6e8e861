"""Which builder of engines is installed, and for which GPU it will build.

TensorRT if it can be imported, else TensorRT-RTX. TensorRT builds on the GPU it builds for.
TensorRT-RTX builds for any RTX generation, with or without a GPU, but its engines run on RTX
GPUs only. Nothing is built here.
"""

import importlib.util
from dataclasses import asdict, dataclass
from types import ModuleType

from tiny_align.runtime.bundle.engines import PACKAGES, engines_key, import_tensorrt
from tiny_align.runtime.errors import BackendError
from tiny_align.runtime.machine import gpu_compute_capability, l4t_release

TOOLS = ("polygraphy", "onnx", "tqdm")  # other packages that a build imports
DEFAULT_RTX_COMPUTE_CAPABILITY = 86  # if there is no GPU to ask


@dataclass(frozen=True)
class Builder:
    """An installed builder and its target."""

    package: str  # import name
    version: str
    compute_capability: int  # 87 for 8.7
    jetpack: str | None = None  # the L4T release of this machine

    @property
    def facts(self) -> dict:
        """What its engines are bound to; the runtime compares it."""
        return asdict(self)

    @property
    def key(self) -> str:
        """Name of the folder under engines/ for the engines of this builder and target."""
        return engines_key(self.facts)


def find_builder(compute_capability: int | None = None) -> Builder:
    """Find the builder that a build will use.

    Args:
        compute_capability: the target, 86 for 8.6; None: this machine's GPU or, with
            TensorRT-RTX and no GPU, 86.

    Raises:
        BackendError: no builder or a broken one is installed, or it cannot build for that target.
    """
    for package in PACKAGES:
        module = import_tensorrt(package, "Builder")
        if module is None:
            continue
        missing = [name for name in TOOLS if importlib.util.find_spec(name) is None]
        if missing:
            raise BackendError(
                f"building engines needs {', '.join(missing)}: `pip install tiny-align[trt]`"
            )
        find_target = _rtx_target if package == "tensorrt_rtx" else _tensorrt_target
        target = find_target(module, compute_capability)
        return Builder(package, module.__version__, target, l4t_release())
    raise BackendError(
        "neither TensorRT nor TensorRT-RTX is installed for this Python. On a Jetson TensorRT "
        "comes with JetPack and has no pip wheel: install tiny-align in a venv made with "
        "`python3 -m venv --system-site-packages`. Elsewhere: "
        "`pip install tiny-align[trt] tensorrt-rtx`"
    )


def _tensorrt_target(_module: ModuleType, requested: int | None) -> int:
    gpu = gpu_compute_capability()
    if gpu is None:
        raise BackendError(
            "TensorRT builds on the GPU it builds for, and the CUDA driver finds none here: build "
            "on the device. To build for an RTX GPU on this machine, use tensorrt-rtx in a venv "
            "without TensorRT"
        )
    if requested not in (None, gpu):
        raise BackendError(
            f"TensorRT builds for the GPU it runs on: expected compute capability {gpu}, got "
            f"{requested}. Build on the other device, or leave the compute capability out"
        )
    return gpu


def _rtx_target(module: ModuleType, requested: int | None) -> int:
    target = requested or gpu_compute_capability() or DEFAULT_RTX_COMPUTE_CAPABILITY
    known = []
    for name in module.ComputeCapability.__members__:
        if name.startswith("SM"):
            known.append(int(name[2:]))
    if target not in known:
        raise BackendError(
            f"TensorRT-RTX {module.__version__} does not build for compute capability {target}: "
            f"give --compute-capability with one of {', '.join(map(str, sorted(known)))}"
        )
    return target
