"""Pretrained models that packages of the Python package index bring, as checkpoints.

    python -m tiny_align.reference.pretrained [--out reference/pretrained] [NAME ...]

Each becomes a folder that `tiny-align export` and transformers load: config.json,
model.safetensors, tokenizer and front end, with the license and pretrained.json, which says where
it comes from. GGUF and .ort files stay beside the checkpoint made of them. Nothing of it is
committed. A model that is there and whole is not made again, and no file is fetched twice.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tiny_align.reference.packages import PackagedFile, PackageError, fetch, is_whole
from tiny_align.reference.pretrained_models import MODELS, Model
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.files import sha256, write_errors, write_json, written_folder

if TYPE_CHECKING:
    from tqdm import tqdm

RECIPE = 1  # to be raised when a checkpoint is made differently
RECORD = "pretrained.json"
LOG = "pretrained.log"
LOCK = ".lock"
NEEDED = ("torch", "transformers", "safetensors", "onnxruntime", "gguf", "filelock", "tqdm")
REFUSED = 2  # exit status
INTERRUPTED = 128 + 2  # as a shell reports SIGINT


def make_all(models: Sequence[Model], out: Path, work: Path) -> dict[str, Any]:
    """Make the models that are not there yet; returns the document of the command.

    A model whose package is withdrawn or changed does not keep the others from being made.

    Args:
        out: folder of the models.
        work: folder of the fetched files and the log.
    Raises:
        TinyAlignError: no network, no room, or another process is making models in `out`.
    """
    from filelock import FileLock, Timeout

    for folder in (out, work):
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK, timeout=0):
            _remove_remains(out, work)
            with write_errors(work), open(work / LOG, "w", encoding="utf-8") as log:
                return _make_missing(models, out, work, log)
    except Timeout as error:
        raise TinyAlignError(
            f"another process is making models in {out}: wait until it has finished"
        ) from error


def _remove_remains(out: Path, work: Path) -> None:
    """Remove the unfinished folders of a process that was killed."""
    for folder in [*out.glob(".*-*"), *work.glob(".pip-*")]:
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _make_missing(models: Sequence[Model], out: Path, work: Path, log: TextIO) -> dict[str, Any]:
    from tqdm import tqdm

    missing = []
    n_steps = 0
    for model in models:
        if not is_complete(model, out / model.name):
            missing.append(model)
            n_steps += len(model.packages) + 1
    seconds = {}
    failed = {}
    with (
        _libraries_write_to(log),
        tqdm(
            total=n_steps, desc="pretrained", unit="step", file=sys.stderr, disable=not missing
        ) as bar,
    ):
        for model in missing:
            start = time.perf_counter()
            try:
                _make(model, out, work, log, bar)
            except PackageError as error:
                failed[model.name] = str(error)
            seconds[model.name] = round(time.perf_counter() - start, 1)
    made = {}
    for model in models:
        folder = out / model.name
        if model.name not in failed:
            made[model.name] = {
                "path": str(folder),
                "license": model.license,
                "bytes": sum(path.stat().st_size for path in folder.iterdir()),
                "seconds": seconds.get(model.name, 0.0),
            }
    return {"models": made, "failed": failed, "log": str(work / LOG)}


def _make(model: Model, out: Path, work: Path, log: TextIO, bar: "tqdm") -> None:
    """Fetch what a model is made of, and make it; `bar` advances by a step for each."""
    for package in model.packages:
        bar.set_postfix_str(f"fetch {package}")
        files = [file for file in model.files if file.package == package]
        fetch(package, files, work, log)
        bar.update()
    bar.set_postfix_str(f"make {model.name}")
    folder = out / model.name
    with write_errors(folder), written_folder(folder) as partial:
        model.make([file.fetched(work) for file in model.sources], partial)
        for file in model.notices:
            shutil.copyfile(file.fetched(work), partial / file.name)
        write_json(partial / RECORD, _record(model, partial))
    bar.update()


def _record(model: Model, folder: Path) -> dict[str, Any]:
    """Where a model comes from, and the SHA-256 of every file in its folder."""
    return {
        "name": model.name,
        "about": model.about,
        "license": model.license,
        "recipe": RECIPE,
        "sources": [_source(file) for file in model.files],
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }


def _source(file: PackagedFile) -> dict[str, str]:
    return {
        "package": file.package.name,
        "version": file.package.version,
        "path": file.path,
        "sha256": file.sha256,
    }


def is_complete(model: Model, folder: Path) -> bool:
    """Whether a folder holds the model, made of these files by this recipe, every file whole."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = dict(record["files"])
        is_same = (record["recipe"], record["sources"]) == (RECIPE, list(map(_source, model.files)))
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return is_same and all(is_whole(folder / name, digest) for name, digest in files.items())


@contextlib.contextmanager
def _libraries_write_to(log: TextIO) -> Iterator[None]:
    """Send libraries' warnings and log records to a file."""
    from transformers.utils import logging as transformers_logging

    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    logging.captureWarnings(True)
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    try:
        yield
    finally:
        transformers_logging.disable_propagation()
        transformers_logging.enable_default_handler()
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(handler)


# --- the command ---


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(MODELS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {names} (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("reference/pretrained"), help="folder of the models"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("work/pretrained"),
        help="folder of the fetched files and the log; it may be removed afterwards",
    )
    args = parser.parse_args(argv)
    try:
        document = make_all(_models_named(args.names), args.out, args.work)
    except TinyAlignError as error:
        print(f"pretrained: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("pretrained: interrupted; run it again to continue", file=sys.stderr)
        return INTERRUPTED
    for sentence in document["failed"].values():
        print(f"pretrained: {sentence}", file=sys.stderr)
    print(json.dumps(document))
    return REFUSED if document["failed"] else 0


def _models_named(names: Sequence[str]) -> list[Model]:
    """The models of these names; all if there are none.

    Raises:
        TinyAlignError: an unknown name, or a package is not installed that making models needs.
    """
    for name in names:
        if name not in MODELS:
            raise TinyAlignError(f"expected names of models ({', '.join(MODELS)}), got {name}")
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise TinyAlignError(f"the package {package} is needed: pip install {package}")
    return [MODELS[name] for name in names or MODELS]


if __name__ == "__main__":
    raise SystemExit(main())
