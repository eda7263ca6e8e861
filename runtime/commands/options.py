"""Command options as frozen dataclasses: the mechanism, and the groups that commands share.

A field with `option` in its metadata is one option, its annotation the type of its values:

    @dataclass(frozen=True, kw_only=True)
    class RunOptions(AnsweringOptions):
        audio: Path = field(metadata=option("a recording", positional=True))

    add_options(parser, RunOptions)             # --bundle, --user, ..., audio
    options = read_options(args, RunOptions)    # options.audio, options.max_tokens, ...

An option without a default must be given. A `default_factory` is called when the options are
read, and may raise a TinyAlignError. A command's dataclass inherits from the groups it needs; a
field that is declared again replaces the group's. The help lists the options of the last base
first, as dataclasses order their fields. The range of a number is in the table of checks.py under
the field's name; the dispatcher checks all options at once.
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tiny_align.runtime.backends import registry
from tiny_align.runtime.bundle.shipped import shipped_bundle, shipped_voice
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Group = TypeVar("Group", bound="DataclassInstance")

METADATA = "option"  # key of a field's metadata


# --- the mechanism ---


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line, beside its name, type and default."""

    help: str
    metavar: str | None = None  # what the help shows for its value
    choices: tuple[str, ...] | None = None
    aliases: tuple[str, ...] = ()  # other names, such as "--old-name"
    positional: bool = False  # given without a name
    repeat: bool = False  # of a tuple: one value each time it is given; otherwise any number
    flag: str | None = None  # such as "--name", if it is not the field's name
    parse: Callable[[str], Any] | None = None  # a value, if the annotation's type does not do it
    one_of: str | None = None  # exactly one of the options with the same `one_of` must be given


def option(help: str, **settings: Any) -> dict[str, Option]:
    """The metadata of a field that is an option; `settings` are the other fields of `Option`."""
    return {METADATA: Option(help, **settings)}


def add_options(parser: argparse.ArgumentParser, group: "type[DataclassInstance]") -> None:
    """Add an option for each field of `group` that is one: `max_tokens` becomes `--max-tokens`."""
    hints = typing.get_type_hints(group)
    entries = _option_fields(group)
    added: set[str] = set()  # names of `one_of`
    for entry in entries:
        name = entry.metadata[METADATA].one_of
        if name is None:
            _add_option(parser, entry, hints[entry.name])
        elif name not in added:  # all at once: argparse shows only neighbours as alternatives
            added.add(name)
            alternatives = parser.add_mutually_exclusive_group(required=True)
            for other in entries:
                if other.metadata[METADATA].one_of == name:
                    _add_option(alternatives, other, hints[other.name])


def read_options(args: argparse.Namespace, group: type[Group]) -> Group:
    """What the command line holds for `group`; the group's own defaults for the rest."""
    values = {}
    for entry in _option_fields(group):
        value = getattr(args, entry.name, None)
        if value is not None:
            values[entry.name] = tuple(value) if isinstance(value, list) else value
    return group(**values)


def _option_fields(group: "type[DataclassInstance]") -> list[dataclasses.Field]:
    return [entry for entry in dataclasses.fields(group) if METADATA in entry.metadata]


def _add_option(
    parser: argparse._ActionsContainer, entry: dataclasses.Field, annotation: Any
) -> None:
    shown: Option = entry.metadata[METADATA]
    kind, many = _kind_of(annotation)
    settings: dict[str, Any] = {"help": shown.help, "default": None}  # see read_options
    if shown.positional:
        names = [entry.name]
    else:
        names = [shown.flag or f"--{entry.name.replace('_', '-')}", *shown.aliases]
        settings["dest"] = entry.name
        without_default = entry.default is entry.default_factory is dataclasses.MISSING
        settings["required"] = without_default and shown.one_of is None
    if kind is bool:
        settings["action"] = "store_true"
    else:
        settings |= {
            "type": shown.parse or kind,
            "metavar": shown.metavar,
            "choices": shown.choices,
        }
    if many and shown.repeat:
        settings["action"] = "append"
    elif many:
        settings["nargs"] = "+"
        settings["action"] = "store" if shown.positional else "extend"
    parser.add_argument(*names, **settings)


def _kind_of(annotation: Any) -> tuple[type, bool]:
    """The type of an option's values, and whether there are several: `tuple[int, ...] | None`."""
    if isinstance(annotation, types.UnionType):
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


# --- groups that commands share ---


@dataclass(frozen=True, kw_only=True)
class BundleOptions:
    """The bundle of a command that writes to it, or trains or builds for it."""

    bundle: Path = field(metadata=option("bundle folder", metavar="DIR"))


@dataclass(frozen=True, kw_only=True)
class ShippedBundleOptions(BundleOptions):
    """The bundle of a command that only reads it."""

    bundle: Path = field(
        default_factory=shipped_bundle,
        metadata=option("bundle folder (default: the shipped bundle)", metavar="DIR"),
    )


@dataclass(frozen=True, kw_only=True)
class UsersOptions:
    """Where users are; `find_users` has the rule."""

    users: Path | None = field(
        default=None,
        metadata=option(
            "directory of user profiles (default: in the platform's data folder, or BUNDLE/users "
            "if the bundle has it)",
            metavar="DIR",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class UserOptions(UsersOptions):
    """A user, or none for the general projector."""

    user: str | None = field(
        default=None,
        metadata=option("name of a user (default: none, the general projector)", metavar="NAME"),
    )


@dataclass(frozen=True, kw_only=True)
class TrainedUserOptions(UserOptions):
    """A user to train, and where to write the profile."""

    out: Path | None = field(
        default=None, metadata=option("write the profile to DIR/users instead", metavar="DIR")
    )

    @property
    def explicit_users(self) -> Path | None:
        """The directory of user profiles that the command line names, if any: for `find_users`.

        Raises:
            TinyAlignError: both `--users` and `--out` are given.
        """
        if self.out is None:
            return self.users
        if self.users is not None:
            raise TinyAlignError("--users and --out name two places for the profile: give one")
        return self.out / "users"


@dataclass(frozen=True, kw_only=True)
class ThreadOptions:
    """How much of the CPU to use."""

    threads: int | None = field(
        default=None, metadata=option("CPU threads (default: all cores)", metavar="N")
    )


@dataclass(frozen=True, kw_only=True)
class AssistantOptions(ThreadOptions, UserOptions, ShippedBundleOptions):
    """An assistant to load, and what it is asked to do."""

    instruction: str | None = field(
        default=None,
        metadata=option(
            "what to do with the speech (default: the bundle's instruction, or the LLM's own "
            "system text)",
            metavar="TEXT",
        ),
    )
    backend: str = field(
        default=registry.DEFAULT,
        metadata=option(
            f"{' or '.join(registry.names())} (default: {registry.DEFAULT})", metavar="NAME"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class AnsweringOptions(AssistantOptions):
    """What `run`, `listen` and `chat` have in common; answering.py reads it."""

    max_tokens: int | None = field(
        default=None,
        metadata=option(
            "maximum number of tokens of an answer (default: 64, or until the context is full)",
            metavar="N",
        ),
    )
    temperature: float = field(
        default=0.0,
        metadata=option(
            "sampling temperature; 0 takes the likeliest token (default: 0)", metavar="T"
        ),
    )
    seed: int = field(default=0, metadata=option("seed of sampling (default: 0)", metavar="N"))
    context: int | None = field(
        default=None,
        metadata=option("positions of a conversation (default: all that the LLM has)", metavar="N"),
    )
    sealed: bool = field(
        default=False,
        metadata=option("give up the network and writing once everything is loaded (Linux)"),
    )


@dataclass(frozen=True, kw_only=True)
class SpeakerOptions:
    """Whose utterances of a data set to take."""

    speaker: str | None = field(
        default=None, metadata=option("speaker code, for CHAT transcripts", metavar="CODE")
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(SpeakerOptions):
    """A data set of recordings and transcripts."""

    data: Path = field(
        metadata=option("metadata folder, NeMo manifest or CHAT transcripts", metavar="DIR")
    )


@dataclass(frozen=True, kw_only=True)
class ShippedDataOptions:
    """A data set, or the recordings that ship with the package."""

    data: Path = field(
        default_factory=shipped_voice,
        metadata=option("data set (default: the shipped recordings)", metavar="DIR"),
    )
