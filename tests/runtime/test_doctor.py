"""What the doctor finds on recorded machines (machines/*.txt), and that each remedy fits its fault."""

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiny_align.runtime import machine
from tiny_align.runtime.commands.doctor import examine
from tiny_align.runtime.findings import Finding, Subject

MACHINES = Path(__file__).parent / "machines"
PYTHONS = {"jetpack-6.2": "3.10.12", "jetpack-7.2": "3.12.3"}
TJ = "/sys/class/thermal/thermal_zone8/"


def write(root: Path, path: str, content: str) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    if path == str(machine.NVPMODEL):
        file.touch(mode=0o755)
    file.write_text(content)


@pytest.fixture
def recorded(tmp_path):
    """Unpack a recorded machine: recorded(name) -> Subject. A path with `->` is a link."""

    def unpack(name: str) -> Subject:
        for entry in (MACHINES / f"{name}.txt").read_text().split("\n== ")[1:]:
            path, _, content = entry.partition("\n")
            path, _, target = path.partition(" -> ")
            if target:
                (tmp_path / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path.lstrip("/")).symlink_to(target)
            else:
                write(tmp_path, path, content)
        return Subject(87, tmp_path, (str(tmp_path / "venv"),), PYTHONS[name])

    return unpack


def found(subject: Subject) -> dict[str, Finding]:
    findings = examine(subject)
    assert len({f.what for f in findings}) == len(findings)
    return {f.what: f for f in findings}


def wrong(subject: Subject) -> dict[str, Finding]:
    return {what: f for what, f in found(subject).items() if f.ok is False}


def test_findings_of_a_board_as_flashed(recorded):
    findings = found(recorded("jetpack-6.2"))
    assert findings["JetPack"].value == "6.2 (Jetson Linux 36.4.3)" and findings["JetPack"].ok
    assert findings["GPU"].value == "compute capability 8.7"
    assert findings["CUDA"].value == "12.6.11"
    assert findings["PyTorch"] == Finding("PyTorch", "2.8.0, CUDA 12.6", True)
    assert findings["ONNX Runtime"] == Finding("ONNX Runtime", "onnxruntime 1.23.0: CPU", True)
    assert findings["power mode"].value == "25W"
    assert findings["GPU clock"].value == "306 MHz of 306 to 918"
    assert findings["temperature"].value == "53 °C at tj-thermal, slowed down from 99"
    assert findings["memory"].value == "5.2 GiB available of 7.4"
    assert findings["huge pages"].value == "always"
    assert findings["microphone"].value == "none"


def test_each_fault_of_a_board_as_flashed_has_its_remedy(recorded):
    remedies = {
        "TensorRT": "--system-site-packages",
        "power mode": "sudo nvpmodel -m 2",
        "desktop": "sudo systemctl set-default multi-user.target",
        "contiguous memory": "cma=950M",
        "swap": "NVMe",
    }
    faults = wrong(recorded("jetpack-6.2"))
    assert set(faults) == set(remedies)
    assert all(words in faults[what].remedy for what, words in remedies.items()), faults


def test_nothing_is_wrong_with_a_board_set_up_as_advised(recorded):
    subject = recorded("jetpack-7.2")
    assert wrong(subject) == {}
    findings = found(subject)
    assert findings["JetPack"].value == "7.2 (Jetson Linux 39.2.0)"
    assert findings["TensorRT"].value == "10.16.2.10"
    assert findings["power mode"].value == "MAXN_SUPER"
    assert findings["GPU clock"].value == "1020 MHz, locked"
    assert findings["microphone"].value == "USB PnP Sound Device"
    assert "desktop" not in findings
    assert findings["PyTorch"].ok is None and "docs/jetson.md" in findings["PyTorch"].remedy


FAULTS = {  # path, what is written there, what is then wrong, words of the remedy
    "an old JetPack": (
        "/etc/nv_tegra_release",
        "# R35 (release), REVISION: 4.1",
        "JetPack",
        "flash JetPack 6.2 or 7.2",
    ),
    "a limited mode": (
        "/var/lib/nvpmodel/status",
        "pmode:0000",
        "power mode",
        "sudo nvpmodel -m 2",
    ),
    "a weak power supply": (
        "/sys/class/hwmon/hwmon3/oc1_event_cnt",
        "7",
        "power supply",
        "stronger power supply",
    ),
    "heat": (TJ + "temp", "97500", "temperature", "fan"),
    "little memory": (
        "/proc/meminfo",
        "MemTotal: 7795236 kB\nMemAvailable: 512000 kB",
        "memory",
        "close other programs",
    ),
    "little contiguous memory": (
        "/proc/meminfo",
        "MemTotal: 7795236 kB\nMemAvailable: 6921744 kB\nCmaTotal: 262144 kB\nCmaFree: 1000 kB",
        "contiguous memory",
        "extlinux.conf",
    ),
    "swap in memory only": (
        "/proc/swaps",
        "Filename\n/dev/zram0 partition 8000000 0 5",
        "swap",
        "NVMe",
    ),
    "two ONNX Runtimes": (
        "/venv/onnxruntime_gpu-1.24.0.dist-info/METADATA",
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.24.0",
        "ONNX Runtime",
        "pip uninstall onnxruntime onnxruntime-gpu",
    ),
    "an old TensorRT": (
        "/venv/tensorrt-10.16.2.10.dist-info/METADATA",
        "Metadata-Version: 2.1\nName: tensorrt\nVersion: 8.6.2",
        "TensorRT",
        "10.3 or later",
    ),
}


@pytest.mark.parametrize(("path", "content", "what", "remedy"), FAULTS.values(), ids=FAULTS)
def test_one_fault_is_found_alone(recorded, path, content, what, remedy):
    subject = recorded("jetpack-7.2")
    write(subject.root, path, content)
    faults = wrong(subject)
    assert list(faults) == [what] and remedy in faults[what].remedy


def test_pytorch_for_another_cuda_is_found(recorded):
    subject = recorded("jetpack-6.2")
    write(subject.root, "/venv/torch/version.py", "cuda: Optional[str] = '13.0'\n")
    assert "CUDA 12.6.11" in wrong(subject)["PyTorch"].remedy
    write(subject.root, "/venv/torch/version.py", "cuda: Optional[str] = None\n")
    assert found(subject)["PyTorch"].value == "2.8.0, for the CPU"


def test_tensorrt_for_another_python_is_found(recorded):
    subject = replace(recorded("jetpack-6.2"), python="3.11.9")
    assert "is for python3.10, this is python3.11" in wrong(subject)["TensorRT"].value


def test_a_jetson_without_tensorrt_gets_the_command_that_installs_it(recorded):
    subject = recorded("jetpack-6.2")
    next((subject.root / "usr/lib").glob("*/libnvinfer*")).unlink()
    assert wrong(subject)["TensorRT"].remedy == "sudo apt install nvidia-jetpack"


def test_tensorrt_is_found_if_the_venv_shares_the_systems_packages(recorded):
    subject = recorded("jetpack-6.2")
    system = str(subject.root / "usr/lib/python3.10/dist-packages")
    assert found(replace(subject, packages=(*subject.packages, system)))["TensorRT"] == Finding(
        "TensorRT", "10.3.0", True
    )


def test_a_missing_gpu_is_a_fault_on_a_jetson_only(recorded, tmp_path):
    assert (
        "--runtime nvidia"
        in wrong(replace(recorded("jetpack-7.2"), compute_capability=None))["GPU"].remedy
    )
    assert found(Subject(None, tmp_path / "elsewhere"))["GPU"].ok is None


def test_a_container_on_a_board_has_no_faults_for_files_it_does_not_see(recorded):
    subject = recorded("jetpack-7.2")
    for folder in ("etc", "var"):
        shutil.rmtree(subject.root / folder)
    assert subject.jetson and wrong(subject) == {}
    assert found(subject)["JetPack"].value.startswith("unknown")


def test_onnx_runtimes_providers_are_found_by_its_libraries(recorded):
    subject = recorded("jetpack-6.2")
    write(subject.root, "/venv/onnxruntime/capi/libonnxruntime_providers_cuda.so", "")
    assert found(subject)["ONNX Runtime"].value == "onnxruntime 1.23.0: CUDA, CPU"


def test_a_machine_without_any_of_the_files_is_examined(tmp_path):
    findings = found(Subject(None, tmp_path, (str(tmp_path),)))
    assert [what for what, f in findings.items() if f.ok is False] == ["ONNX Runtime"]
    assert not {"JetPack", "power mode", "memory", "contiguous memory"} & set(findings)


def test_what_a_board_needs_is_no_fault_of_a_laptop(tmp_path):
    for path, content in {
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU @ 2.4 GHz\n",
        "/proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\nCmaTotal: 0 kB\n",
        "/sys/class/thermal/thermal_zone0/type": "acpitz",
        "/sys/class/thermal/thermal_zone0/temp": "61000",
        "/sys/class/thermal/thermal_zone0/trip_point_0_type": "passive",
        "/sys/class/thermal/thermal_zone0/trip_point_0_temp": "50000",  # where a fan begins to turn
        "/proc/asound/cards": " 0 [PCH            ]: HDA-Intel - HDA Intel PCH\n                      at 0x1 irq 2\n",
        "/proc/asound/pcm": "00-00: ALC257 Analog : ALC257 Analog : playback 1 : capture 1\n",
    }.items():
        write(tmp_path, path, content)
    findings = found(Subject(None, tmp_path))
    assert not [f for f in findings.values() if f.ok is False]
    assert findings["machine"].value.startswith("Some CPU @ 2.4 GHz")
    assert findings["microphone"].value == "HDA Intel PCH"
    assert findings["temperature"].ok and findings["swap"].ok is None


def test_a_thermal_zone_that_cannot_be_read_is_left_out(monkeypatch, recorded):
    """The kernel answers EAGAIN there, and an unbuffered read then returns None."""
    root = recorded("jetpack-6.2").root
    off = contextlib.nullcontext(SimpleNamespace(read=lambda: None))
    opened = lambda path, *a, **k: off if path.name == "temp" else open(path, *a, **k)  # noqa: E731
    monkeypatch.setattr(machine, "open", opened, raising=False)
    assert machine.temperatures(root) == []


def test_a_machine_is_described(recorded):
    stamp = machine.describe(recorded("jetpack-6.2").root)
    assert (stamp["l4t"], stamp["jetpack"]) == ("36.4.3", "6.2")
    assert stamp["jetson"].startswith("NVIDIA Jetson Orin Nano")
