"""A user on disk: the record that binds a projector to an encoder and an LLM, and its check."""

import json
from pathlib import Path

from tiny_align.runtime.bundle.manifest import Manifest
from tiny_align.runtime.errors import UserError
from tiny_align.runtime.files import read_errors, sha256, write_json

USER_RECORD = "user.json"
GENERAL = "general"  # the bundle's own projector, for everybody


def check_user(folder: Path, manifest: Manifest) -> dict:
    """The person's record, after checking that it is whole and made for this encoder and this LLM.

    Raises:
        UserError: nobody of that name, a changed file, or a projector trained for another bundle.
    """
    with read_errors(folder, UserError):
        return _checked_user(folder, manifest)


def _checked_user(folder: Path, manifest: Manifest) -> dict:
    if not (folder / USER_RECORD).is_file():
        known = sorted(p.parent.name for p in folder.parent.glob(f"*/{USER_RECORD}"))
        raise UserError(
            f"no user {folder.name!r} in {folder.parent} (known: {', '.join(known) or 'none'}): "
            f"train one with `tiny-align align --user {folder.name}`"
        )
    try:
        record = json.loads((folder / USER_RECORD).read_text(encoding="utf-8"))
        files, bound_to = (
            dict(record["files"]),
            {name: str(record[name]) for name in manifest.binding},
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / USER_RECORD} is damaged ({error}): train {folder.name!r} again"
        ) from error
    for name, (part, here) in manifest.binding.items():
        if bound_to[name] != here:
            raise UserError(
                f"the projector of {folder.name!r} was trained for another {part} ({name} {bound_to[name][:12]}, "
                f"this bundle has {here[:12]}): train it again with this bundle"
            )
    for name in sorted(
        {manifest.graphs["projector"].file, *files}
    ):  # the graph, even if the record forgot it
        if not (folder / name).is_file() or sha256(folder / name) != files.get(name):
            raise UserError(
                f"{folder / name} is missing or has changed: train {folder.name!r} again"
            )
    return record


def write_user_record(folder: Path, manifest: Manifest, training: dict) -> None:
    """Describe the projector files that lie in `folder`: the last step of writing a person."""
    files = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != USER_RECORD}
    bound_to = {name: here for name, (_, here) in manifest.binding.items()}
    record = {**bound_to, "training": training, "files": files}
    write_json(folder / USER_RECORD, record)
