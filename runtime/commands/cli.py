"""The command `tiny-align`: a table of sub-commands, whose modules are imported when called.

Every command's last line on stdout is one JSON document, with --json the only one. Wrong input, or
what the machine refuses, is one sentence on stderr and exit status 2; an error of our own is one
sentence too, with exit status 1. --debug adds the traceback. A command whose result is a failure
sets its own `exit_status`.
"""

import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

from tiny_align.runtime.checks import check_options
from tiny_align.runtime.errors import TinyAlignError


class Command(NamedTuple):
    module: str  # has add_arguments(parser) and run(args) -> dict
    summary: str
    extra: str | None = None  # of pip, installs what the command needs


COMMANDS = {
    "demo": Command(
        "tiny_align.align.commands.demo",
        "train a projector for a new user of the shipped bundle, and talk to it",
        "demo",
    ),
    "align": Command(
        "tiny_align.align.commands.align",
        "train a user's projector, or the general projector",
        "align",
    ),
    "enroll": Command(
        "tiny_align.align.commands.enroll",
        "record a new user, check the recordings and train a projector",
        "enroll",
    ),
    "eval": Command(
        "tiny_align.align.commands.evaluate",
        "measure a bundle or a user's projector on a data set",
        "align",
    ),
    "export": Command(
        "tiny_align.export.command",
        "export encoder, projector and LLM into a bundle",
        "export",
    ),
    "build-engines": Command(
        "tiny_align.engines.command",
        "build TensorRT engines for a bundle's graphs",
        "trt",
    ),
    "run": Command("tiny_align.runtime.commands.run", "answer a recording"),
    "listen": Command(
        "tiny_align.runtime.commands.listen",
        "talk by voice, from a microphone or from recordings",
        "listen",
    ),
    "chat": Command("tiny_align.runtime.commands.chat", "talk in typed turns"),
    "bench": Command(
        "tiny_align.benchmarks.standard.command",
        "measure speed, memory and quality on this machine, beside alternatives",
        "bench",
    ),
    "doctor": Command(
        "tiny_align.runtime.commands.doctor",
        "report what this machine can do and what it lacks",
    ),
}

# exit status
FAULT = 1
REFUSED = 2
INTERRUPTED = 128 + 2  # as a shell reports SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE

OUT_OF_MEMORY = (  # in messages of libraries
    "bad_alloc",
    "bad allocation",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
)
DEBUG_HELP = "show the traceback of an error"


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line; only the command that is called has its arguments.

    Args:
        words: the command line without the program's name.
    """
    parser = argparse.ArgumentParser(
        prog="tiny-align", description="Talk to a language model in your own voice."
    )
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    parser.add_argument("--version", action=ShowVersion, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = next((word for word in words if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        sentence = command.summary[0].upper() + command.summary[1:] + "."
        subparser = subparsers.add_parser(name, help=command.summary, description=sentence)
        if name == called:
            import_module(command.module).add_arguments(subparser)
        subparser.add_argument(
            "--json", action="store_true", help="print only the JSON document on stdout"
        )
        subparser.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP
        )
    return parser


class ShowVersion(argparse.Action):
    """Print the version of the installed package and exit; it is looked up only then."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"tiny-align {version('tiny-align')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own); returns the exit status."""
    args = argparse.Namespace(command=None, debug=False)
    words = sys.argv[1:] if argv is None else argv
    try:
        _open_streams()
        try:
            build_parser(words).parse_args(words, args)
        except SystemExit:  # argparse has printed the help, or what is wrong with the call
            sys.stdout.flush()
            raise
        check_options(args)
        document = import_module(COMMANDS[args.command].module).run(args)
        status = document.pop("exit_status", 0)
        print(one_line(document), flush=True)
        return status
    except SystemExit:
        raise
    except BaseException as error:  # libraries written in Rust raise what is no Exception
        return _explain(error, args)


def _open_streams() -> None:
    """Make sure that printing cannot fail, for a closed stream or a letter that a terminal lacks.

    Raises:
        TinyAlignError: stdout is closed; the next file that is opened would take its place, and
            libraries write there.
    """
    for name, mode in (("stdin", "r"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if sys.stdout is None:
        raise TinyAlignError(
            "standard output is closed: leave it open, or send it to a file or /dev/null"
        )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def one_line(document: dict[str, Any]) -> str:
    """A document as JSON; in ASCII if stdout, or UTF-8, lacks one of its characters."""
    text = json.dumps(document, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(document)
    return text


# --- errors ---


def _explain(error: BaseException, args: argparse.Namespace) -> int:
    """Say in one sentence what went wrong; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):  # the reader has gone, as `head` does: end silently
        _discard_stdout()
        return BROKEN_PIPE
    if args.debug:
        traceback.print_exception(error)
    sentence = _refusal(error, args.command)
    if sentence is not None:
        return _fail(sentence, REFUSED)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(f"internal error: {text}; run it again with --debug and report it", FAULT)


def _refusal(error: BaseException, command: str | None) -> str | None:
    """The sentence for wrong input or a limit of the machine; None for an error of our own."""
    if isinstance(error, TinyAlignError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        if not error.name or error.name.startswith("tiny_align"):
            return None
        extra = COMMANDS[command].extra if command else None
        requirement = f"tiny-align[{extra}]" if extra else "tiny-align"
        return f"{command or 'it'} needs the package {error.name}: pip install '{requirement}'"
    if isinstance(error, OSError):
        return _system_refusal(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r} cannot be written in {error.encoding}: rename it, in UTF-8"
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY):
        return (
            "memory ran out: close other programs, raise the limit (ulimit, the container's), "
            "or ask for less"
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return (
            "the system starts no more threads: give fewer --threads, or raise the limit "
            "(ulimit -u, ulimit -v)"
        )
    return None


def _system_refusal(error: OSError) -> str:
    if error.errno is None:  # raised by a library, in its own words
        return " ".join(str(error).split())
    if error.filename is None:
        _discard_stdout()  # it may be stdout that failed: Python would flush it again at exit
        return (
            f"reading or writing failed ({error.strerror}): make room, or send the output elsewhere"
        )
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    return (
        f"{' and '.join(paths)} cannot be used ({error.strerror}): check the path, and that you "
        "may read and write there"
    )


def _discard_stdout() -> None:
    """Send what is still to be written to stdout nowhere."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _fail(message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"tiny-align: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
