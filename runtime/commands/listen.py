"""`tiny-align listen`: a conversation by voice, from a microphone or from recordings played to it.

Answers go to stdout; the level, the state and a line of latencies per turn go to stderr.
"""

import contextlib
import statistics
import sys
from argparse import ArgumentParser, Namespace
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_align.runtime.commands.answering import (
    close_seal,
    decoding,
    load,
    open_bundle,
    prepare_seal,
    print_notes,
)
from tiny_align.runtime.commands.options import (
    AnsweringOptions,
    add_options,
    option,
    read_options,
)
from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from tiny_align.runtime.audio.samples import Recording
    from tiny_align.runtime.listening import loop
    from tiny_align.runtime.listening.microphone import Microphone
    from tiny_align.runtime.session import Session

METER_DB = (-60.0, -10.0)  # dBFS at its left and right end
METER_CELLS = 20
CLEAR_LINE = "\r\033[K"


@dataclass(frozen=True, kw_only=True)
class ListenOptions(AnsweringOptions):
    wav: tuple[Path, ...] = field(
        default=(),
        metadata=option("play these recordings instead of using a microphone", metavar="AUDIO"),
    )
    fast: bool = field(
        default=False,
        metadata=option("with --wav: play each recording as soon as the one before is answered"),
    )
    device: str | None = field(
        default=None, metadata=option("microphone (default: the system's)", metavar="NAME|NUMBER")
    )


def add_arguments(parser: ArgumentParser) -> None:
    add_options(parser, ListenOptions)


def run(args: Namespace) -> dict[str, Any]:
    """Listen until the recordings end or Ctrl-C is pressed; the command's document."""
    from tiny_align.runtime.listening.endpoint import Endpointer
    from tiny_align.runtime.listening.loop import Notice, TurnEnded, listen

    options = read_options(args, ListenOptions)
    if options.fast and not options.wav:
        raise TinyAlignError(
            "--fast is for recordings and a microphone has no other speed: give --wav too"
        )
    bundle = open_bundle(options)
    seal = prepare_seal(options, bundle)
    sample_rate = bundle.manifest.front_end.sample_rate
    endpointer = Endpointer(sample_rate)
    recordings = _read_recordings(options, sample_rate)
    screen = Screen(quiet=args.json)
    turns: list[TurnEnded] = []
    notices: list[Notice] = []
    with (
        _open_source(options, sample_rate, recordings) as source,
        load(options, bundle, announce=not args.json) as assistant,
    ):
        sealed = close_seal(seal, microphone=not options.wav)
        session = assistant.listen(options.instruction, decoding(options))
        with (
            contextlib.suppress(KeyboardInterrupt),  # the way to stop a microphone
            contextlib.closing(listen(session, source, endpointer)) as events,
        ):
            for event in events:
                if isinstance(event, TurnEnded):
                    turns.append(event)
                elif isinstance(event, Notice):
                    notices.append(event)
                screen.show(event)
        report = _report(turns, notices, session)
    report["backend"] = options.backend
    report["user"] = options.user
    report["notes"] = []
    for recording in recordings:
        report["notes"] += recording.notes
    return report | sealed


def _read_recordings(options: ListenOptions, sample_rate: int) -> "list[Recording]":
    """What to play instead of a microphone, if anything."""
    from tiny_align.runtime.audio.samples import read_recording

    recordings = []
    for path in options.wav:
        recording = read_recording(path, sample_rate)
        print_notes(recording)
        recordings.append(recording)
    return recordings


def _open_source(
    options: ListenOptions, sample_rate: int, recordings: "list[Recording]"
) -> "AbstractContextManager[Microphone | loop.Recordings]":
    """The microphone, or the recordings to play."""
    from tiny_align.runtime.listening.loop import Recordings
    from tiny_align.runtime.listening.microphone import Microphone

    if not recordings:
        return Microphone(sample_rate, options.device)
    samples = [recording.samples for recording in recordings]
    return contextlib.nullcontext(Recordings(samples, sample_rate, live=not options.fast))


def _report(
    turns: "list[loop.TurnEnded]", notices: "list[loop.Notice]", session: "Session"
) -> dict[str, Any]:
    entries = []
    for turn in turns:
        entry = {
            "text": turn.text,
            "heard": turn.recognised,
            "cancelled": turn.cancelled,
            "tokens": turn.tokens,
            "speech_s": round(turn.speech_s, 3),
            "hangover_s": round(turn.hangover_s, 3),
            "ttft_ms": _milliseconds(turn.ttft_s),
            "seconds": round(turn.seconds, 4),
        }
        entries.append(entry)
    latencies = [turn.ttft_s for turn in turns if turn.ttft_s is not None]
    return {
        "turns": entries,
        "ttft_ms": _milliseconds(statistics.median(latencies) if latencies else None),
        "dropped_s": round(sum(notice.dropped_s for notice in notices), 2),
        "notices": [notice.text for notice in notices],
        "positions": session.positions,
        "capacity": session.capacity,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


class Screen:
    """Shows events as they come; the level only on a terminal."""

    def __init__(self, quiet: bool):
        self._quiet = quiet
        self._meter = sys.stderr.isatty() and not quiet

    def show(self, event: "loop.LoopEvent") -> None:
        from tiny_align.runtime.listening.loop import Level, Notice, Text, TurnBegan, TurnEnded

        match event:
            case Notice():
                self._print_line(event.text, always=True)
            case Level() if self._meter:
                line = f"{CLEAR_LINE}{meter(event.db)} {event.db:4.0f} dB  {_state(event)}"
                print(line, end="", file=sys.stderr, flush=True)
            case TurnBegan():
                self._print_line(f"turn {event.turn}: speech at {event.at_s:.1f} s")
            case Text() if not self._quiet:
                print(event.text, end="", flush=True)
            case TurnEnded():
                if event.text and not self._quiet:
                    print(flush=True)
                self._print_line(f"turn {event.turn}: {_latencies(event)}")

    def _print_line(self, text: str, always: bool = False) -> None:
        if self._quiet and not always:
            return
        clear = CLEAR_LINE if self._meter else ""
        print(f"{clear}tiny-align: {text}", file=sys.stderr, flush=True)


def _state(level: "loop.Level") -> str:
    return "silence" if level.speaking_s is None else f"speaking {level.speaking_s:.1f} s"


def _latencies(turn: "loop.TurnEnded") -> str:
    speech = f"{turn.speech_s:.1f} s of speech"
    if not turn.recognised:
        end = "no word was recognised"
    elif turn.cancelled:
        end = "cancelled, the user spoke again"
    else:
        end = f"{turn.tokens} tokens in {turn.seconds:.2f} s"
    if turn.ttft_s is None:
        return f"{speech}; {end}"
    return (
        f"{speech}; first word {turn.hangover_s + turn.ttft_s:.2f} s after it "
        f"({turn.hangover_s:.2f} s of silence to be sure, {turn.ttft_s:.2f} s of work); {end}"
    )


def meter(db: float) -> str:
    """A bar of METER_CELLS cells."""
    low, high = METER_DB
    share = min(1.0, max(0.0, (db - low) / (high - low)))
    full = round(METER_CELLS * share)
    return "█" * full + "·" * (METER_CELLS - full)
