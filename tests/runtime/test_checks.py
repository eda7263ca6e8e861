"""runtime/checks.py: a number out of its range is refused in one sentence with number and range."""

import argparse

import numpy as np
import pytest

from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.checks import RANGES, Range, check, check_options
from tiny_align.runtime.errors import BundleError, TinyAlignError

NAN = float("nan")


@pytest.mark.parametrize("value", [1, 8, np.int64(3)])
def test_a_range_includes_both_ends(value):
    Range(1, 8).check("--threads", value)


@pytest.mark.parametrize("value", [0, 9, -1, 10**30])
def test_a_number_outside_is_refused_with_its_range(value):
    with pytest.raises(TinyAlignError, match=rf"^--threads is {value}: expected 1 to 8$"):
        Range(1, 8).check("--threads", value)


@pytest.mark.parametrize("value", [1.0, "4", True, None, NAN, [1]])
def test_a_value_that_is_no_whole_number_is_refused(value):
    with pytest.raises(BundleError, match=r"n is .*: expected a whole number from 1 to 8"):
        Range(1, 8).check("n", value, BundleError)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf"), 0, 1.5])
def test_a_fraction_outside_or_not_finite_is_refused(value):
    with pytest.raises(TinyAlignError, match=r"expected 0\.1 to 1$"):
        Range(0.1, 1, whole=False).check("share", value)


def test_none_is_accepted_as_a_default():
    check("threads", None)


def test_the_range_of_threads_depends_on_the_cores():
    assert RANGES["threads"].min == 1 <= RANGES["threads"].max < 10_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "64"),
        ("max_tokens", 3.0),
        ("temperature", NAN),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("loop_tokens", -1),
    ],
)
def test_a_decoding_out_of_range_is_refused(name, value):
    with pytest.raises(TinyAlignError, match=f"^{name} is "):
        Decoding(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("threads", 0), ("threads", 10_000), ("threads", 1.5), ("context", 0), ("context", 257)],
)
def test_an_assistant_refuses_numbers_before_it_loads(bundle_path, monkeypatch, name, value):
    monkeypatch.setattr("tiny_align.runtime.assistant.budget", None)  # the first step of loading
    with pytest.raises(TinyAlignError, match=f"^{name} is {value}: expected "):
        Assistant.load(bundle_path, **{name: value})


def test_messages_name_options_as_they_are_typed():
    with pytest.raises(TinyAlignError, match=r"^--max-seconds is 0: expected "):
        check_options(argparse.Namespace(max_seconds=0, data=None))


@pytest.mark.parametrize("value", ["a\udcff", ["fine", "\udc80"]])
def test_a_text_that_is_not_utf8_is_refused(value):
    with pytest.raises(TinyAlignError, match=r"^--instruction is .*expected UTF-8 text"):
        check_options(argparse.Namespace(instruction=value))


EXPORT = ("--encoder", "e", "--llm", "l", "--out", "o")
# refused before a model, a bundle or a data set is opened: none of those named here exists
CALLS = {
    "--threads": ("eval", "--bundle", "b", "--data", "d", "--threads", 10_000),
    "--seed": ("align", "--bundle", "b", "--data", "d", "--general", "--seed", 2**40),
    "--max-seconds": ("demo", "--max-seconds", "1e300"),
    "--steps": ("enroll", "--bundle", "b", "--user", "u", "--steps", 0),
    "--utterances": ("align", "--bundle", "b", "--data", "d", "--user", "u", "--utterances", 0),
    "--sentences": ("enroll", "--bundle", "b", "--user", "u", "--sentences", 0),
    "--compute-capability": ("build-engines", "--bundle", "b", "--compute-capability", 0),
    "--max-context": ("export", *EXPORT, "--max-context", 1),
    "--soft-tokens": ("export", *EXPORT, "--soft-tokens", -1),
    "--window-s": ("export", *EXPORT, "--window-s", "inf"),
    "--temperature": ("listen", "--bundle", "b", "--temperature", 1000),
}


@pytest.mark.parametrize("option", CALLS)
def test_every_command_refuses_numbers_before_it_opens_a_file(run_cli, option):
    done = run_cli(*CALLS[option])
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tiny-align: {option} is ") and ": expected " in done.stderr
    assert done.stderr.count("\n") == 1


def test_bench_refuses_threads_too(run_cli):
    assert "--threads is 0: expected 1 to " in run_cli("bench", "inference", "--threads", 0).stderr
