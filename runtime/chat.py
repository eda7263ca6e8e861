"""`tiny-align chat`: a conversation in typed turns, one a line on stdin; answers are streamed on stdout."""

import sys
from collections.abc import Iterator

from tiny_align.runtime import options
from tiny_align.runtime.errors import TinyAlignError


def add_arguments(parser) -> None:
    options.add_arguments(parser)


def run(args) -> dict:
    from tiny_align.runtime.bundle import Bundle

    options.check(args)
    seal = options.prepare_seal(args)
    with options.load_for_long(args, Bundle.open(args.bundle)) as assistant:
        sealed = seal()
        session = assistant.listen(args.instruction, options.decoding(args))
        turns = [_turn(session, line, args.json) for line in _lines()]
        return {
            "turns": turns,
            "positions": session.positions,
            "capacity": session.capacity,
            "backend": args.backend,
            "user": args.user,
            **sealed,
        }


def _lines() -> Iterator[str]:
    """What is typed or piped in, without empty lines; Ctrl-C ends it as Ctrl-D does."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        if line.strip():
            yield line.strip()


def _turn(session, text: str, quiet: bool) -> dict:
    """Answer one line; one that cannot be answered is said and ends nothing."""
    from tiny_align.runtime.assistant import collect
    from tiny_align.runtime.run import shown

    try:
        answer = collect(shown(session.say(text), quiet), 0.0)
    except TinyAlignError as error:
        print(f"tiny-align: {error}", file=sys.stderr)
        return {"asked": text, "error": str(error)}
    return {
        "asked": text,
        "text": answer.text,
        "tokens": len(answer.tokens),
        "ttft_ms": round(answer.ttft_s * 1000, 2),
    }
