"""`tiny-align listen`: a conversation by voice, from a microphone or from recordings played to it.

Answers are streamed on stdout; the level, what is going on and a line of latencies per turn are on stderr.
"""

import contextlib
import statistics
import sys
from pathlib import Path

from tiny_align.runtime.commands import options
from tiny_align.runtime.errors import TinyAlignError

METER_DB = (-60.0, -10.0)  # dBFS at its left and right end
METER_CELLS = 20


def add_arguments(parser) -> None:
    options.add_arguments(parser)
    parser.add_argument(
        "--wav", type=Path, nargs="+", metavar="AUDIO", help="recordings instead of a microphone"
    )
    parser.add_argument(
        "--fast", action="store_true", help="with --wav: each as soon as the one before is answered"
    )
    parser.add_argument("--device", help="microphone, by name or number (default: the system's)")


def run(args) -> dict:
    from tiny_align.runtime.listening.endpoint import Endpointer
    from tiny_align.runtime.listening.loop import Notice, TurnEnded, listen

    if args.fast and not args.wav:
        raise TinyAlignError(
            "--fast is for recordings and a microphone has no other speed: give --wav too"
        )
    bundle = options.check(args)
    seal = options.prepare_seal(args)
    sample_rate = bundle.manifest.front_end.sample_rate
    endpointer, show, seen = Endpointer(sample_rate), _Screen(args.json), []
    recordings = _recordings(args, sample_rate)
    with (
        _source(args, sample_rate, recordings) as source,
        options.load_for_long(args, bundle) as assistant,
    ):
        sealed = seal(microphone=not args.wav)
        session = assistant.listen(args.instruction, options.decoding(args))
        events = contextlib.closing(listen(session, source, endpointer))
        with (
            contextlib.suppress(KeyboardInterrupt),
            events as heard,
        ):  # Ctrl-C: the way to stop a microphone
            for event in heard:
                if isinstance(event, TurnEnded | Notice):
                    seen.append(event)
                show(event)
        turns = [event for event in seen if isinstance(event, TurnEnded)]
        notices = [event for event in seen if isinstance(event, Notice)]
        notes = [note for recording in recordings for note in recording.notes]
        chosen = {"backend": args.backend, "user": args.user, "notes": notes}
        return _report(turns, notices, session) | chosen | sealed


def _recordings(args, sample_rate: int) -> list:
    """What is played in place of a microphone, if anything is."""
    from tiny_align.runtime.audio.samples import read_recording

    recordings = []
    for path in args.wav or []:
        recordings.append(read_recording(path, sample_rate))
        options.show_notes(recordings[-1])
    return recordings


def _source(args, sample_rate: int, recordings: list):
    """The microphone, open until the end, or what is played in its place."""
    from tiny_align.runtime.listening.loop import Recordings
    from tiny_align.runtime.listening.microphone import Microphone

    if recordings:
        played = Recordings(
            [recording.samples for recording in recordings], sample_rate, live=not args.fast
        )
        return contextlib.nullcontext(played)
    return Microphone(sample_rate, args.device)


def _report(turns: list, notices: list, session) -> dict:
    waits = [turn.ttft_s for turn in turns if turn.ttft_s is not None]
    return {
        "turns": [
            {
                "text": turn.text,
                "heard": turn.heard,
                "cancelled": turn.cancelled,
                "tokens": turn.tokens,
                "speech_s": round(turn.speech_s, 3),
                "hangover_s": round(turn.hangover_s, 3),
                "ttft_ms": None if turn.ttft_s is None else round(turn.ttft_s * 1000, 2),
                "seconds": round(turn.seconds, 4),
            }
            for turn in turns
        ],
        "ttft_ms": round(statistics.median(waits) * 1000, 2) if waits else None,
        "dropped_s": round(sum(notice.dropped_s for notice in notices), 2),
        "notices": [notice.text for notice in notices],
        "positions": session.positions,
        "capacity": session.capacity,
    }


class _Screen:
    """Shows events as they come; the level only on a terminal."""

    def __init__(self, quiet: bool):
        self._quiet, self._meter = quiet, sys.stderr.isatty() and not quiet

    def __call__(self, event) -> None:
        getattr(self, f"_{type(event).__name__}")(event)

    def _Level(self, level) -> None:
        if self._meter:
            state = "silence" if level.speaking_s is None else f"speaking {level.speaking_s:.1f} s"
            print(
                f"\r\033[K{meter(level.db)} {level.db:4.0f} dB  {state}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def _TurnBegan(self, began) -> None:
        self._say(f"turn {began.turn}: speech at {began.at_s:.1f} s")

    def _Text(self, piece) -> None:
        if not self._quiet:
            print(piece.text, end="", flush=True)

    def _TurnEnded(self, turn) -> None:
        if turn.text and not self._quiet:
            print(flush=True)
        self._say(f"turn {turn.turn}: {_latencies(turn)}")

    def _Notice(self, notice) -> None:
        self._say(notice.text, always=True)

    def _say(self, text: str, always: bool = False) -> None:
        clear = "\r\033[K" if self._meter else ""
        if always or not self._quiet:
            print(f"{clear}tiny-align: {text}", file=sys.stderr, flush=True)


def _latencies(turn) -> str:
    end = (
        "cancelled, the person spoke again"
        if turn.cancelled
        else f"{turn.tokens} tokens in {turn.seconds:.2f} s"
    )
    if not turn.heard:
        end = "nothing was heard: no word in it"
    if turn.ttft_s is None:
        return f"{turn.speech_s:.1f} s of speech; {end}"
    felt = turn.hangover_s + turn.ttft_s
    return (
        f"{turn.speech_s:.1f} s of speech; first word {felt:.2f} s after it ({turn.hangover_s:.2f} s of silence "
        f"to be sure, {turn.ttft_s:.2f} s of work); {end}"
    )


def meter(db: float) -> str:
    """A bar of METER_CELLS cells."""
    low, high = METER_DB
    full = round(METER_CELLS * min(1.0, max(0.0, (db - low) / (high - low))))
    return "█" * full + "·" * (METER_CELLS - full)
