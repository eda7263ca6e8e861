"""The reference bundle's answers, token by token: a change of the code must not change them.

After a change that is meant to change answers, record them anew and say so in the CHANGELOG:

    python tests/test_recorded_answers.py
"""

import json
import re
from pathlib import Path

from tiny_align.align.data.datasets import load_dataset
from tiny_align.runtime import Assistant
from tiny_align.runtime.bundle.shipped import shipped

RECORDED = Path(__file__).parent / "data" / "answers.json"
N_SPOKEN = 100
N_TYPED = 50


def answers(assistant: Assistant) -> dict[str, dict[str, list[int]]]:
    """Recording's file name, or typed line -> the answer's tokens."""
    lines = assistant.bundle.sentences.read_text(encoding="utf-8").splitlines()
    typed = lines[:: len(lines) // N_TYPED][:N_TYPED]
    spoken = load_dataset(shipped("voice"))[:N_SPOKEN]
    return {
        "spoken": {u.audio.name: list(assistant.answer_file(u.audio).tokens) for u in spoken},
        "typed": {line: list(assistant.answer_text(line).tokens) for line in typed},
    }


def test_every_answer_is_as_it_was_recorded(assistant):
    recorded = json.loads(RECORDED.read_text())
    now = answers(assistant)
    assert (len(now["spoken"]), len(now["typed"])) == (N_SPOKEN, N_TYPED)
    for way in ("spoken", "typed"):
        changed = [name for name, tokens in now[way].items() if tokens != recorded[way].get(name)]
        assert not changed, f"{len(changed)} {way} answers have changed: {changed[:5]}"


if __name__ == "__main__":
    with Assistant.load(shipped("bundle"), threads=1) as loaded:
        document = json.dumps(answers(loaded), indent=1)
    one_a_line = re.sub(r"\[[^\]]*\]", lambda tokens: " ".join(tokens[0].split()), document)
    RECORDED.write_text(one_a_line + "\n", encoding="utf-8")
