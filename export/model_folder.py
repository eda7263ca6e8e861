"""What a model folder is, found from its small files and its weights' headers before anything loads it.

A folder that holds code to run, or something else than a whole model (an adapter, quantised weights, a pointer in
place of a file), is refused in one sentence that says what it is and what to give instead. No weight is read here.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tiny_align.runtime.errors import TinyAlignError

CONFIG = "config.json"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "custom_generate/*",
)  # of a hub id: what is looked at first
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
QUANTISED_FILES = {  # a file that only a quantised checkpoint has -> what made it
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quanto_qmap.json": "quanto",
    "qmodel.pt": "HQQ",
}
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what a weight may be
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
HEADS = (
    "Classification",
    "QuestionAnswering",
    "Reward",
    "MultipleChoice",
)  # in the name of an architecture


def model_folder(path: str, kind: str, supported: Iterable[str]) -> Path:
    """The local folder of a model, checked; a hub id is downloaded, its small files first.

    Args:
        path: a local folder or a hub id.
        kind: "LLM" or "encoder".
        supported: the model types that are taken.
    Raises:
        TinyAlignError: no such model, or one that is not whole, not supported or has code of its own.
    """
    given = Path(path)
    if given.is_file():
        made = FORMATS.get(given.suffix.lower())
        raise TinyAlignError(f"{path} is a file{(made and f' ({made})') or ''}: {EXPECTED}")
    local = given.is_dir()
    if not local and (
        path.startswith((".", "/", "~")) or path.count("/") > 1
    ):  # no hub id looks so
        raise TinyAlignError(
            f"there is no model folder {path}: give one, or a hub id (ORGANISATION/NAME)"
        )
    folder = given if local else _downloaded(path, SMALL_FILES)
    _refuse_code(path, folder)
    config = _read_config(path, folder)
    _refuse_other_kinds(path, folder, config, kind, tuple(supported))
    if not local:
        folder = _download_weights(path, folder)
    _check_weights(path, folder)
    return folder


def _downloaded(hub_id: str, patterns: Iterable[str], commit: str | None = None) -> Path:
    """The snapshot of a hub id, with the files of these patterns; what is in the cache already is not asked for."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=commit, allow_patterns=list(patterns)))
    except Exception as error:  # of the hub, of HTTP, of the disk
        raise damaged(hub_id, one_line(error), "Give another, or a folder") from error


def _download_weights(hub_id: str, folder: Path) -> Path:
    """The weights too, of the same commit: safetensors only, where there are some. An index is a small file."""
    for weights, index in (WEIGHTS[:2], WEIGHTS[2:]):
        listed = _read_json(folder / index)
        places = listed.get("weight_map") if isinstance(listed, dict) else None
        names = (
            sorted({str(name) for name in places.values()})
            if isinstance(places, dict)
            else [weights]
        )
        folder = _downloaded(hub_id, (*SMALL_FILES, *names), folder.name)
        if any((folder / name).is_file() for name in names):
            break
    return folder


def damaged(path, why: str, remedy: str = "Download it again, or give another") -> TinyAlignError:
    """The error of a folder that would be taken if it were whole."""
    return TinyAlignError(f"{path} cannot be loaded as a model folder or hub id: {why}. {remedy}")


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()).rstrip(".")


# --- code ---


def _refuse_code(path: str, folder: Path) -> None:
    """Refuse a folder by whose files transformers would run Python of its own."""
    code = next(folder.glob("custom_generate/*.py"), None)
    if code:
        raise TinyAlignError(
            f"{path} has code of its own ({code.relative_to(folder)}), which is never run: take the folder "
            "custom_generate away, or give another model"
        )
    for file in sorted([*folder.glob("*.json"), *folder.glob("*/*.json")]):
        for field in _auto_maps(_read_json(file)):
            raise TinyAlignError(
                f"{path} has code of its own ({field} in its {file.relative_to(folder)}), which is never run: give a "
                "model of a type that transformers has itself; if this is one, take the field out of the file"
            )


def _read_json(file: Path):
    """A JSON file's value; None of one that cannot be read, which transformers cannot read either."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _auto_maps(value, where: str = "") -> Iterator[str]:
    """Where in a JSON value there is an auto_map, at any depth. In a vocabulary it is a token, with a number."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return
    for name, inner in value.items():
        if name == "auto_map" and inner and not isinstance(inner, int | float):
            yield f"{where}auto_map"
        yield from _auto_maps(inner, f"{where}{name}.")


# --- what it is ---


def _read_config(path: str, folder: Path) -> dict:
    _refuse_pointers(path, sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]))
    if not (folder / CONFIG).is_file():
        _refuse_adapter(path, folder)
        raise TinyAlignError(f"{path} {_without_config(folder)}: {EXPECTED}")
    config = _read_json(folder / CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise damaged(path, f"its {CONFIG} is no JSON object with a model_type")
    return config


def _refuse_pointers(path: str, files: Iterable[Path]) -> None:
    """Refuse what stands in place of a file: Git LFS's pointer, or a link to nothing."""
    for file in files:
        if file.is_symlink() and not file.exists():
            why = f"its {file.name} is a link to nothing"
            raise damaged(path, why, "Copy the folder with what its links point at (cp -rL)")
        if _begins_with(file, LFS_POINTER):
            why = f"its {file.name} is a Git LFS pointer, not the file itself"
            raise damaged(path, why, "Run `git lfs pull` in the folder, or download it again")


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
    if inner := sorted(folder.glob(f"*/{CONFIG}")) or sorted(folder.glob(f"snapshots/*/{CONFIG}")):
        return f"has no {CONFIG}, {inner[0].parent} has one"
    if found := _other_weights(folder):
        return f"has no {CONFIG} and its weights are {found}"
    return f"is no model folder, it has no {CONFIG}"


def _refuse_adapter(path: str, folder: Path) -> None:
    if not any((folder / name).exists() for name in ADAPTER_FILES):
        return
    value = _read_json(folder / ADAPTER_FILES[0])
    value = value if isinstance(value, dict) else {}
    base = value.get("base_model_name_or_path") or "some base model"
    raise TinyAlignError(
        f"{path} is an adapter ({value.get('peft_type') or 'PEFT'}) for {base}, not a whole model: merge it into that "
        "with peft's merge_and_unload(), save the result and give its folder"
        + (
            ", or take the files adapter_* away to export the model beside it"
            if (folder / CONFIG).exists()
            else ""
        )
    )


def _refuse_other_kinds(
    path: str, folder: Path, config: dict, kind: str, supported: tuple[str, ...]
) -> None:
    _refuse_adapter(path, folder)
    if config["model_type"] not in supported:
        raise TinyAlignError(
            f"{path} is a {config['model_type']!r}{_described(config)}; supported {kind}s: {', '.join(supported)}"
        )
    if made_by := _quantised_by(folder, config):
        raise TinyAlignError(_quantised(path, made_by))
    architecture = str(config.get("architectures") or "").strip("[]'")
    if kind == "LLM" and any(head in architecture for head in HEADS):
        raise TinyAlignError(
            f"{path} is a {architecture}, a classifier or reward model that writes no text: give the chat "
            "model (...ForCausalLM) it was made from"
        )


def _described(config: dict) -> str:
    """What a model of an unsupported type is, where its configuration tells."""
    if "vision_config" in config:
        return " (a vision-language model: give a text-only one)"
    if "audio_config" in config:
        return " (a speech-language model)"
    if config.get("is_encoder_decoder"):
        return " (an encoder-decoder)"
    return ""


def _quantised(path: str, made_by: str) -> str:
    return (
        f"{path} is a checkpoint quantised by {made_by}: give the one in full precision that it was made from; "
        "export quantises by itself (--precision, --encoder-precision)"
    )


def _quantised_by(folder: Path, config: dict) -> str | None:
    for value in (config, *(inner for inner in config.values() if isinstance(inner, dict))):
        for field in ("quantization_config", "compression_config", "quantization"):
            if quantisation := value.get(field):
                return f"{_method(field, quantisation)} ({field} in its {CONFIG})"
    for name, made_by in QUANTISED_FILES.items():
        if (folder / name).is_file():
            return f"{made_by} (its {name})"
    return None


def _method(field: str, quantisation) -> str:
    quantisation = quantisation if isinstance(quantisation, dict) else {}
    if method := quantisation.get("quant_method"):
        names = {
            "gptq": "GPTQ",
            "awq": "AWQ",
            "hqq": "HQQ",
            "aqlm": "AQLM",
            "fp8": "FP8",
            "fbgemm_fp8": "FP8",
        }
        return names.get(str(method), str(method))
    if any(str(name).startswith(("load_in_", "bnb_")) for name in quantisation):
        return "bitsandbytes"
    return "MLX" if field == "quantization" else "an unnamed method"


# --- its weights ---


def _check_weights(path: str, folder: Path) -> None:
    """Refuse weights that are absent, cut off or quantised, by what the files' headers say."""
    name = next(
        (name for name in WEIGHTS if (folder / name).is_file() or (folder / name).is_symlink()),
        None,
    )
    if name is None:
        raise damaged(path, *_without_weights(folder))
    files = _shards(path, folder, name) if name.endswith(".index.json") else [folder / name]
    _refuse_pointers(path, files)
    for file in files:
        if file.suffix == ".safetensors":
            _check_header(path, file)


def _without_weights(folder: Path) -> tuple[str, str]:
    """What a folder without weights has in their place, and what to do."""
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return f"it has {shards[0].name} without the index {WEIGHTS[1]}", "Download that too"
    if found := _other_weights(folder):
        remedy = "Give the transformers checkpoint they were made from"
        return f"its weights are {found}, expected {WEIGHTS[0]}", remedy
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
    value = _read_json(folder / index)
    places = value.get("weight_map") if isinstance(value, dict) else None
    names = {str(name) for name in places.values()} if isinstance(places, dict) else set()
    if not names or any(Path(name).name != name for name in names):  # none lies outside the folder
        raise damaged(path, f"its {index} is no index of weights")
    files = [folder / name for name in sorted(names)]
    if absent := [file.name for file in files if not (file.is_file() or file.is_symlink())]:
        missing = f"{len(absent)} of the {len(files)} files of weights that its {index} lists"
        raise damaged(path, f"it lacks {missing}, such as {absent[0]}")
    return files


def _check_header(path: str, file: Path) -> None:
    header, begin = _header(file)
    end = max((end for _, _, end in header.values()), default=None)
    if end is None or begin + end != file.stat().st_size:
        expected = f"{begin + end:,} bytes by its header" if end is not None else "a header"
        given = f"expected {expected}, got {file.stat().st_size:,} bytes"
        raise damaged(path, f"its {file.name} is cut off or damaged ({given})")
    for name, (dtype, n_dims, _) in sorted(header.items()):
        if n_dims > 1 and dtype not in (*FLOATS, "BOOL", "I64"):
            raise TinyAlignError(_quantised(path, f"an unnamed method ({name} is {dtype})"))


def _header(file: Path) -> tuple[dict[str, tuple[str, int, int]], int]:
    """What a safetensors file says: tensor -> (type, number of dimensions, end), and where the bytes begin.

    Nothing of what is no such file.
    """
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            return {}, 0
        try:
            entries = json.loads(opened.read(length))
            entries.pop("__metadata__", None)
            tensors = {
                name: (str(entry["dtype"]), len(entry["shape"]), int(entry["data_offsets"][1]))
                for name, entry in entries.items()
            }
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError, IndexError):
            return {}, 0
    return tensors, 8 + length
