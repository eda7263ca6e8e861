"""Checks a model folder by its small files and its weights' headers, before anything loads it.

A folder that holds code to run, or something other than a whole model (an adapter, quantised
weights, a pointer in place of a file), is refused in one sentence that says what it is and what to
give instead. No weight is read here.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tiny_align.runtime.errors import TinyAlignError

CONFIG = "config.json"
GGUF = ".gguf"
GGUF_MAGIC = b"GGUF"  # with which such a file begins
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Of a hub id, the files that are downloaded and checked first.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "custom_generate/*")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISED_FILES = {  # a file that only a quantised checkpoint has -> what made it
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "qmodel.pt": "HQQ",
}
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the types of weights
FORMATS = {  # suffix of a weight file that transformers does not load -> what it is
    ".gguf": "GGUF, llama.cpp's format",
    ".onnx": "ONNX graphs",
    ".ort": "ONNX Runtime's graphs",
    ".h5": "TensorFlow's",
    ".msgpack": "Flax's",
    ".nemo": "a NeMo archive",
    ".tflite": "LiteRT's",
    ".litertlm": "LiteRT's",
    ".mlpackage": "Core ML's",
    ".npz": "numpy arrays",
    ".engine": "a TensorRT engine",
    ".pth": "a PyTorch pickle",
    ".pt": "a PyTorch pickle",
    ".ckpt": "a PyTorch pickle",
    ".bin": "under other names than transformers'",
    ".safetensors": "under other names than transformers'",
}
EXPECTED = (
    "give the folder of a whole transformers model, with its config.json and model.safetensors"
)
# In the name of an architecture that writes no text.
HEADS = ("Classification", "QuestionAnswering", "Reward", "MultipleChoice")

# quant_method in a configuration -> how the method is written
METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
}


def model_folder(path: str, kind: str, supported: Iterable[str]) -> Path:
    """The local folder of a model, checked; a hub id is downloaded, its small files first.

    An LLM may be a GGUF file, which is checked as it is opened (export/gguf_llm.py).

    Args:
        path: a local folder, a hub id or a GGUF file.
        kind: "LLM" or "encoder".
        supported: the model types that are taken.
    Raises:
        TinyAlignError: no such model, or one that is not whole, is not supported or has code of its
            own.
    """
    local = Path(path)
    if local.is_file():
        if kind == "LLM" and (local.suffix.lower() == GGUF or _begins_with(local, GGUF_MAGIC)):
            return local
        made = FORMATS.get(local.suffix.lower())
        what = f"a file ({made})" if made else "a file"
        raise TinyAlignError(f"{path} is {what}: {EXPECTED}")
    is_local = local.is_dir()
    may_be_hub_id = not path.startswith((".", "/", "~")) and path.count("/") <= 1
    if not is_local and not may_be_hub_id:
        raise TinyAlignError(
            f"there is no model folder {path}: give one, or a hub id (ORGANISATION/NAME)"
        )
    folder = local if is_local else _download(path, SMALL_FILES)
    _refuse_code(path, folder)
    config = _read_config(path, folder)
    _refuse_other_kinds(path, folder, config, kind, tuple(supported))
    if not is_local:
        folder = _download_weights(path, folder)
    _check_weights(path, folder)
    return folder


def _download(hub_id: str, patterns: Iterable[str], commit: str | None = None) -> Path:
    """The snapshot of a hub id, with the files of these patterns; cached ones are not asked for."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, of HTTP, of the disk
        raise damaged(hub_id, one_line(error), "Give another, or a folder") from error


def _download_weights(hub_id: str, folder: Path) -> Path:
    """Download the weights of the same commit too: only safetensors, if there are some.

    An index of shards is a small file: it is there already.
    """
    for weights, index in (WEIGHTS[:2], WEIGHTS[2:]):
        shards = _listed_shards(folder / index)
        names = [weights] if shards is None else sorted(shards)
        folder = _download(hub_id, (*SMALL_FILES, *names), folder.name)
        if any((folder / name).is_file() for name in names):
            break
    return folder


def damaged(
    path: str | Path, why: str, remedy: str = "Download it again, or give another"
) -> TinyAlignError:
    """The error of a folder or GGUF file that would be taken if it were whole."""
    kind = "GGUF file" if Path(path).is_file() else "model folder or hub id"
    return TinyAlignError(f"{path} cannot be loaded as a {kind}: {why}. {remedy}")


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split()).rstrip(".")


# --- code ---


def _refuse_code(path: str, folder: Path) -> None:
    """Refuse a folder whose files make transformers run Python of its own."""
    code = next(folder.glob("custom_generate/*.py"), None)
    if code:
        raise TinyAlignError(
            f"{path} has code of its own ({code.relative_to(folder)}), which is never run: take "
            "the folder custom_generate away, or give another model"
        )
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        for field in _auto_maps(_read_json(file)):
            raise TinyAlignError(
                f"{path} has code of its own ({field} in its {file.relative_to(folder)}), which is "
                "never run: give a model of a type that transformers has itself; if this is one, "
                "take the field out of the file"
            )


def _read_json(file: Path) -> Any:
    """A JSON file's value; None if it cannot be read, by transformers neither."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _auto_maps(value: Any, where: str = "") -> Iterator[str]:
    """The places of auto_map in a JSON value, at any depth.

    In a vocabulary it is a token, with a number.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if name == "auto_map" and inner and not isinstance(inner, int | float):
            yield f"{where}auto_map"
        yield from _auto_maps(inner, f"{where}{name}.")


# --- kind ---


def _read_config(path: str, folder: Path) -> dict[str, Any]:
    _refuse_pointers(path, sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]))
    if not (folder / CONFIG).is_file():
        _refuse_adapter(path, folder)
        raise TinyAlignError(f"{path} {_without_config(folder)}: {EXPECTED}{_or_files(folder)}")
    config = _read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise damaged(path, f"its {CONFIG} is no JSON object with a model_type")
    return config


def _refuse_pointers(path: str, files: Iterable[Path]) -> None:
    """Refuse a stand-in for a file: Git LFS's pointer, or a link to nothing."""
    for file in files:
        if file.is_symlink() and not file.exists():
            why = f"its {file.name} is a link to nothing"
            raise damaged(path, why, "Copy the folder with what its links point at (cp -rL)")
        if is_lfs_pointer(file):
            why = f"its {file.name} is a Git LFS pointer, not the file itself"
            raise damaged(path, why, "Run `git lfs pull` in the folder, or download it again")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one that was not downloaded."""
    return _begins_with(file, LFS_POINTER)


def _begins_with(file: Path, beginning: bytes) -> bool:
    try:
        with open(file, "rb") as opened:
            return opened.read(len(beginning)) == beginning
    except OSError:
        return False


def _without_config(folder: Path) -> str:
    """What a folder without config.json is."""
    if not any(folder.iterdir()):
        return "is an empty folder"
    inner = sorted(folder.glob(f"*/{CONFIG}")) or sorted(folder.glob(f"snapshots/*/{CONFIG}"))
    if inner:
        return f"has no {CONFIG}, {inner[0].parent} has one"
    weights = _other_weights(folder)
    if weights:
        return f"has no {CONFIG} and its weights are {weights}"
    return f"is no model folder, it has no {CONFIG}"


def _or_files(folder: Path) -> str:
    """The other remedy for a folder of GGUF files."""
    files = [file.name for file in sorted(folder.glob(f"*{GGUF}"))]
    if not files:
        return ""
    which = f"the file {files[0]}" if len(files) == 1 else f"one of its files {', '.join(files)}"
    return f", or for an LLM {which}"


def _refuse_adapter(path: str, folder: Path) -> None:
    if not any((folder / name).exists() for name in ADAPTER_FILES):
        return
    config = _as_object(_read_json(folder / ADAPTER_FILES[0]))
    base = config.get("base_model_name_or_path") or "some base model"
    kind = config.get("peft_type") or "PEFT"
    remedy = (
        "merge it into that with peft's merge_and_unload(), save the result and give its folder"
    )
    if (folder / CONFIG).exists():
        remedy += ", or take the files adapter_* away to export the model beside it"
    raise TinyAlignError(f"{path} is an adapter ({kind}) for {base}, not a whole model: {remedy}")


def _refuse_other_kinds(
    path: str, folder: Path, config: dict[str, Any], kind: str, supported: tuple[str, ...]
) -> None:
    """Refuse an adapter, an unsupported or quantised model, and a classifier."""
    _refuse_adapter(path, folder)
    if config["model_type"] not in supported:
        raise TinyAlignError(
            f"{path} is a {config['model_type']!r}{_describe(config)}; supported {kind}s: "
            f"{', '.join(supported)}"
        )
    made_by = _quantised_by(folder, config)
    if made_by:
        raise TinyAlignError(_quantised(path, made_by))
    architecture = str(config.get("architectures") or "").strip("[]'")
    if kind == "LLM" and any(head in architecture for head in HEADS):
        raise TinyAlignError(
            f"{path} is a {architecture}, a classifier or reward model that writes no text: give "
            "the chat model (...ForCausalLM) it was made from"
        )


def _describe(config: dict[str, Any]) -> str:
    """What a model of an unsupported type is, if its configuration tells."""
    if "vision_config" in config:
        return " (a vision-language model: give a text-only one)"
    if "audio_config" in config:
        return " (a speech-language model)"
    if config.get("is_encoder_decoder"):
        return " (an encoder-decoder)"
    return ""


def _quantised(path: str, made_by: str) -> str:
    return (
        f"{path} is a checkpoint quantised by {made_by}: give the one in full precision that it "
        "was made from; export quantises by itself (--precision, --encoder-precision)"
    )


def _quantised_by(folder: Path, config: dict[str, Any]) -> str | None:
    """The method that quantised a checkpoint, and what tells it; None for full precision."""
    parts = [config]  # a model of several parts has a configuration for each
    parts += [inner for inner in config.values() if isinstance(inner, dict)]
    for part in parts:
        for field in ("quantization_config", "compression_config", "quantization"):
            if part.get(field):
                return f"{_method(field, _as_object(part[field]))} ({field} in its {CONFIG})"
    for name, made_by in QUANTISED_FILES.items():
        if (folder / name).is_file():
            return f"{made_by} (its {name})"
    return None


def _method(field: str, quantisation: dict[str, Any]) -> str:
    method = quantisation.get("quant_method")
    if method:
        return METHODS.get(str(method), str(method))
    if any(str(name).startswith(("load_in_", "bnb_")) for name in quantisation):
        return "bitsandbytes"
    return "MLX" if field == "quantization" else "an unnamed method"


def _as_object(value: Any) -> dict[str, Any]:
    """A JSON value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


# --- weights ---


def _check_weights(path: str, folder: Path) -> None:
    """Refuse weights that are absent, cut off or quantised, by what the files' headers say."""
    name = next((name for name in WEIGHTS if _is_there(folder / name)), None)
    if name is None:
        raise damaged(path, *_without_weights(folder))
    files = _shards(path, folder, name) if name.endswith(".index.json") else [folder / name]
    _refuse_pointers(path, files)
    for file in files:
        if file.suffix == ".safetensors":
            _check_header(path, file)


def _is_there(file: Path) -> bool:
    """Whether there is a file, or a link, which may point to nothing."""
    return file.is_file() or file.is_symlink()


def _without_weights(folder: Path) -> tuple[str, str]:
    """What a folder without weights has in their place, and what to do."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        return f"it has {shards[0].name} without the index {WEIGHTS[1]}", "Download that too"
    weights = _other_weights(folder)
    if weights:
        remedy = f"Give the transformers checkpoint they were made from{_or_files(folder)}"
        return f"its weights are {weights}, expected {WEIGHTS[0]}", remedy
    return f"it has no weights, expected {WEIGHTS[0]}", "Download it again"


def _other_weights(folder: Path) -> str | None:
    """The format and the name of the first weights in a folder that transformers does not load."""
    files = sorted([*folder.iterdir(), *folder.glob("*/*")])
    for suffix, made in FORMATS.items():
        for file in files:
            if file.suffix.lower() == suffix:
                return f"{made} ({file.relative_to(folder)})"
    return None


def _shards(path: str, folder: Path, index: str) -> list[Path]:
    """The files that an index lists, all of them there."""
    names = _listed_shards(folder / index)
    is_index = names and all(Path(name).name == name for name in names)  # none outside the folder
    if not names or not is_index:
        raise damaged(path, f"its {index} is no index of weights")
    files = [folder / name for name in sorted(names)]
    absent = [file.name for file in files if not _is_there(file)]
    if absent:
        missing = f"{len(absent)} of the {len(files)} files of weights that its {index} lists"
        raise damaged(path, f"it lacks {missing}, such as {absent[0]}")
    return files


def _listed_shards(index: Path) -> set[str] | None:
    """The names of files that an index lists; None if it is no index."""
    places = _as_object(_read_json(index)).get("weight_map")
    if not isinstance(places, dict):
        return None
    return {str(name) for name in places.values()}


def _check_header(path: str, file: Path) -> None:
    """Refuse a safetensors file that is shorter or longer than its header says, or quantised."""
    header, start = _read_header(file)
    size = file.stat().st_size
    ends = [tensor.end for tensor in header.values()]
    if not ends or start + max(ends) != size:
        expected = f"{start + max(ends):,} bytes by its header" if ends else "a header"
        sizes = f"expected {expected}, got {size:,} bytes"
        raise damaged(path, f"its {file.name} is cut off or damaged ({sizes})")
    for name, tensor in sorted(header.items()):
        if tensor.n_dims > 1 and tensor.dtype not in (*FLOATS, "BOOL", "I64"):
            made_by = f"an unnamed method ({name} is {tensor.dtype})"
            raise TinyAlignError(_quantised(path, made_by))


class _StoredTensor(NamedTuple):
    """A tensor by a safetensors header."""

    dtype: str
    n_dims: int
    end: int  # bytes, after the header


def _read_header(file: Path) -> tuple[dict[str, _StoredTensor], int]:
    """What a safetensors file says of its tensors, and where their bytes begin.

    Nothing and 0 if it is no such file.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            return {}, 0
        header = opened.read(length)
    tensors = {}
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            n_dims = len(entry["shape"])
            end = int(entry["data_offsets"][1])
            tensors[name] = _StoredTensor(str(entry["dtype"]), n_dims, end)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError):
        return {}, 0
    return tensors, 8 + length
