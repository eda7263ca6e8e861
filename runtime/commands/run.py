"""`tiny-align run`: answer one recording, the text streamed as it comes."""

import sys
from pathlib import Path

from tiny_align.runtime.commands import options


def add_arguments(parser) -> None:
    parser.add_argument(
        "audio", type=Path, help="a recording, any rate and channel count; - reads standard input"
    )
    options.add_arguments(parser)


def run(args) -> dict:
    from tiny_align.runtime.assistant import collect
    from tiny_align.runtime.audio.samples import read_recording

    bundle = options.check(args)
    seal = options.prepare_seal(args)
    with options.load(args, bundle) as assistant:
        sealed = seal()
        recording = read_recording(args.audio, assistant.sample_rate, assistant.max_speech_s)
        options.show_notes(recording)
        audio = recording.samples
        events = assistant.stream(audio, args.instruction, options.decoding(args))
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
        "notes": recording.notes,
        **sealed,
    }


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
