"""`tiny-align chat`: a conversation in typed turns, one a line on stdin; answers are streamed on stdout."""

import sys
from collections.abc import Iterator

from tiny_align.runtime.commands import options
from tiny_align.runtime.errors import DataError, TinyAlignError

MAX_CHARACTERS = 100_000  # of a line
SHOWN_CHARACTERS = 200  # of a line that is refused, in the document


def add_arguments(parser) -> None:
    options.add_arguments(parser)


def run(args) -> dict:
    bundle = options.check(args)
    seal = options.prepare_seal(args)
    with options.load_for_long(args, bundle) as assistant:
        sealed = seal()
        session = assistant.listen(args.instruction, options.decoding(args))
        turns = [_turn(session, number, line, args.json) for number, line in _lines()]
        return {
            "turns": turns,
            "positions": session.positions,
            "capacity": session.capacity,
            "backend": args.backend,
            "user": args.user,
            **sealed,
        }


def _lines() -> Iterator[tuple[int, str]]:
    """What is typed or piped in, without empty lines, and its line's number; Ctrl-C ends it as Ctrl-D does."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(
            encoding="utf-8", errors="surrogateescape"
        )  # whatever the locale; see _text
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
        if line.strip("\ufeff \t\r\n"):  # the first is what some editors begin a file with
            yield number, line.strip("\ufeff \t\r\n")


def _read_line() -> str:
    """A line; of one that is too long the beginning, and no more of it is held."""
    try:
        line = rest = sys.stdin.readline(MAX_CHARACTERS + 1)
        while len(rest) > MAX_CHARACTERS and not rest.endswith("\n"):
            rest = sys.stdin.readline(MAX_CHARACTERS + 1)
    except OSError as error:
        raise TinyAlignError(
            f"standard input cannot be read ({error}): type turns, or pipe a text file in"
        ) from error
    return line


def _turn(session, number: int, line: str, quiet: bool) -> dict:
    """Answer one line; one that cannot be answered is said and ends nothing."""
    from tiny_align.runtime.assistant import collect
    from tiny_align.runtime.commands.run import shown

    try:
        text = _text(line, f"line {number}")
        answer = collect(shown(session.say(text), quiet), 0.0)
    except TinyAlignError as error:
        print(f"tiny-align: {error}", file=sys.stderr)
        return {"asked": _printable(line), "error": str(error)}
    return {
        "asked": text,
        "text": answer.text,
        "tokens": len(answer.tokens),
        "ttft_ms": round(answer.ttft_s * 1000, 2),
    }


def _text(line: str, where: str) -> str:
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
        wrong = error.object[error.start]
        raise DataError(
            f"{where} is not UTF-8 (byte {wrong:#04x} at {error.start}): write it in UTF-8"
        ) from error


def _printable(line: str) -> str:
    """The beginning of a line, bytes that are no text as \\xff."""
    return (
        line[:SHOWN_CHARACTERS]
        .encode("utf-8", "surrogateescape")
        .decode("utf-8", "backslashreplace")
    )
