"""The shipped bundle is good enough: typed answers exact, and a new person's projector learnt in a minute.

The thresholds are the project's own; benchmarks/quality.py measures more voices and people.
"""

from tiny_align.reference import corpus


def test_typed_held_out_sentences_are_answered_exactly(assistant):
    drawn = corpus.sentences(300, 21, held_out=True)
    wrong = [s for s in drawn if assistant.answer_text(s.text).text != s.answer]
    assert len(wrong) <= 3, wrong[:5]


def test_the_instruction_decides_between_answering_and_repeating(assistant):
    drawn = corpus.sentences(60, 23, held_out=True)
    for instruction in corpus.REPEAT_INSTRUCTIONS[:2]:
        repeated = [assistant.answer_text(s.text, instruction).text == s.text for s in drawn]
        assert sum(repeated) >= 0.95 * len(drawn)


def test_the_demo_personalises(run_cli, tmp_path):
    """The main job, with the shipped voice: far better after training than before, within two minutes."""
    done = run_cli("demo", "--json", "--out", str(tmp_path))
    assert done.status == 0, done.stderr
    result = done.document
    assert result["train_seconds"] < 120
    assert result["rougeL_after"] >= 0.80
    assert result["rougeL_after"] > result["rougeL_before"]
    assert result["wer_after"] < result["wer_before"]
