"""`tiny-align run`: answer one recording, the text streamed as it comes."""

import sys
from pathlib import Path

from tiny_align.runtime.errors import TinyAlignError


def add_arguments(parser) -> None:
    parser.add_argument("audio", type=Path, help="a recording, any rate and channel count")
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--user", help="whose projector; without it, the general one")
    parser.add_argument("--users", type=Path, help="where persons are kept (default: BUNDLE/users)")
    parser.add_argument("--instruction", help="what to do with the speech (default: the bundle's)")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the best token")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, with a temperature")
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime (default) or tensorrt")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")


def run(args) -> dict:
    from tiny_align.runtime.assistant import Assistant, collect
    from tiny_align.runtime.audio import read_audio
    from tiny_align.runtime.llm import Decoding

    _check(args)
    decoding = Decoding(args.max_tokens, args.temperature, seed=args.seed)
    options = {"users": args.users, "backend": args.backend, "threads": args.threads}
    with Assistant.load(args.bundle, args.user, **options) as assistant:
        audio = read_audio(args.audio, assistant.sample_rate, assistant.max_speech_s)
        events = assistant.stream(audio, args.instruction, decoding)
        answer = collect(shown(events, quiet=args.json), len(audio) / assistant.sample_rate)
    return {
        "text": answer.text,
        "heard": answer.heard,
        "tokens": len(answer.tokens),
        "ttft_ms": round(answer.ttft_s * 1000, 2),
        "rtf": round(answer.rtf, 4),
        "audio_s": round(answer.audio_s, 3),
        "backend": args.backend,
        "user": args.user,
    }


def _check(args) -> None:
    for name, least in (("max_tokens", 1), ("temperature", 0), ("seed", 0), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and not value >= least:  # NaN fails too
            raise TinyAlignError(f"--{name.replace('_', '-')} is {value}: give at least {least}")


def shown(events, quiet: bool = False):
    """The events, their text printed as they pass; on stderr, if so, that nothing was heard."""
    for event in events:
        if event.token is None:
            print("tiny-align: nothing was heard: no word in the recording", file=sys.stderr)
        elif not quiet:
            print(event.text, end="", flush=True)
        yield event
    if not quiet:
        print()
