"""A user on disk: a projector, and the record that binds it to an encoder and an LLM."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tiny_align.runtime.bundle.manifest import Manifest
from tiny_align.runtime.errors import UserError
from tiny_align.runtime.files import read_errors, sha256, write_json

USER_RECORD = "user.json"
GENERAL = "general"  # stands for the bundle's own projector, for users without one


@dataclass(frozen=True)
class UserProjector:
    """A projector on disk with its speech vocabulary. Two are equal if their files are the same."""

    name: str | None  # of the user; None: the general projector
    folder: Path  # the user's, or the bundle's
    graph: Path  # in the folder
    digest: str  # names the content of its files
    speech_tokens: np.ndarray = field(compare=False)  # (K,) int32, in training order


def user_names(users: Path) -> list[str]:
    """The users in a directory of user profiles, which need not exist.

    Hidden folders are no users: a training that was killed may have left `.NAME-*`.
    """
    return sorted(record.parent.name for record in users.glob(f"[!.]*/{USER_RECORD}"))


def digest_of(files: dict[str, str]) -> str:
    """Hex SHA-256 of files' names and hashes."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def check_user(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The user's record, after checking that it is whole and made for this encoder and this LLM.

    Raises:
        UserError: no user of that name, a changed file, or a projector trained for another bundle.
    """
    with read_errors(folder, UserError):
        record = _read_record(folder, manifest)
        files = record["files"]
        # the graph too, even if the record forgot it
        for name in sorted({manifest.graphs["projector"].file, *files}):
            if not (folder / name).is_file() or sha256(folder / name) != files.get(name):
                raise UserError(
                    f"{folder / name} is missing or has changed: train {folder.name!r} again"
                )
    return record


def _read_record(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The record, if its projector was made for this bundle."""
    path = folder / USER_RECORD
    if not path.is_file():
        known = ", ".join(user_names(folder.parent)) or "none"
        raise UserError(
            f"no user {folder.name!r} in {folder.parent} (known: {known}): "
            f"train one with `tiny-align align --user {folder.name}`"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["files"] = dict(record["files"])
        bound_to = {name: str(record[name]) for name in manifest.binding}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): train {folder.name!r} again") from error
    for name, (part, expected) in manifest.binding.items():
        if bound_to[name] != expected:
            raise UserError(
                f"the projector of {folder.name!r} was trained for another {part} "
                f"({name} {bound_to[name][:12]}, this bundle has {expected[:12]}): "
                "train it again with this bundle"
            )
    return record


def write_user_record(folder: Path, manifest: Manifest, training: dict[str, Any]) -> None:
    """Describe the projector files that lie in `folder`: the last step of writing a user."""
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != USER_RECORD}
    record: dict[str, Any] = {}
    for name, (_, value) in manifest.binding.items():
        record[name] = value
    record["training"] = training
    record["files"] = files
    write_json(folder / USER_RECORD, record)
