"""What this machine has: its GPU's compute capability, its memory, its name, and what a Jetson tells of itself.

Asked of the CUDA driver and read from the kernel's files, so that nothing has to be installed and no CUDA context is
made. It does not judge: doctor.py does, and the builder decides whether a build will fit. What reads files takes
`root`, under which a recorded machine may lie. Where the paths are documented:

    /etc/nv_tegra_release, /etc/nvpmodel.conf, nvpmodel -q      Jetson Linux Developer Guide (r36.4, r39.2)
    /var/lib/nvpmodel/status                                    what nvpmodel writes: "pmode:0002"
    /sys/class/devfreq/*gpu*, /sys/devices/system/cpu           kernel, ABI/testing/sysfs-class-devfreq, admin-guide
    /sys/class/thermal/thermal_zone*                            kernel, driver-api/thermal/sysfs-api
    /sys/class/hwmon/hwmon*/oc*_event_cnt                       Jetson Linux Developer Guide, throttling
    /sys/kernel/mm/transparent_hugepage                         kernel, admin-guide/mm/transhuge
    /proc/meminfo, /proc/swaps, /proc/loadavg, /proc/asound     proc(5); ALSA's designs/procfile
    /proc/self/cgroup, /sys/fs/cgroup                           cgroups(7); kernel, admin-guide/cgroup-v2 and -v1/memory
    /proc/device-tree/model                                     the board's device tree
    /usr/local/cuda/version.json, /usr/lib/*/libnvinfer.so.*    files of NVIDIA's Debian packages
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

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
STACK_BYTES, ARENA_BYTES = (
    8 << 20,
    64 << 20,
)  # that a thread reserves: its stack, and where glibc's malloc serves it
ROOT = Path("/")
MEMINFO, CPUINFO, SWAPS = Path("/proc/meminfo"), Path("/proc/cpuinfo"), Path("/proc/swaps")
STATUS, CGROUPS = Path("/proc/self/status"), Path("/proc/self/cgroup")
JETSON_MODEL, L4T_RELEASE = Path("/proc/device-tree/model"), Path("/etc/nv_tegra_release")
NVPMODEL, NVPMODEL_CONFIG = Path("/usr/sbin/nvpmodel"), Path("/etc/nvpmodel.conf")
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
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) != 0:
        return None
    major, minor = (
        _attribute(cuda, COMPUTE_CAPABILITY_MAJOR),
        _attribute(cuda, COMPUTE_CAPABILITY_MINOR),
    )
    return None if major is None or minor is None else 10 * major + minor


def _attribute(cuda, attribute: int) -> int | None:
    value, device = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    return (
        value.value
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0
        else None
    )


def under(root: Path, path: Path) -> Path:
    """An absolute path of the machine that lies under `root`."""
    return root / path.relative_to("/")


def read(path: Path) -> str:
    """The text of a file of the kernel's; "" where it is missing or refuses to be read.

    Unbuffered: the thermal zones of an Orin's idle engines answer EAGAIN, on which Python's text files fail with a
    TypeError.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read() or b"").decode(errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = read(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


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
    return {
        "gpu": name.value.decode(),
        "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def memory(
    names: tuple[str, ...] = ("MemTotal", "MemAvailable", "SwapFree", "CmaFree"), root: Path = ROOT
) -> dict[str, int]:
    """Bytes of each of /proc/meminfo's fields that the kernel tells; CmaFree is a Jetson's contiguous memory."""
    fields = dict(
        line.split(":", 1) for line in read(under(root, MEMINFO)).splitlines() if ":" in line
    )
    return {name: int(fields[name].split()[0]) * 1024 for name in names if name in fields}


@dataclass(frozen=True)
class Room:
    """How much memory may still be taken, by one of the limits there are."""

    free: int  # bytes
    limit: str  # for people: "under ulimit -v", "in the control group /app (memory.max)"
    thread_bytes: int = 0  # what each thread reserves and seldom uses, where the limit counts it


@dataclass(frozen=True)
class _Cgroups:
    """Where a version of control groups keeps what it knows of memory."""

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
    """What this process's control groups and ulimit leave it, where they limit memory; a container is such a group."""
    return [*_control_group_rooms(root), *_ulimit_rooms(root)]


def _control_group_rooms(root: Path) -> Iterator[Room]:
    """The process's own group and all above it, as far as they are seen from here: a container sees its own as /."""
    for controllers, path in re.findall(
        r"^\d+:([^:]*):(/.*)$", read(under(root, CGROUPS)), re.MULTILINE
    ):
        if not controllers or "memory" in controllers.split(","):
            version = CGROUP_1 if controllers else CGROUP_2
            for group in (Path(path), *Path(path).parents):
                yield from _group_room(
                    under(root, version.mount) / group.relative_to("/"), group, version
                )


def _group_room(folder: Path, group: Path, version: _Cgroups) -> Iterator[Room]:
    limit, used = _number(folder / version.limit), _number(folder / version.usage)
    if limit is not None and used is not None:
        told = dict(re.findall(r"^(\w+) (\d+)$", read(folder / "memory.stat"), re.MULTILINE))
        cached = sum(int(told.get(name, 0)) for name in version.caches)
        yield Room(
            max(0, limit - max(0, used - cached)), f"in the control group {group} ({version.limit})"
        )


def _ulimit_rooms(root: Path) -> Iterator[Room]:
    try:
        import resource  # Unix's
    except ImportError:
        return
    status = dict(
        line.split(":", 1) for line in read(under(root, STATUS)).splitlines() if ":" in line
    )
    for kind, field, option, thread_bytes in (
        (resource.RLIMIT_AS, "VmSize", "-v", STACK_BYTES + ARENA_BYTES),
        (resource.RLIMIT_DATA, "VmData", "-d", STACK_BYTES),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and field in status:
            used = int(status[field].split()[0]) * 1024
            yield Room(max(0, limit - used), f"under ulimit {option}", thread_bytes)


def free_memory_line() -> str:
    """For people: 'MemAvailable 5120 MiB, CmaFree 200 MiB'."""
    told = [
        f"{name} {size >> 20} MiB" for name, size in memory(("MemAvailable", "CmaFree")).items()
    ]
    return ", ".join(told) or "free memory unknown"


def describe(root: Path = ROOT) -> dict[str, str | int]:
    """System, cores, processor and, on a Jetson, its model, L4T release and JetPack: the stamp of a measurement."""
    described = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    models = re.findall(r"^model name\s*: (.*)", read(under(root, CPUINFO)), re.MULTILINE)
    release = l4t_release(root)
    told = {
        "processor": models[0] if models else None,
        "jetson": jetson_model(root),
        "l4t": release,
        "jetpack": JETPACKS.get(release),
    }
    return described | {name: value for name, value in told.items() if value}


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
    fastest: str | None  # None: not told
    fastest_id: int | None


def power_mode(root: Path = ROOT) -> PowerMode | None:
    """What nvpmodel says, or else what it has written; None where there is neither."""
    modes = {int(number): name for number, name in _power_modes(root)}
    name = _asked_power_mode(under(root, NVPMODEL))
    written = re.match(r"pmode:(\d+)", read(under(root, NVPMODEL_STATUS)))
    if name is None and written:
        name = modes.get(int(written[1]), written[1])
    if name is None:
        return None
    fastest = max(modes, key=lambda number: _watts(modes[number]), default=None)
    return PowerMode(name, modes.get(fastest), fastest)


def _power_modes(root: Path) -> list[tuple[str, str]]:
    return re.findall(
        r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read(under(root, NVPMODEL_CONFIG))
    )


def _watts(mode: str) -> float:
    """A mode's budget; MAXN has none."""
    found = re.search(r"(\d+)W", mode)
    return float(found[1]) if found else float("inf") if mode.startswith("MAXN") else 0.0


def _asked_power_mode(nvpmodel: Path) -> str | None:
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
    least: int
    greatest: int

    @property
    def locked(self) -> bool:
        return self.least == self.greatest


def gpu_clock(root: Path = ROOT) -> Clock | None:
    """The GPU's, where the kernel scales it (a Jetson)."""
    for device in sorted(under(root, Path("/sys/class/devfreq")).glob("*gpu*")):
        told = [_number(device / name) for name in ("cur_freq", "min_freq", "max_freq")]
        if None not in told:
            return Clock(*told)
    return None


def cpu_mhz(root: Path = ROOT) -> float | None:
    """The mean of the cores' clocks at this moment; None where the kernel does not tell."""
    told = re.findall(r"^cpu MHz\s*: ([\d.]+)", read(under(root, CPUINFO)), re.MULTILINE)
    paths = under(root, Path("/sys/devices/system/cpu")).glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    scaled = [khz / 1000 for path in paths if (khz := _number(path))]
    clocks = scaled or [float(mhz) for mhz in told]
    return round(sum(clocks) / len(clocks), 1) if clocks else None


def load(root: Path = ROOT) -> float | None:
    """How many processes wanted to run, over the last minute."""
    told = read(under(root, Path("/proc/loadavg"))).split()
    return float(told[0]) if told else None


def cores(root: Path = ROOT) -> tuple[str, str]:
    """Which cores are in use and which there are, "0-3" and "0-5"; "" for unknown."""
    folder = under(root, Path("/sys/devices/system/cpu"))
    return read(folder / "online"), read(folder / "present")


@dataclass(frozen=True)
class Temperature:
    """A thermal zone, in degrees Celsius."""

    zone: str
    celsius: float
    limit: float  # where the kernel begins to slow the machine down


def temperatures(root: Path = ROOT, default_limit: float = 95.0) -> list[Temperature]:
    """Every zone that can be read; one of an engine that is off cannot."""
    told = []
    for zone in sorted(under(root, Path("/sys/class/thermal")).glob("thermal_zone*")):
        value = _number(zone / "temp")
        if value is not None and value > 0:
            trips = [_number(trip) or 0 for trip in zone.glob("trip_point_*_temp") if _slows(trip)]
            limit = min(
                (trip / 1000 for trip in trips if trip >= 60_000), default=default_limit
            )  # others are fans'
            told.append(Temperature(read(zone / "type"), value / 1000, limit))
    return told


def _slows(trip: Path) -> bool:
    return read(trip.with_name(trip.name.replace("_temp", "_type"))) in (
        "passive",
        "hot",
        "critical",
    )


def power_shortages(root: Path = ROOT) -> int | None:
    """How often a Jetson has slowed down since its start for under-voltage or over-current; None elsewhere."""
    counts = [
        _number(p) for p in under(root, Path("/sys/class/hwmon")).glob("hwmon*/oc*_event_cnt")
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


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
    """Names of the sound cards that record; a Jetson's own ones record from its pins only and do not count."""
    folder = under(root, Path("/proc/asound"))
    cards = re.findall(r"^\s*(\d+) \[\S*\s*\]: (\S+) - (.*)", read(folder / "cards"), re.MULTILINE)
    records = {
        int(found[1])
        for found in re.finditer(r"^(\d+)-\d+: .*capture", read(folder / "pcm"), re.MULTILINE)
    }
    return [
        name
        for number, driver, name in cards
        if int(number) in records and not driver.startswith("tegra")
    ]


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
    libraries = under(root, Path("/usr/lib")).glob("*-linux-gnu/libnvinfer.so.*.*")
    versions = {
        found[1] for p in libraries if (found := re.search(r"\.so\.(\d+\.\d+\.\d+)", p.name))
    }
    if not versions:
        return None
    bindings = under(root, Path("/usr/lib")).glob("python3*/dist-packages/tensorrt")
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    return SystemTensorRT(newest, tuple(sorted(p.parents[1].name for p in bindings)))
