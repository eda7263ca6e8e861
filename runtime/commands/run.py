"""`tiny-align run`: answer one recording; the text is printed as it comes."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_align.runtime.commands.answering import (
    close_seal,
    decoding,
    load,
    open_bundle,
    prepare_seal,
    print_events,
    print_notes,
)
from tiny_align.runtime.commands.options import (
    AnsweringOptions,
    add_options,
    option,
    read_options,
)


@dataclass(frozen=True, kw_only=True)
class RunOptions(AnsweringOptions):
    audio: Path = field(
        metadata=option(
            "a recording of any sampling rate and channel count; - reads standard input",
            positional=True,
        )
    )


def add_arguments(parser: ArgumentParser) -> None:
    add_options(parser, RunOptions)


def run(args: Namespace) -> dict[str, Any]:
    """Answer the recording; the command's document."""
    from tiny_align.runtime.assistant import collect
    from tiny_align.runtime.audio.samples import read_recording

    options = read_options(args, RunOptions)
    bundle = open_bundle(options)
    seal = prepare_seal(options, bundle)
    with load(options, bundle) as assistant:
        sealed = close_seal(seal)
        recording = read_recording(options.audio, assistant.sample_rate, assistant.max_speech_s)
        print_notes(recording)
        events = assistant.stream(recording.samples, options.instruction, decoding(options))
        seconds = len(recording.samples) / assistant.sample_rate
        answer = collect(print_events(events, quiet=args.json), seconds)
    return {
        "text": answer.text,
        "heard": answer.heard,
        "tokens": len(answer.tokens),
        "ttft_ms": round(answer.ttft_s * 1000, 2),
        "rtf": round(answer.rtf, 4),
        "audio_s": round(answer.audio_s, 3),
        "backend": options.backend,
        "user": options.user,
        "notes": recording.notes,
        **sealed,
    }
