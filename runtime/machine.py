"""What this machine has: its GPU's compute capability, its memory, its name.

Asked of the CUDA driver and the kernel themselves, so that nothing has to be installed and no CUDA context is made.
It does not judge whether a build will fit.
"""

import ctypes
import os
import platform
import re
from pathlib import Path

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
MEMINFO, CPUINFO = Path("/proc/meminfo"), Path("/proc/cpuinfo")
JETSON_MODEL, L4T_RELEASE = Path("/proc/device-tree/model"), Path("/etc/nv_tegra_release")


def gpu_compute_capability() -> int | None:
    """Compute capability of the first GPU, 87 for 8.7; None without a GPU or without its driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) != 0:
        return None
    major, minor = _attribute(cuda, COMPUTE_CAPABILITY_MAJOR), _attribute(cuda, COMPUTE_CAPABILITY_MINOR)
    return None if major is None or minor is None else 10 * major + minor


def _attribute(cuda, attribute: int) -> int | None:
    value, device = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    return value.value if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0 else None


def gpu() -> dict[str, str]:
    """The first GPU's name ("gpu") and the CUDA version its driver is for ("cuda", "12.6"); empty without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    version, device, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return {}
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetName(name, len(name), device)
    return {"gpu": name.value.decode(), "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}"}


def memory(names: tuple[str, ...] = ("MemTotal", "MemAvailable", "SwapFree", "CmaFree")) -> dict[str, int]:
    """Bytes of each of /proc/meminfo's fields that the kernel tells; CmaFree is a Jetson's contiguous memory."""
    if not MEMINFO.is_file():
        return {}
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in names if name in fields}


def describe() -> dict[str, str | int]:
    """System, cores, processor and, on a Jetson, its model and L4T release: the stamp of a measurement."""
    described = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()}
    if CPUINFO.is_file():
        models = [
            line.split(":")[1].strip() for line in CPUINFO.read_text().splitlines() if line.startswith("model name")
        ]
        described |= {"processor": models[0]} if models else {}
    if JETSON_MODEL.is_file():
        described["jetson"] = JETSON_MODEL.read_text().strip("\0\n")
    if L4T_RELEASE.is_file():
        described["l4t"] = L4T_RELEASE.read_text().splitlines()[0]
    return described


def l4t_release() -> str | None:
    """Release of Jetson Linux, "36.4.3" (a JetPack has one); None elsewhere."""
    if not L4T_RELEASE.is_file():
        return None
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", L4T_RELEASE.read_text())
    return f"{found[1]}.{found[2]}" if found else None


def free_memory_line() -> str:
    """For people: 'MemAvailable 5120 MiB, CmaFree 200 MiB'."""
    told = [f"{name} {size >> 20} MiB" for name, size in memory(("MemAvailable", "CmaFree")).items()]
    return ", ".join(told) or "free memory unknown"
