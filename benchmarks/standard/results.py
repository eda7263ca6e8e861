"""A result of `tiny-align bench` on disk: its form, checked when it is written and when it is read.

The form is written down once, in FORM: a type; a list of one form for lists; a dictionary of forms whose names must
all be there, but for those that end in "?"; {str: form} for any names.
"""

import json
import re
from pathlib import Path

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


def faults(value, form, where: str = "") -> list[str]:
    """What is not as the form says, each in a few words."""
    if form is object:
        return []
    if isinstance(form, dict):
        return (
            _faults_of_names(value, form, where)
            if isinstance(value, dict)
            else [f"{where} is no object"]
        )
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [f for i, one in enumerate(value) for f in faults(one, form[0], f"{where}[{i}]")]
    right = isinstance(value, form) and (form is bool or not isinstance(value, bool))
    return [] if right else [f"{where} is {value!r}"]


def _faults_of_names(value: dict, form: dict, where: str) -> list[str]:
    named = {name.rstrip("?"): one for name, one in form.items() if name is not str}
    needed = {name for name in form if name is not str and not name.endswith("?")}
    found = [f"{where}.{name} is missing" for name in sorted(needed - value.keys())]
    for name, one in value.items():
        inner = named.get(name, form.get(str))
        found += (
            faults(one, inner, f"{where}.{name}")
            if inner is not None
            else [f"{where}.{name} is not known"]
        )
    return found


def check(result: dict, where: str) -> dict:
    """The result.

    Raises:
        DataError: it has another form.
    """
    if found := faults(result, FORM):
        first = found[0].lstrip(".")
        raise DataError(
            f"{where} is no result of this version's `tiny-align bench` ({first}): measure again"
        )
    return result


def read(path: Path) -> dict:
    try:
        return check(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a result ({error}): give the .json that `bench` wrote"
        ) from error


def write(path: Path, result: dict) -> None:
    write_json(path, check(result, str(path)))


def machine_name(machine: dict) -> str:
    """A file's name for a machine: "intel-xeon-processor-2-cores"."""
    told = f"{machine.get('jetson') or machine.get('processor') or machine['system']} {machine['cores']} cores"
    return "-".join(
        re.findall(r"[a-z0-9]+", re.sub(r"\((R|TM|C)\)", "", told, flags=re.IGNORECASE).lower())
    )
