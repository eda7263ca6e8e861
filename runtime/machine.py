"""What this machine has: GPU, memory, name, and the state of a Jetson.

Asked of the CUDA driver and read from the kernel's files, so that nothing has to be installed and
no CUDA context is made. It does not judge: the doctor does, and the builder decides whether a
build will fit. A function that reads files takes `root`, the folder of a recorded machine in
tests. Where the paths are documented:

    /etc/nv_tegra_release, /etc/nvpmodel.conf, nvpmodel -q
                                              Jetson Linux Developer Guide (r36.4, r39.2)
    /var/lib/nvpmodel/status                  what nvpmodel writes: "pmode:0002"
    /sys/class/devfreq/*gpu*, /sys/devices/system/cpu
                                              kernel, ABI/testing/sysfs-class-devfreq, admin-guide
    /sys/class/thermal/thermal_zone*          kernel, driver-api/thermal/sysfs-api
    /sys/class/hwmon/hwmon*/oc*_event_cnt     Jetson Linux Developer Guide, throttling
    /sys/kernel/mm/transparent_hugepage       kernel, admin-guide/mm/transhuge
    /proc/meminfo, /proc/swaps, /proc/loadavg, /proc/asound
                                              proc(5); ALSA's designs/procfile
    /proc/self/cgroup, /sys/fs/cgroup         cgroups(7); kernel, admin-guide/cgroup-v2 and
                                              -v1/memory
    /proc/device-tree/model                   the board's device tree
    /usr/local/cuda/version.json, /usr/lib/*/libnvinfer.so.*
                                              files of NVIDIA's Debian packages
"""

import contextlib
import ctypes
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

COMPUTE_CAPABILITY_MAJOR = 75  # CUdevice_attribute
COMPUTE_CAPABILITY_MINOR = 76
STACK_BYTES = 8 << 20  # that a thread reserves
ARENA_BYTES = 64 << 20  # that glibc's malloc reserves for a thread
ROOT = Path("/")
MEMINFO = Path("/proc/meminfo")
CPUINFO = Path("/proc/cpuinfo")
SWAPS = Path("/proc/swaps")
STATUS = Path("/proc/self/status")
CGROUPS = Path("/proc/self/cgroup")
JETSON_MODEL = Path("/proc/device-tree/model")
L4T_RELEASE = Path("/etc/nv_tegra_release")
NVPMODEL = Path("/usr/sbin/nvpmodel")
NVPMODEL_CONFIG = Path("/etc/nvpmodel.conf")
NVPMODEL_STATUS = Path("/var/lib/nvpmodel/status")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
DEFAULT_TARGETS = (
    Path("/etc/systemd/system/default.target"),
    Path("/usr/lib/systemd/system/default.target"),
)
CUDA_VERSION = Path("/usr/local/cuda/version.json")
JETPACKS = {  # Jetson Linux -> JetPack: NVIDIA's JetPack archive
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}


def gpu_compute_capability() -> int | None:
    """Compute capability of the first GPU, 87 for 8.7; None without a GPU or without its driver."""
    cuda = _cuda_driver()
    if cuda is None:
        return None
    major = _attribute(cuda, COMPUTE_CAPABILITY_MAJOR)
    minor = _attribute(cuda, COMPUTE_CAPABILITY_MINOR)
    return None if major is None or minor is None else 10 * major + minor


def _cuda_driver() -> ctypes.CDLL | None:
    """The CUDA driver's library, initialised; None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return cuda if cuda.cuInit(0) == 0 else None


def _attribute(cuda: ctypes.CDLL, attribute: int) -> int | None:
    """A number about the first GPU; None if the driver refuses."""
    value = ctypes.c_int()
    device = ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    status = cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value if status == 0 else None


def under(root: Path, path: Path) -> Path:
    """An absolute path of the machine that lies under `root`."""
    return root / path.relative_to("/")


def read(path: Path) -> str:
    """The text of one of the kernel's files; "" if it is missing or cannot be read.

    Unbuffered: the thermal zones of an Orin's idle engines answer EAGAIN, at which Python's text
    files raise a TypeError.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read() or b"").decode(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = read(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _fields(path: Path) -> dict[str, str]:
    """A file of lines "name: value"."""
    fields = {}
    for line in read(path).splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields[name] = value
    return fields


def gpu() -> dict[str, str]:
    """The first GPU's name ("gpu") and the driver's CUDA version ("cuda", "12.6"); or empty."""
    cuda = _cuda_driver()
    device = ctypes.c_int()
    if cuda is None or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return {}
    version = ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetName(name, len(name), device)
    major, minor = version.value // 1000, version.value % 1000 // 10
    return {"gpu": name.value.decode(), "cuda": f"{major}.{minor}"}


def memory(
    names: tuple[str, ...] = ("MemTotal", "MemAvailable", "SwapFree", "CmaFree"), root: Path = ROOT
) -> dict[str, int]:
    """Bytes of each field of /proc/meminfo that there is.

    CmaFree is a Jetson's contiguous memory.
    """
    fields = _fields(under(root, MEMINFO))
    return {name: int(fields[name].split()[0]) * 1024 for name in names if name in fields}


@dataclass(frozen=True)
class Room:
    """How much memory may still be taken, by one of the limits there are."""

    free: int  # bytes
    limit: str  # for a message: "under ulimit -v", "in the control group /app (memory.max)"
    thread_bytes: int = 0  # what each thread reserves and seldom uses, if the limit counts it


@dataclass(frozen=True)
class _Cgroups:
    """Names of the files in which one version of control groups reports memory."""

    mount: Path
    limit: str
    usage: str
    caches: tuple[str, ...]  # in memory.stat: what the kernel takes back when it is short of memory


CGROUP_2 = _Cgroups(
    Path("/sys/fs/cgroup"),
    "memory.max",
    "memory.current",
    ("inactive_file", "active_file", "slab_reclaimable"),
)
CGROUP_1 = _Cgroups(
    Path("/sys/fs/cgroup/memory"),
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def memory_limits(root: Path = ROOT) -> list[Room]:
    """The memory that control groups (a container is one) and ulimit leave this process.

    A limit that is not set has no entry.
    """
    return [*_control_group_rooms(root), *_ulimit_rooms(root)]


def _control_group_rooms(root: Path) -> Iterator[Room]:
    """Those of the process's own group and the groups above it; a container sees its own as /."""
    groups = re.findall(r"^\d+:([^:]*):(/.*)$", read(under(root, CGROUPS)), re.MULTILINE)
    for controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        version = CGROUP_1 if controllers else CGROUP_2
        for group in (Path(path), *Path(path).parents):
            folder = under(root, version.mount) / group.relative_to("/")
            limit = _number(folder / version.limit)
            usage = _number(folder / version.usage)
            if limit is not None and usage is not None:
                text = read(folder / "memory.stat")
                statistics = dict(re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE))
                cached = sum(int(statistics.get(name, 0)) for name in version.caches)
                used = max(0, usage - cached)
                yield Room(max(0, limit - used), f"in the control group {group} ({version.limit})")


def _ulimit_rooms(root: Path) -> Iterator[Room]:
    try:
        import resource  # Unix's
    except ImportError:
        return
    status = _fields(under(root, STATUS))
    for kind, field, option, thread_bytes in (
        (resource.RLIMIT_AS, "VmSize", "-v", STACK_BYTES + ARENA_BYTES),
        (resource.RLIMIT_DATA, "VmData", "-d", STACK_BYTES),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and field in status:
            used = int(status[field].split()[0]) * 1024
            yield Room(max(0, limit - used), f"under ulimit {option}", thread_bytes)


def free_memory_line() -> str:
    """For a message: 'MemAvailable 5120 MiB, CmaFree 200 MiB'."""
    sizes = memory(("MemAvailable", "CmaFree"))
    parts = [f"{name} {size >> 20} MiB" for name, size in sizes.items()]
    return ", ".join(parts) or "free memory unknown"


def describe(root: Path = ROOT) -> dict[str, str | int]:
    """The stamp of a measurement: system, cores, processor; a Jetson's model, L4T and JetPack."""
    stamp: dict[str, str | int] = {
        "system": platform.platform(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
    }
    models = re.findall(r"^model name\s*: (.*)", read(under(root, CPUINFO)), re.MULTILINE)
    release = l4t_release(root)
    found = {
        "processor": models[0] if models else None,
        "jetson": jetson_model(root),
        "l4t": release,
        "jetpack": JETPACKS.get(release) if release else None,
    }
    for name, value in found.items():
        if value:
            stamp[name] = value
    return stamp


# --- a Jetson ---


def jetson_model(root: Path = ROOT) -> str | None:
    """The board's name, "NVIDIA Jetson Orin Nano ..."; None on other machines."""
    model = read(under(root, JETSON_MODEL))
    return model if "jetson" in model.lower() else None


def l4t_release(root: Path = ROOT) -> str | None:
    """Release of Jetson Linux, "36.4.3" (a JetPack has one); None elsewhere."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", read(under(root, L4T_RELEASE)))
    return f"{found[1]}.{found[2]}" if found else None


@dataclass(frozen=True)
class PowerMode:
    """nvpmodel's mode, and the one with the fewest limits."""

    name: str  # "25W", "MAXN_SUPER"
    fastest: str | None  # None: not known
    fastest_id: int | None


def power_mode(root: Path = ROOT) -> PowerMode | None:
    """What nvpmodel says, or else what it has written; None if there is neither."""
    config = read(under(root, NVPMODEL_CONFIG))
    modes = {}
    for number, mode in re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", config):
        modes[int(number)] = mode
    name = _current_power_mode(under(root, NVPMODEL))
    written = re.match(r"pmode:(\d+)", read(under(root, NVPMODEL_STATUS)))
    if name is None and written:
        name = modes.get(int(written[1]), written[1])
    if name is None:
        return None
    if not modes:
        return PowerMode(name, None, None)
    fastest = max(modes, key=lambda number: _watts(modes[number]))
    return PowerMode(name, modes[fastest], fastest)


def _watts(mode: str) -> float:
    """A mode's power budget, by its name; MAXN has no limit."""
    found = re.search(r"(\d+)W", mode)
    if found:
        return float(found[1])
    return float("inf") if mode.startswith("MAXN") else 0.0


def _current_power_mode(nvpmodel: Path) -> str | None:
    try:
        done = subprocess.run(
            [nvpmodel, "-q"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"NV Power Mode: (\S+)", done.stdout)
    return found[1] if found else None


@dataclass(frozen=True)
class Clock:
    """A clock and the range that it may take, in Hz."""

    now: int
    min: int
    max: int

    @property
    def locked(self) -> bool:
        return self.min == self.max


def gpu_clock(root: Path = ROOT) -> Clock | None:
    """The GPU's, if the kernel scales it (a Jetson)."""
    for device in sorted(under(root, Path("/sys/class/devfreq")).glob("*gpu*")):
        now = _number(device / "cur_freq")
        min_ = _number(device / "min_freq")
        max_ = _number(device / "max_freq")
        if now is not None and min_ is not None and max_ is not None:
            return Clock(now, min_, max_)
    return None


def cpu_mhz(root: Path = ROOT) -> float | None:
    """The mean of the cores' clocks at this moment; None if the kernel does not have it."""
    paths = under(root, Path("/sys/devices/system/cpu")).glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    clocks = []
    for path in paths:
        khz = _number(path)
        if khz:
            clocks.append(khz / 1000)
    if not clocks:
        listed = re.findall(r"^cpu MHz\s*: ([\d.]+)", read(under(root, CPUINFO)), re.MULTILINE)
        clocks = [float(mhz) for mhz in listed]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def load(root: Path = ROOT) -> float | None:
    """The mean number of processes that wanted to run, over the last minute."""
    averages = read(under(root, Path("/proc/loadavg"))).split()
    return float(averages[0]) if averages else None


def cores(root: Path = ROOT) -> tuple[str, str]:
    """Which cores are in use and which there are, "0-3" and "0-5"; "" for unknown."""
    folder = under(root, Path("/sys/devices/system/cpu"))
    return read(folder / "online"), read(folder / "present")


@dataclass(frozen=True)
class Temperature:
    """A thermal zone, in degrees Celsius."""

    zone: str
    celsius: float
    limit: float  # at which the kernel begins to slow the machine down


def temperatures(root: Path = ROOT, default_limit: float = 95.0) -> list[Temperature]:
    """Every zone that can be read; one of an engine that is off cannot."""
    found = []
    for zone in sorted(under(root, Path("/sys/class/thermal")).glob("thermal_zone*")):
        value = _number(zone / "temp")
        if value is not None and value > 0:
            limit = min(_slowing_trips(zone), default=default_limit)
            found.append(Temperature(read(zone / "type"), value / 1000, limit))
    return found


def _slowing_trips(zone: Path) -> list[float]:
    """Temperatures at which the kernel slows the machine down; those below 60 degrees are fans'."""
    trips = []
    for path in zone.glob("trip_point_*_temp"):
        kind = read(path.with_name(path.name.replace("_temp", "_type")))
        value = _number(path) or 0
        if kind in ("passive", "hot", "critical") and value >= 60_000:
            trips.append(value / 1000)
    return trips


def power_shortages(root: Path = ROOT) -> int | None:
    """How often a Jetson has slowed down since its start; None elsewhere.

    The causes are under-voltage and over-current.
    """
    counts = []
    for path in under(root, Path("/sys/class/hwmon")).glob("hwmon*/oc*_event_cnt"):
        count = _number(path)
        if count is not None:
            counts.append(count)
    return sum(counts) if counts else None


# --- memory, sound and NVIDIA's software, anywhere ---


def swaps(root: Path = ROOT) -> dict[str, int]:
    """Bytes of every swap area in use: a device or a file; /dev/zram* is compressed memory."""
    rows = [line.split() for line in read(under(root, SWAPS)).splitlines()[1:]]
    return {row[0]: int(row[2]) * 1024 for row in rows}


def huge_pages(root: Path = ROOT) -> str | None:
    """The kernel's setting for transparent huge pages: "always", "madvise" or "never"."""
    found = re.search(r"\[(\w+)\]", read(under(root, HUGE_PAGES)))
    return found[1] if found else None


def starts_a_desktop(root: Path = ROOT) -> bool | None:
    """Whether systemd starts a desktop with the machine; None without systemd."""
    for target in DEFAULT_TARGETS:
        with contextlib.suppress(OSError):
            return Path(os.readlink(under(root, target))).name == "graphical.target"
    return None


def microphones(root: Path = ROOT) -> list[str]:
    """Names of the sound cards that record. A Jetson's own record from its pins only: left out."""
    folder = under(root, Path("/proc/asound"))
    recording = set()
    for number in re.findall(r"^(\d+)-\d+: .*capture", read(folder / "pcm"), re.MULTILINE):
        recording.add(int(number))
    cards = re.findall(r"^\s*(\d+) \[\S*\s*\]: (\S+) - (.*)", read(folder / "cards"), re.MULTILINE)
    names = []
    for number, driver, name in cards:
        if int(number) in recording and not driver.startswith("tegra"):
            names.append(name)
    return names


def cuda_toolkit(root: Path = ROOT) -> str | None:
    """Version of the CUDA toolkit, "12.6.11"; None without one."""
    try:
        return json.loads(read(under(root, CUDA_VERSION)))["cuda"]["version"]
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class SystemTensorRT:
    """TensorRT of the system's packages."""

    version: str  # "10.3.0"
    pythons: tuple[str, ...]  # "python3.10": whose bindings are installed


def system_tensorrt(root: Path = ROOT) -> SystemTensorRT | None:
    """What JetPack's Debian packages have installed, whether or not this Python sees it."""
    versions = []
    for library in under(root, Path("/usr/lib")).glob("*-linux-gnu/libnvinfer.so.*.*"):
        found = re.search(r"\.so\.(\d+\.\d+\.\d+)", library.name)
        if found:
            versions.append(found[1])
    if not versions:
        return None
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    bindings = under(root, Path("/usr/lib")).glob("python3*/dist-packages/tensorrt")
    pythons = sorted(path.parents[1].name for path in bindings)
    return SystemTensorRT(newest, tuple(pythons))
