"""Word errors under real conditions: noise around speech, levels, clipping, a second channel.

The test recordings of a voice are repeated by an aligned user's projector, unchanged and in each
condition, in three ways: as `run` answers a file, as a session answers pieces of any size, and as
`listen` finds the turns itself.

    python -m benchmarks.studies.robustness [--bundle DIR --data DIR --user NAME --users DIR]

Without a user, the shipped voice is aligned first, by the command's defaults. The last line is a
JSON document.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tiny_align.align.data.datasets import load_dataset, split_of
from tiny_align.align.evaluation.word_errors import error_rates
from tiny_align.align.training.align_user import align_user
from tiny_align.align.training.limits import TrainingLimits
from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.audio.samples import read_audio
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.listening.endpoint import Endpointer
from tiny_align.runtime.listening.loop import Recordings, TurnEnded, listen

RATE = 16_000
ROOM_DB = -60.0  # dBFS, of the noise beside the speech
CLIPPED_DB = 12.0
BOUND = 0.02  # word error rate over that of the unchanged recordings
CLIPPED_BOUND = 0.05
PIECES_S = (0.003, 0.9)  # that a session gets
PLAIN = "plain"  # the unchanged recordings


def room_noise(seconds: float) -> np.ndarray:
    """Noise of a quiet room."""
    noise = np.random.default_rng(0).standard_normal(round(seconds * RATE))
    return (10 ** (ROOM_DB / 20) * noise).astype(np.float32)


def insert_pause(audio: np.ndarray, seconds: float) -> np.ndarray:
    """Room noise put into the quietest moment near the middle."""
    energy = np.convolve(audio**2, np.ones(RATE // 20), "same")
    start = max(0, len(audio) // 2 - 6000)
    quietest = start + int(np.argmin(energy[start : start + 12000]))
    return np.concatenate([audio[:quietest], room_noise(seconds), audio[quietest:]])


def at_level(audio: np.ndarray, db: float) -> np.ndarray:
    """The same at an RMS of `db` dBFS, in 16 bits."""
    scaled = audio * 10 ** (db / 20) / np.sqrt(np.mean(audio**2))
    return (np.round(scaled * 32767) / 32768).astype(np.float32)


def clip(audio: np.ndarray) -> np.ndarray:
    """The same, too loud for its samples."""
    return np.clip(audio * 10 ** (CLIPPED_DB / 20), -1, 1).astype(np.float32)


Condition = Callable[[np.ndarray], np.ndarray]  # (S,) to (S',) or, with channels, (S', C)

CONDITIONS: dict[str, Condition] = {
    PLAIN: lambda audio: audio,
    "2 s before": lambda audio: np.concatenate([room_noise(2), audio]),
    "5 s before": lambda audio: np.concatenate([room_noise(5), audio]),
    "0.6 s inside": lambda audio: insert_pause(audio, 0.6),
    "2 s inside": lambda audio: insert_pause(audio, 2),
    "2 s after": lambda audio: np.concatenate([audio, room_noise(2)]),
    "5 s after": lambda audio: np.concatenate([audio, room_noise(5)]),
    "-30 dBFS": lambda audio: at_level(audio, -30),
    "-45 dBFS": lambda audio: at_level(audio, -45),
    "-57 dBFS": lambda audio: at_level(audio, -57),
    "offset": lambda audio: np.clip(audio + np.float32(0.05), -1, 1),
    "clipped": clip,
    "stereo, inverted": lambda audio: np.stack([audio, -audio], axis=1),
    "stereo, silent": lambda audio: np.stack([audio, np.zeros_like(audio)], axis=1),
    "stereo, 5 ms late": lambda audio: np.stack([audio, np.roll(audio, RATE // 200)], axis=1),
}


def by_run(assistant: Assistant, audio: np.ndarray, instruction: str) -> str:
    return assistant.answer(audio, instruction).text


def by_session(assistant: Assistant, audio: np.ndarray, instruction: str) -> str:
    rng = np.random.default_rng(0)
    session = assistant.listen(instruction)
    start = 0
    while start < len(audio):
        piece = audio[start : start + round(rng.uniform(*PIECES_S) * RATE)]
        session.push(piece)
        start += len(piece)
    return "".join(event.text for event in session.finish()).strip()


def by_listen(assistant: Assistant, audio: np.ndarray, instruction: str) -> str:
    session = assistant.listen(instruction, Decoding())
    source = Recordings([audio], RATE, live=False)
    texts = []
    for event in listen(session, source, Endpointer(RATE)):
        if isinstance(event, TurnEnded):
            texts.append(event.text)
    return " ".join(texts)


Way = Callable[[Assistant, np.ndarray, str], str]

WAYS: dict[str, Way] = {"run": by_run, "session": by_session, "listen": by_listen}


def read_back(audio: np.ndarray, folder: Path) -> np.ndarray:
    """The audio as it is read from a file of 16 bits, where several channels become one."""
    path = folder / "recording.wav"
    soundfile.write(path, audio, RATE, subtype="PCM_16")
    return read_audio(path, RATE)


def measure(
    assistant: Assistant,
    recordings: list[tuple[str, np.ndarray]],
    conditions: dict[str, Condition] = CONDITIONS,
    ways: dict[str, Way] = WAYS,
) -> list[dict[str, Any]]:
    """A row for each condition: word error rates by way.

    Args:
        recordings: transcript and audio (S,).
    """
    instruction = assistant.bundle.manifest.prompt.repeat_instruction
    transcripts = [text for text, _ in recordings]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, change in conditions.items():
            changed = [read_back(change(audio), Path(folder)) for _, audio in recordings]
            row: dict[str, Any] = {"condition": name}
            for way, answer in ways.items():
                repeated = [answer(assistant, audio, instruction) for audio in changed]
                row[way] = round(error_rates(transcripts, repeated)[0], 4)
            rows.append(row)
            rates = [f"{row[way]:.3f}" for way in ways]
            print("  ".join([f"{name:<18}", *rates]), flush=True)
    return rows


def find_failures(rows: list[dict[str, Any]], slack: float = 0.0) -> list[str]:
    """Which rows are beyond their bound over the first one, in words.

    `listen` may end the turn in a pause inside, so that condition is not held against it.
    """
    plain = rows[0]
    failures = []
    for row in rows[1:]:
        condition = row["condition"]
        bound = slack + (CLIPPED_BOUND if condition == "clipped" else BOUND)
        for way in plain.keys() - {"condition"}:
            if way == "listen" and condition == "2 s inside":
                continue
            if row[way] > plain[way] + bound:
                failures.append(f"{condition} by {way}: {row[way]:.3f}, plain {plain[way]:.3f}")
    return failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, default=shipped("bundle"))
    parser.add_argument("--data", type=Path, default=shipped("voice"))
    parser.add_argument("--user", help="an aligned user (default: align one to --data first)")
    parser.add_argument("--users", type=Path, help="directory of user profiles")
    args = parser.parse_args(argv)
    # it would name what is wrong with every recording
    logging.getLogger("tiny_align.runtime.audio.samples").setLevel(logging.ERROR)
    utterances = load_dataset(args.data)
    with tempfile.TemporaryDirectory() as folder:
        user = args.user
        users = args.users
        if user is None:
            user = "measured"
            users = Path(folder)
            align_user(args.bundle, utterances, user, users, TrainingLimits(threads=1))
        recordings = [(u.text, u.load(RATE)) for u in split_of(utterances, "test")]
        with Assistant.load(args.bundle, user, users=users, threads=1) as assistant:
            rows = measure(assistant, recordings)
    failures = find_failures(rows)
    print(json.dumps({"n": len(recordings), "rows": rows, "beyond": failures}))
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
