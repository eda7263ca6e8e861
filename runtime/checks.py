"""Check numbers from outside: options, arguments and the values of a manifest.

`RANGES` is the one table of what they may be. The dispatcher checks every command's options
against it before anything is loaded, and the dataclasses of the API check their fields. What also
depends on a bundle is checked once that is open (options.py). `check_form` compares a dataclass
that was read from a file with its annotations.
"""

import argparse
import dataclasses
import os
import types
import typing
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from tiny_align.runtime.errors import TinyAlignError

THREADS_PER_CORE = 4  # more only wait for each other


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included."""

    min: float
    max: float
    whole: bool = True

    def __str__(self) -> str:
        if self.whole:
            return f"{self.min} to {self.max}"
        return f"{self.min:g} to {self.max:g}"

    def check(self, name: str, value: Any, error: type[TinyAlignError] = TinyAlignError) -> None:
        """Refuse a value that is not in the range.

        Raises:
            error: `value` is no number, no whole number where one is expected, or outside; NaN is
                outside.
        """
        is_number = isinstance(value, Integral if self.whole else Real)
        if isinstance(value, bool) or not is_number:
            kind = "a whole number" if self.whole else "a number"
            raise error(f"{name} is {value!r}: expected {kind} from {self}")
        if not self.min <= value <= self.max:
            raise error(f"{name} is {value}: expected {self}")


RANGES = {  # option, or argument of the API -> what it may be
    "threads": Range(1, THREADS_PER_CORE * (os.cpu_count() or 1)),
    "seed": Range(0, 2**32 - 1),  # what both numpy and PyTorch take
    # answering; the bundle limits the positions further (options.py)
    "max_tokens": Range(0, 2**24),
    "temperature": Range(0, 100, whole=False),
    "top_k": Range(1, 2**24),
    "loop_tokens": Range(0, 2**24),
    # training
    "steps": Range(1, 10**7),
    "max_seconds": Range(0.001, 1e9, whole=False),
    "utterances": Range(1, 10**9),
    "sentences": Range(1, 10**6),
    # export and engines
    "max_context": Range(32, 2**24),
    "soft_tokens": Range(1, 2**16),
    "window_s": Range(0, 60, whole=False),
    "compute_capability": Range(30, 999),
}


def check(name: str, value: Any, label: str | None = None) -> None:
    """Check an argument that has a range; None stands for a default.

    Args:
        name: its name in RANGES.
        value: a number, or None.
        label: what the message calls it, if not its name.

    Raises:
        TinyAlignError: it is out of its range.
    """
    if value is not None:
        RANGES[name].check(label or name, value)


def check_fields(instance: Any, *names: str) -> None:
    """`check` some of a dataclass's fields."""
    for name in names:
        check(name, getattr(instance, name))


def check_options(args: argparse.Namespace) -> None:
    """Check what argparse has read.

    Raises:
        TinyAlignError: a number out of its range, or a text that is not UTF-8; paths may hold any
            bytes.
    """
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in RANGES and isinstance(value, int | float):  # `export --sentences` is a file
            check(name, value, option)
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if isinstance(text, str) and not is_utf8(text):
                raise TinyAlignError(
                    f"{option} is {text!r}: expected UTF-8 text, it holds other bytes"
                )


def is_utf8(text: str) -> bool:
    """Whether an argument or a path was UTF-8; Python keeps other bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_form(
    value: Any, hint: Any, name: str, ranges: dict[str, Range], error: type[TinyAlignError]
) -> None:
    """Compare a value from a file with the annotation of its field, down to the last number.

    Args:
        value: the value; a dataclass is compared field by field.
        hint: the annotation.
        name: where it stands, for the message: "llm.vocabulary"; its last part finds the range.
        ranges: field -> what its numbers may be. Without one, a whole number is any from 0 up, and
            another number any finite one.
        error: raised if it does not fit.

    Raises:
        error: it is of another type, or out of its range.
    """
    kind = typing.get_origin(hint) or hint
    arguments = typing.get_args(hint)  # of a union, dict or tuple
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            field_name = f"{name}.{field.name}" if name else field.name
            check_form(getattr(value, field.name), hints[field.name], field_name, ranges, error)
    elif kind is types.UnionType:  # with None, or of a dimension's name and number
        if type(value) not in arguments:
            check_form(value, arguments[0], name, ranges, error)
        elif value is not None:
            check_form(value, type(value), name, ranges, error)
    elif kind in (int, float):
        default = Range(0, 2**40) if kind is int else Range(-1e30, 1e30, whole=False)
        ranges.get(name.rpartition(".")[2], default).check(name, value, error)
    elif not isinstance(value, kind):
        raise error(f"{name} is {value!r}: expected {kind.__name__}")
    elif kind is dict and arguments:
        for key, item in value.items():
            check_form(item, arguments[1], f"{name}.{key}", ranges, error)
    elif kind is tuple:
        if Ellipsis not in arguments and len(value) != len(arguments):
            raise error(f"{name} has {len(value)} entries: expected {len(arguments)}")
        for item in value:
            check_form(item, arguments[0], name, ranges, error)
