"""Recordings of a voice that the encoder was not trained on: FLAC files and metadata.jsonl.

The shipped ones (reference/voice) are a child's; train and test sentences come from the two splits
of the corpus.

    python -m tiny_align.reference.recordings --voice child --out reference/voice
"""

import argparse
import json
from pathlib import Path

import soundfile

from tiny_align.reference import corpus
from tiny_align.reference.speech import NEW_VOICES, SAMPLE_RATE, child, flite
from tiny_align.runtime.files import written_folder


def write_voice(voice: str, out: Path, n_train: int, n_test: int, seed: int = 11) -> None:
    """`n_train` + `n_test` sentences in one of flite's voices, or a child's ("child")."""
    say = child if voice == "child" else lambda text: flite(text, voice)
    write_recordings(out, n_train, n_test, seed, say)


def write_recordings(out: Path, n_train: int, n_test: int, seed: int, say) -> None:
    """Sentences of both splits as `say` speaks them: text -> (S,) float32 at SAMPLE_RATE."""
    drawn = [("train", s) for s in corpus.sentences(n_train, seed)]
    drawn += [("test", s) for s in corpus.sentences(n_test, seed, held_out=True)]
    with written_folder(out) as folder:
        rows = []
        for i, (split, sentence) in enumerate(drawn):
            name = f"{split}-{i:03d}.flac"
            soundfile.write(folder / name, say(sentence.text), SAMPLE_RATE, subtype="PCM_16")
            rows.append({"file_name": name, "transcription": sentence.text, "split": split})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voice", choices=(*NEW_VOICES, "child"), default="child")
    parser.add_argument("--out", type=Path, default=Path("reference/voice"))
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--test", type=int, default=40)
    args = parser.parse_args(argv)
    write_voice(args.voice, args.out, args.train, args.test)
    print(
        json.dumps(
            {"voice": args.voice, "path": str(args.out), "train": args.train, "test": args.test}
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
