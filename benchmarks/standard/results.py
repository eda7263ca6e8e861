"""A result of `tiny-align bench` on disk: its form, checked when it is written and when it is read.

The form is written down once, in FORM. A form is a type; or a list of one form; or a dictionary of
forms, whose names must all be there unless they end in "?". The name `str` stands for any other
names.
"""

import json
import re
from pathlib import Path
from typing import Any

from tiny_align.runtime.errors import DataError
from tiny_align.runtime.files import write_json

SCHEMA = 1
NUMBER = (int, float)
SPREAD = {"median": NUMBER, "p10": NUMBER, "p90": NUMBER, "n": int}
SAMPLES = {str: {str: [NUMBER]}}  # side -> part -> seconds of every turn
PEER = {
    "seconds": {str: SPREAD},
    "ratios": {str: NUMBER},
    "rougeL": NUMBER,
    "load_s": NUMBER,
    "peak_bytes": int,
}
STAGE = {
    "operations": int,
    "weight_bytes": int,
    "other_bytes": int,
    "bytes": int,
    "seconds": NUMBER,
    "limited_by": str,
    "share": NUMBER,
    "predicted_s": {str: NUMBER},
}
CURVE = {"points": [{"size": NUMBER, **SPREAD}], "exponent": NUMBER, "kernel_s": NUMBER}
PARTS = {
    "inference?": {
        "audio_s": NUMBER,
        "samples": int,
        "features": int,
        "prompt_positions": int,
        "answer_tokens": int,
        "unexplained": NUMBER,
        "summary": {str: {str: SPREAD}},
        "timings": SAMPLES,
    },
    "streaming?": {"rows": [{str: NUMBER}], "ratios": {str: NUMBER}, "quality": {}},
    "memory?": {str: NUMBER},
    "compare?": {
        "audio_s": NUMBER,
        "recordings": int,
        "peers": {str: PEER},
        "missing": {str: str},
        "timings": SAMPLES,
    },
    "limits?": {
        "bandwidth_gb_s": NUMBER,
        "products_gflop_s": NUMBER,
        "sizes": {str: int},
        "stages": {str: STAGE},
    },
    "growth?": {"curves": {str: CURVE}},
    "quality?": {str: NUMBER},
    "training?": {
        "steps": int,
        "train_seconds": NUMBER,
        "utterances": int,
        "rougeL_before": NUMBER,
        "rougeL_after": NUMBER,
        "peak_bytes": int,
        "cost": {
            "forms": {str: {"step_s": NUMBER, "steps": int, "peak_gb": NUMBER}},
            "step_ratio": {str: NUMBER},
        },
        str: object,
    },
}
STATE = {str: object}
FORM = {
    "schema": int,
    "date": str,
    "command": str,
    "seconds": NUMBER,
    "machine": {"system": str, "cores": int, "python": str, str: object},
    "versions": {str: str},
    "before": STATE,
    "after": STATE,
    "setting": {
        "threads": int,
        "short": bool,
        "bundle": str,
        "bundle_sha256": str,
        "data": str,
        "slow": {str: NUMBER},
    },
    "parts": PARTS,
}


def faults(value: Any, form: Any, where: str = "") -> list[str]:
    """Where a value does not have its form, each in a few words."""
    if form is object:
        return []
    if isinstance(form, dict):
        return _object_faults(value, form, where)
    if isinstance(form, list):
        return _list_faults(value, form[0], where)
    is_right = isinstance(value, form)
    if isinstance(value, bool) and form is not bool:  # for Python a bool is an int
        is_right = False
    return [] if is_right else [f"{where} is {value!r}"]


def _list_faults(value: Any, form: Any, where: str) -> list[str]:
    if not isinstance(value, list):
        return [f"{where} is no list"]
    found = []
    for i, item in enumerate(value):
        found += faults(item, form, f"{where}[{i}]")
    return found


def _object_faults(value: Any, form: dict, where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    forms = {}
    found = []
    for name in sorted(name for name in form if name is not str):
        plain_name = name.rstrip("?")
        forms[plain_name] = form[name]
        if name == plain_name and name not in value:
            found.append(f"{where}.{name} is missing")
    for name, item in value.items():
        inner = forms.get(name, form.get(str))
        if inner is None:
            found.append(f"{where}.{name} is not known")
        else:
            found += faults(item, inner, f"{where}.{name}")
    return found


def check(result: dict, where: str) -> dict:
    """The result.

    Raises:
        DataError: it has another form.
    """
    found = faults(result, FORM)
    if found:
        raise DataError(
            f"{where} is no result of this version's `tiny-align bench` "
            f"({found[0].lstrip('.')}): measure again"
        )
    return result


def read(path: Path) -> dict:
    """A result from a file.

    Raises:
        DataError: it cannot be read, or is no result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a result ({error}): give the .json that `bench` wrote"
        ) from error
    return check(result, str(path))


def write(path: Path, result: dict) -> None:
    write_json(path, check(result, str(path)))


def machine_name(machine: dict) -> str:
    """A file's name for a machine: "intel-xeon-processor-2-cores"."""
    name = machine.get("jetson") or machine.get("processor") or machine["system"]
    name = re.sub(r"\((R|TM|C)\)", "", f"{name} {machine['cores']} cores", flags=re.IGNORECASE)
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
