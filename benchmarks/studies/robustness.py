"""Word errors of speech as it comes: noise before, inside and after it, levels, clipping, a second channel.

The test takes of a voice are repeated by an aligned user's projector, plain and in each condition, in three ways: as
`run` answers a file, as a session answers pieces of any size, and as `listen` finds the turns itself.

    python -m benchmarks.studies.robustness [--bundle DIR --data DIR --user NAME --users DIR]

Without a user, the shipped voice is aligned first, by the command's defaults. The last line is a JSON document.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from tiny_align.align.commands.demo import shipped
from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.word_errors import error_rates
from tiny_align.align.training.align_user import align_user
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.listening.endpoint import Endpointer
from tiny_align.runtime.listening.loop import Recordings, TurnEnded, listen

RATE = 16_000
ROOM_DB = -60.0  # dBFS, of the noise beside the speech
CLIPPED_DB = 12.0
BOUND, CLIPPED_BOUND = 0.02, 0.05  # word error rate over that of plain speech
PIECES_S = (0.003, 0.9)  # of what a session is given


def room(seconds: float) -> np.ndarray:
    """Noise of a quiet room."""
    sound = np.random.default_rng(0).standard_normal(round(seconds * RATE))
    return (10 ** (ROOM_DB / 20) * sound).astype(np.float32)


def parted(audio: np.ndarray, seconds: float) -> np.ndarray:
    """Room noise put into the quietest moment near the middle."""
    energy = np.convolve(audio**2, np.ones(RATE // 20), "same")
    start = max(0, len(audio) // 2 - 6000)
    at = start + int(np.argmin(energy[start : start + 12000]))
    return np.concatenate([audio[:at], room(seconds), audio[at:]])


def at_level(audio: np.ndarray, db: float) -> np.ndarray:
    """The same at an RMS of `db` dBFS, in 16 bits."""
    scaled = audio * 10 ** (db / 20) / np.sqrt(np.mean(audio**2))
    return (np.round(scaled * 32767) / 32768).astype(np.float32)


CONDITIONS: dict[
    str, Callable[[np.ndarray], np.ndarray]
] = {  # name -> (S,) to (S',) or, with channels, (S', C)
    "plain": lambda audio: audio,
    "2 s before": lambda audio: np.concatenate([room(2), audio]),
    "5 s before": lambda audio: np.concatenate([room(5), audio]),
    "0.6 s inside": lambda audio: parted(audio, 0.6),
    "2 s inside": lambda audio: parted(audio, 2),
    "2 s after": lambda audio: np.concatenate([audio, room(2)]),
    "5 s after": lambda audio: np.concatenate([audio, room(5)]),
    "-30 dBFS": lambda audio: at_level(audio, -30),
    "-45 dBFS": lambda audio: at_level(audio, -45),
    "-57 dBFS": lambda audio: at_level(audio, -57),
    "offset": lambda audio: np.clip(audio + np.float32(0.05), -1, 1),
    "clipped": lambda audio: np.clip(audio * 10 ** (CLIPPED_DB / 20), -1, 1).astype(np.float32),
    "stereo, inverted": lambda audio: np.stack([audio, -audio], axis=1),
    "stereo, silent": lambda audio: np.stack([audio, np.zeros_like(audio)], axis=1),
    "stereo, 5 ms late": lambda audio: np.stack([audio, np.roll(audio, RATE // 200)], axis=1),
}


def by_run(assistant: Assistant, audio: np.ndarray, instruction: str) -> str:
    return assistant.answer(audio, instruction).text


def by_session(assistant: Assistant, audio: np.ndarray, instruction: str) -> str:
    rng, session, at = np.random.default_rng(0), assistant.listen(instruction), 0
    while at < len(audio):
        piece = audio[at : at + round(rng.uniform(*PIECES_S) * RATE)]
        session.push(piece)
        at += len(piece)
    return "".join(event.text for event in session.finish()).strip()


def by_listen(assistant: Assistant, audio: np.ndarray, instruction: str) -> str:
    session, source = (
        assistant.listen(instruction, Decoding()),
        Recordings([audio], RATE, live=False),
    )
    events = listen(session, source, Endpointer(RATE))
    return " ".join(event.text for event in events if isinstance(event, TurnEnded))


WAYS = {"run": by_run, "session": by_session, "listen": by_listen}


def as_read(audio: np.ndarray, folder: Path) -> np.ndarray:
    """What is read of the audio from a file of 16 bits: where channels become one."""
    path = folder / "take.wav"
    soundfile.write(path, audio, RATE, subtype="PCM_16")
    return read_audio(path, RATE)


def measure(
    assistant: Assistant,
    takes: list[tuple[str, np.ndarray]],
    conditions: dict = CONDITIONS,
    ways: dict = WAYS,
) -> list[dict]:
    """A row for each condition: word error rates by way."""
    instruction = assistant.bundle.manifest.prompt.repeat_instruction
    texts, rows = [text for text, _ in takes], []
    with tempfile.TemporaryDirectory() as folder:
        for name, change in conditions.items():
            heard = [as_read(change(audio), Path(folder)) for _, audio in takes]
            row = {"condition": name}
            for way, answer in ways.items():
                repeated = [answer(assistant, audio, instruction) for audio in heard]
                row[way] = round(error_rates(texts, repeated)[0], 4)
            rows.append(row)
            print(
                "  ".join(
                    f"{value:<18}" if isinstance(value, str) else f"{value:.3f}"
                    for value in row.values()
                ),
                flush=True,
            )
    return rows


def judge(rows: list[dict], slack: float = 0.0) -> list[str]:
    """What is beyond its bound; a pause inside is not judged where `listen` may end the turn in it."""
    plain, beyond = rows[0], []
    for row in rows[1:]:
        bound = slack + (CLIPPED_BOUND if row["condition"] == "clipped" else BOUND)
        for way in plain.keys() - {"condition"}:
            excused = way == "listen" and row["condition"] == "2 s inside"
            if not excused and row[way] > plain[way] + bound:
                beyond.append(
                    f"{row['condition']} by {way}: {row[way]:.3f}, plain {plain[way]:.3f}"
                )
    return beyond


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--data", type=Path, default=shipped("voice"))
    parser.add_argument(
        "--user", help="who is aligned already; without one, `--data` is aligned first"
    )
    parser.add_argument("--users", type=Path)
    args = parser.parse_args(argv)
    logging.getLogger("tiny_align.runtime.audio.samples").setLevel(
        logging.ERROR
    )  # it names what is wrong with every take
    utterances = load_dataset(args.data)
    with tempfile.TemporaryDirectory() as folder:
        users = args.users
        if args.user is None:
            users, args.user = Path(folder), "measured"
            align_user(args.bundle, utterances, args.user, users, TrainingLimits(threads=1))
        takes = [(u.text, u.load(RATE)) for u in split_of(utterances, "test")]
        with Assistant.load(args.bundle, args.user, users=users, threads=1) as assistant:
            rows = measure(assistant, takes)
    beyond = judge(rows)
    print(json.dumps({"n": len(takes), "rows": rows, "beyond": beyond}))
    return int(bool(beyond))


if __name__ == "__main__":
    raise SystemExit(main())
