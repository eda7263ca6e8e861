"""The command `tiny-align`: a table of sub-commands, each in its own stage and loaded only when called.

Every command's last line on stdout is one JSON document, with --json the only one. What was given wrongly, or what
the machine refuses, is one sentence on stderr and exit status 2; a fault of our own is one too, with exit status 1.
--debug adds the traceback. A command that finds something wrong gives its own `exit_status`.
"""

import argparse
import contextlib
import json
import os
import sys
import traceback
from importlib import import_module

from tiny_align.runtime.checks import check_options
from tiny_align.runtime.errors import TinyAlignError

COMMANDS = {  # name -> (module, what it does, the extra that installs what it needs)
    "demo": (
        "tiny_align.align.commands.demo",
        "personalise the shipped bundle to a new voice and talk to it",
        "demo",
    ),
    "align": (
        "tiny_align.align.commands.align",
        "train a person's projector or the general one",
        "align",
    ),
    "enroll": (
        "tiny_align.align.commands.enroll",
        "get to know a person: sentences to read, checks, training",
        "enroll",
    ),
    "eval": (
        "tiny_align.align.commands.evaluate",
        "measure a bundle or a person on a data set",
        "align",
    ),
    "export": (
        "tiny_align.export.command",
        "export encoder, projector and LLM into a bundle",
        "export",
    ),
    "build-engines": (
        "tiny_align.engines.command",
        "build TensorRT engines for a bundle's graphs",
        "trt",
    ),
    "run": ("tiny_align.runtime.commands.run", "answer a recording", None),
    "listen": (
        "tiny_align.runtime.commands.listen",
        "talk with it: a microphone, or recordings played to it",
        "listen",
    ),
    "chat": ("tiny_align.runtime.commands.chat", "talk with it in typed turns", None),
    "bench": (
        "tiny_align.benchmarks.standard.command",
        "measure this machine, beside what would be used instead",
        "bench",
    ),
    "doctor": (
        "tiny_align.runtime.commands.doctor",
        "say what this machine can do and what it lacks",
        None,
    ),
}
FAULT, REFUSED, INTERRUPTED, NOBODY_READS = (
    1,
    2,
    130,
    141,
)  # exit status; the last two are 128 and the signal
NO_MEMORY = (  # in what libraries say
    "bad_alloc",
    "bad allocation",
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
)
DEBUG = "show the traceback of an error"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tiny-align", description="Talk to a language model in your own voice."
    )
    parser.add_argument("--debug", action="store_true", help=DEBUG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about, _) in COMMANDS.items():
        command = commands.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + "."
        )
        import_module(module).add_arguments(command)
        command.add_argument(
            "--json", action="store_true", help="print nothing but the JSON document on stdout"
        )
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG)
    return parser


def main(argv=None) -> int:
    args = argparse.Namespace(command=None, debug=False)
    try:
        _open_streams()
        _parse(argv, args)
        return _run(args)
    except SystemExit:
        raise
    except (
        BaseException
    ) as error:  # whatever it is: a library written in Rust has exceptions that are no Exception
        return _explained(error, args)


def _parse(argv, args: argparse.Namespace) -> None:
    """Read the arguments into `args`."""
    try:
        build_parser().parse_args(argv, args)
    except SystemExit:  # the help has been shown, or what is wrong with the call
        sys.stdout.flush()
        raise


def _open_streams() -> None:
    """Nothing that is printed can fail for a letter that a terminal lacks, nor for a stream that is not there.

    Raises:
        TinyAlignError: stdout is closed; a file that is opened would take its place, and libraries write there.
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


def _run(args) -> int:
    check_options(args)
    result = import_module(COMMANDS[args.command][0]).run(args)
    status = result.pop("exit_status", 0)
    print(_document(result), flush=True)
    return status


def _document(result: dict) -> str:
    """One line of JSON; in ASCII where stdout, or UTF-8, lacks one of its characters."""
    text = json.dumps(result, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(result)
    return text


def _explained(error: BaseException, args) -> int:
    """Say what went wrong, in one sentence; returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    if isinstance(
        error, BrokenPipeError
    ):  # who reads has left, as `head` does: nothing to say, nobody to say it to
        _abandon_stdout()
        return NOBODY_READS
    if args.debug:
        traceback.print_exception(error)
    if (sentence := _sentence(error, args.command)) is not None:
        return _fail(sentence)
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(f"internal error: {said}; run it again with --debug and report it", FAULT)


def _sentence(error: BaseException, command: str | None) -> str | None:
    """About what was given or about the machine; None for what is our own fault."""
    if isinstance(error, TinyAlignError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing(error.name or "", command)
    if isinstance(error, OSError):
        return _refused_by_system(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r} cannot be written in {error.encoding}: rename it, in UTF-8"
    if isinstance(error, MemoryError) or any(text in str(error).lower() for text in NO_MEMORY):
        return "memory ran out: close other programs, raise the limit (ulimit, the container's), or ask for less"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "the system starts no more threads: give fewer --threads, or raise the limit (ulimit -u, ulimit -v)"
    return None


def _missing(package: str, command: str | None) -> str | None:
    if not package or package.startswith("tiny_align"):
        return None
    extra = COMMANDS[command][2] if command else None
    return f"{command or 'it'} needs the package {package}: pip install 'tiny-align{f'[{extra}]' if extra else ''}'"


def _refused_by_system(error: OSError) -> str:
    if error.errno is None:  # a library's own words
        return " ".join(str(error).split())
    if error.filename is None:
        _abandon_stdout()  # it may be that which failed: Python would try it again at its end
        return (
            f"reading or writing failed ({error.strerror}): make room, or send the output elsewhere"
        )
    names = " and ".join(
        str(name) for name in (error.filename, error.filename2) if name is not None
    )
    return f"{names} cannot be used ({error.strerror}): check the path, and that you may read and write there"


def _abandon_stdout() -> None:
    """What is still to be written goes nowhere."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _fail(message: str, status: int = REFUSED) -> int:
    with contextlib.suppress(OSError):
        print(f"tiny-align: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
