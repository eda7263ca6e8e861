"""The layer of command options: dataclass fields to argparse and back, and the shared groups."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from tiny_align.runtime.bundle.shipped import shipped, shipped_bundle, shipped_voice
from tiny_align.runtime.commands.options import (
    AnsweringOptions,
    BundleOptions,
    TrainedUserOptions,
    add_options,
    option,
    read_options,
)
from tiny_align.runtime.errors import TinyAlignError


def refuse() -> str:
    raise TinyAlignError("there is no default here")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One option of every kind."""

    parts: tuple[str, ...] = field(metadata=option("parts to measure", positional=True))
    out: Path = field(metadata=option("folder to write", metavar="DIR", aliases=("--output",)))
    max_tokens: int | None = field(default=None, metadata=option("maximum number of tokens"))
    rate: float = field(default=0.5, metadata=option("learning rate"))
    objective: str = field(default="ctc", metadata=option("loss", choices=("ctc", "paper")))
    layers: tuple[int, ...] = field(default=(-1,), metadata=option("layers"))
    slow: tuple[str, ...] = field(default=(), metadata=option("slow a stage down", repeat=True))
    sealed: bool = field(default=False, metadata=option("seal the process"))
    voice: str | None = field(default_factory=refuse, metadata=option("voice"))
    seed: int = 7  # not an option


@dataclass(frozen=True, kw_only=True)
class Either:
    """Exactly one of two, and another between them."""

    user: str | None = field(default=None, metadata=option("a user", one_of="projector"))
    out: Path | None = field(default=None, metadata=option("folder to write", metavar="DIR"))
    general: bool = field(default=False, metadata=option("the general one", one_of="projector"))


def read(group, *words):
    parser = argparse.ArgumentParser()
    add_options(parser, group)
    return read_options(parser.parse_args(words), group)


def test_an_absent_option_has_the_fields_default():
    assert read(Options, "a", "--out", "x", "--voice", "v") == Options(
        parts=("a",), out=Path("x"), voice="v"
    )


def test_values_have_the_type_of_the_annotation():
    options = read(
        *(Options, "a", "b", "--out", "x", "--max-tokens", "3", "--rate", "1e-3"),
        *("--objective", "paper", "--layers", "1", "2", "--sealed", "--voice", "v"),
    )
    assert options == Options(
        parts=("a", "b"),
        out=Path("x"),
        max_tokens=3,
        rate=1e-3,
        objective="paper",
        layers=(1, 2),
        sealed=True,
        voice="v",
    )


def test_a_repeated_option_takes_one_value_each_time():
    options = read(Options, "--out", "x", "--voice", "v", "--slow", "llm", "--slow", "encoder", "a")
    assert options.slow == ("llm", "encoder") and options.parts == ("a",)


def test_an_alias_is_read_like_the_option():
    assert read(Options, "a", "--output", "x", "--voice", "v").out == Path("x")


def test_a_default_factory_is_called_when_the_options_are_read():
    with pytest.raises(TinyAlignError, match="there is no default here"):
        read(Options, "a", "--out", "x")


def test_the_help_shows_every_option(capsys):
    with pytest.raises(SystemExit):
        read(Options, "--help")
    shown = capsys.readouterr().out
    names = [entry.name.replace("_", "-") for entry in fields(Options) if entry.metadata]
    assert all(name in shown for name in names) and "--seed" not in shown
    assert "--out DIR, --output DIR" in shown and "{ctc,paper}" in shown


@pytest.mark.parametrize(
    ("group", "words", "message"),
    [
        (Options, ("a",), "the following arguments are required: --out"),
        (Options, ("--out", "x"), "the following arguments are required: parts"),
        (Options, ("a", "--out", "x", "--max-tokens", "many"), "invalid int value: 'many'"),
        (Options, ("a", "--out", "x", "--objective", "none"), "invalid choice: 'none'"),
        (Either, (), "one of the arguments --user --general is required"),
        (Either, ("--user", "ana", "--general"), "not allowed with argument"),
        (BundleOptions, (), "the following arguments are required: --bundle"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, group, words, message):
    with pytest.raises(SystemExit) as stopped:
        read(group, *words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_help_shows_alternatives_as_such(capsys):
    with pytest.raises(SystemExit):
        read(Either, "--help")
    assert "(--user USER | --general) [--out DIR]" in capsys.readouterr().out


def test_exactly_one_of_two_options_is_read():
    assert read(Either, "--user", "ana") == Either(user="ana")
    assert read(Either, "--general") == Either(general=True)


def test_the_shipped_bundle_is_the_default_of_commands_that_answer(bundle_path, voice_path):
    options = read(AnsweringOptions)
    assert options == AnsweringOptions() and options.bundle.samefile(bundle_path)
    assert shipped_bundle().samefile(bundle_path) and shipped_voice().samefile(voice_path)


@pytest.mark.parametrize(
    ("words", "users"),
    [((), None), (("--users", "a"), Path("a")), (("--out", "b"), Path("b/users"))],
)
def test_a_profile_is_written_to_users_or_below_out(words, users):
    assert read(TrainedUserOptions, *words).explicit_users == users


def test_users_and_out_exclude_each_other():
    options = read(TrainedUserOptions, "--users", "a", "--out", "b")
    with pytest.raises(TinyAlignError, match="--users and --out name two places"):
        _ = options.explicit_users


def test_a_shipped_folder_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("tiny_align.runtime.bundle.shipped.find_spec", lambda name: None)
    with pytest.raises(
        TinyAlignError, match=r"lacks the shipped bundle .*: install tiny-align again"
    ):
        shipped("bundle")
