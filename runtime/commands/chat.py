"""`tiny-align chat`: a conversation in typed turns, one a line on stdin; answers go to stdout."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tiny_align.runtime.commands.answering import (
    close_seal,
    decoding,
    load,
    open_bundle,
    prepare_seal,
    print_events,
)
from tiny_align.runtime.commands.options import AnsweringOptions, add_options, read_options
from tiny_align.runtime.errors import DataError, TinyAlignError

if TYPE_CHECKING:
    from tiny_align.runtime.session import Session

MAX_CHARACTERS = 100_000  # of a line
SHOWN_CHARACTERS = 200  # of a line that is refused, in the document
BLANK = "\ufeff \t\r\n"  # some editors begin a file with the first, a byte order mark


def add_arguments(parser: ArgumentParser) -> None:
    add_options(parser, AnsweringOptions)


def run(args: Namespace) -> dict[str, Any]:
    """Answer each line; the command's document."""
    options = read_options(args, AnsweringOptions)
    bundle = open_bundle(options)
    seal = prepare_seal(options, bundle)
    with load(options, bundle, announce=not args.json) as assistant:
        sealed = close_seal(seal)
        session = assistant.listen(options.instruction, decoding(options))
        turns = []
        for number, line in _read_lines():
            turns.append(_answer_line(session, number, line, args.json))
        return {
            "turns": turns,
            "positions": session.positions,
            "capacity": session.capacity,
            "backend": options.backend,
            "user": options.user,
            **sealed,
        }


def _read_lines() -> Iterator[tuple[int, str]]:
    """The lines of stdin that are not empty, with their numbers; Ctrl-C ends them like Ctrl-D.

    Bytes that are not UTF-8 become surrogates (see `_checked_text`), whatever the locale is.
    """
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    number = 0
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = _read_line()
        except KeyboardInterrupt:
            return
        if not line:
            return
        number += 1
        text = line.strip(BLANK)
        if text:
            yield number, text


def _read_line() -> str:
    """The next line; of one that is too long the beginning, so that memory stays bounded."""
    try:
        line = rest = sys.stdin.readline(MAX_CHARACTERS + 1)
        while len(rest) > MAX_CHARACTERS and not rest.endswith("\n"):
            rest = sys.stdin.readline(MAX_CHARACTERS + 1)
    except OSError as error:
        raise TinyAlignError(
            f"standard input cannot be read ({error}): type turns, or pipe a text file in"
        ) from error
    return line


def _answer_line(session: "Session", number: int, line: str, quiet: bool) -> dict[str, Any]:
    """Answer one line; if it cannot be answered, say so and let the conversation go on."""
    from tiny_align.runtime.assistant import collect

    try:
        text = _checked_text(line, f"line {number}")
        answer = collect(print_events(session.say(text), quiet=quiet), 0.0)
    except TinyAlignError as error:
        print(f"tiny-align: {error}", file=sys.stderr)
        encoded = line[:SHOWN_CHARACTERS].encode("utf-8", "surrogateescape")
        asked = encoded.decode("utf-8", "backslashreplace")  # bytes that are not UTF-8 as \xff
        return {"asked": asked, "error": str(error)}
    return {
        "asked": text,
        "text": answer.text,
        "tokens": len(answer.tokens),
        "ttft_ms": round(answer.ttft_s * 1000, 2),
    }


def _checked_text(line: str, where: str) -> str:
    """A line as text.

    Raises:
        DataError: it is not UTF-8, or too long.
    """
    if len(line) > MAX_CHARACTERS:
        raise DataError(
            f"{where} is too long: expected at most {MAX_CHARACTERS} characters, write less"
        )
    try:
        return line.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{where} is not UTF-8 (byte {byte:#04x} at {error.start}): write it in UTF-8"
        ) from error
