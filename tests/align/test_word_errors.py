"""Error rates after normalising both sides: which texts agree, and that none makes them fail."""

import pytest

from tiny_align.align.evaluation.word_errors import error_rates, normalise, normaliser_name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("twenty one", "21."),
        ("twenty-one", "Twenty one!"),
        ("six five six two one", "6 5 6 2 1"),
        ("six five six two one", "65621"),
        ("one", "1."),
        ("one two", "12"),
        ("one hundred and five dollars", "$105"),
        ("the twenty first", "the 21st"),
        ("Mr. Brown", "mister brown"),
        ("Is the colour grey?", "is the color gray"),
        ("I don't know", "i do not know"),
        ("I don’t know", "i do not know"),
        ("it's five percent, um, maybe", "it is 5% maybe"),
        ("Привет, мир!", "привет мир"),
        ("¿Dónde está?", "donde esta"),
    ],
)
def test_spellings_of_the_same_words_agree(one, other):
    assert error_rates([one], [other]) == error_rates([other], [one]) == (0, 0)


def test_words_that_differ_are_counted_over_all_references():
    wer, cer = error_rates(["what color is the sky", "hello"], ["what color is the ski", "hello"])
    assert wer == pytest.approx(1 / 6) and cer == pytest.approx(1 / 26)


def test_one_wrong_digit_is_one_error():
    wer, _ = error_rates(["six five six two one"], ["six five six three one"])
    assert wer == pytest.approx(1 / 5)


def test_a_sentence_in_another_script_keeps_its_words():
    assert normalise("Мне нужно пальто, завтра!") == "мне нужно пальто завтра"
    assert error_rates(["мне нужно пальто"], ["мне нужна шапка"])[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "wer"),
    [("what color", "", 1), ("", "", 0), ("", "two words", 2), ("um", "uh.", 0)],
)
def test_empty_texts(reference, hypothesis, wer):
    assert error_rates([reference], [hypothesis])[0] == wer


@pytest.mark.parametrize(
    "text", ["1" * 5000, "million " * 900, "\ud800 a", "a\0b", "$", "and a half", "漢字", "😀"]
)
def test_awkward_texts_agree_with_themselves(text):
    assert error_rates([text], [text]) == (0, 0)


def test_no_texts():
    assert error_rates([], []) == (0, 0)


def test_the_normaliser_is_named_with_its_version():
    assert normaliser_name().startswith("whisper-normalizer 0.")
