"""Numbers from outside - options, arguments, what a manifest holds - and the range that each must lie in.

`RANGES` is the one table. The dispatcher checks every command's options against it before anything is loaded, and
the dataclasses that the API takes check their fields against it; what also depends on a bundle is checked where that
is open (options.py). `check_form` compares a dataclass that was read from a file with its annotations.
"""

import dataclasses
import os
import types
import typing
from dataclasses import dataclass
from numbers import Integral, Real

from tiny_align.runtime.errors import TinyAlignError

THREADS_PER_CORE = 4  # more only wait for each other


@dataclass(frozen=True)
class Range:
    """What a number may be, both ends included."""

    least: float
    most: float
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.least} to {self.most}" if self.whole else f"{self.least:g} to {self.most:g}"

    def check(self, name: str, value, error: type[TinyAlignError] = TinyAlignError) -> None:
        """
        Raises:
            error: `value` is no number, no whole one where one is expected, or outside; NaN is outside.
        """
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            kind = "a whole number" if self.whole else "a number"
            raise error(f"{name} is {value!r}: expected {kind} from {self}")
        if not self.least <= value <= self.most:
            raise error(f"{name} is {value}: expected {self}")


RANGES = {  # an option, or an argument of the API -> what it may be
    "threads": Range(1, THREADS_PER_CORE * (os.cpu_count() or 1)),
    "seed": Range(0, 2**32 - 1),  # what numpy and PyTorch both take
    # answering; how many positions there are is the bundle's (options.py)
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


def check(name: str, value, shown: str | None = None) -> None:
    """An argument that has a range; None stands for a default.

    Args:
        shown: what the message calls it, where that is not its name.
    Raises:
        TinyAlignError: it is out of its range.
    """
    if value is not None:
        RANGES[name].check(shown or name, value)


def check_fields(instance, *names: str) -> None:
    """`check` of some of a dataclass's fields."""
    for name in names:
        check(name, getattr(instance, name))


def check_options(args) -> None:
    """What argparse has read.

    Raises:
        TinyAlignError: a number out of its range, or a text that is not UTF-8; paths may hold any bytes.
    """
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in RANGES and isinstance(value, int | float):  # `export --sentences` is a file
            check(name, value, option)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not is_utf8(text):
                raise TinyAlignError(
                    f"{option} is {text!r}: expected UTF-8 text, it holds other bytes"
                )


def is_utf8(text: str) -> bool:
    """Whether a text of the system's (an argument, a path) was UTF-8; Python keeps other bytes as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_form(
    value, hint, name: str, ranges: dict[str, Range], error: type[TinyAlignError]
) -> None:
    """Compare what a file holds with the annotation of the field it is for, down to the last number.

    Args:
        name: where it stands, for the message: "llm.vocabulary"; its last part finds the range.
        ranges: field -> what its numbers may be; without one a whole number is any from 0 up, another any finite one.
    Raises:
        error: it is of another type, or out of its range.
    """
    origin, kinds = typing.get_origin(hint) or hint, typing.get_args(hint)
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        for field in dataclasses.fields(value):
            where = f"{name}.{field.name}" if name else field.name
            check_form(getattr(value, field.name), hints[field.name], where, ranges, error)
    elif origin is types.UnionType:
        if type(value) not in kinds:  # else it is None, or a dimension's name or number
            check_form(value, kinds[0], name, ranges, error)
        elif value is not None:
            check_form(value, type(value), name, ranges, error)
    elif not isinstance(value, origin) and origin not in (int, float):
        raise error(f"{name} is {value!r}: expected {origin.__name__}")
    elif origin is dict and kinds:
        for key, item in value.items():
            check_form(item, kinds[1], f"{name}.{key}", ranges, error)
    elif origin is tuple:
        if Ellipsis not in kinds and len(value) != len(kinds):
            raise error(f"{name} has {len(value)} entries: expected {len(kinds)}")
        for item in value:
            check_form(item, kinds[0], name, ranges, error)
    elif origin in (int, float):
        usual = Range(0, 2**40) if origin is int else Range(-1e30, 1e30, whole=False)
        ranges.get(name.rpartition(".")[2], usual).check(name, value, error)
