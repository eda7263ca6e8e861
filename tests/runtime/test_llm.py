"""runtime/llm.py on the shipped LLM, and on a scripted one where the tokens must be known.

The shipped LLM has INT4 weights and rounds its activations to int8 block by block, so a kernel for
one position and one for many may round a value differently: logits are compared within a share of
their own spread.
"""

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiny_align.runtime import llm as llm_module
from tiny_align.runtime.backends import budget
from tiny_align.runtime.backends.base import Decoder, Scores
from tiny_align.runtime.errors import DataError, TinyAlignError
from tiny_align.runtime.llm import Cache, Decoding, LanguageModel, TextStream, loops

TOLERANCE = 0.1  # largest difference of a logit, in standard deviations of the logits
TEXT = "what is the time"
WARM = Decoding(max_tokens=24, temperature=8.0, top_k=1000)  # draws unlikely tokens too


@pytest.fixture(scope="module")
def llm(assistant):
    return assistant.llm


@pytest.fixture(scope="module")
def prompt(llm):
    """(T, D) float32: a typed prompt."""
    return llm.assemble(llm.embed(llm.encode_words(TEXT)))


def assert_close(got, want):
    difference = np.abs(got.logits - want.logits)
    spread = want.logits.std()
    share = difference.max() / spread
    assert share < TOLERANCE, (
        f"max {difference.max():.2g}, mean {difference.mean():.2g}, spread {spread:.2g}"
    )


class ScriptedDecoder(Decoder):
    """Answers with these tokens one after the other, whatever is prefilled."""

    def __init__(self, n_vocabulary, tokens):
        self.n_vocabulary = n_vocabulary
        self.tokens = list(tokens)
        self.fed = []  # positions of each prefill

    def open_cache(self, capacity):
        return capacity

    def run(self, embeddings, cache, past):
        assert past + len(embeddings) <= cache
        self.fed.append(len(embeddings))
        logits = np.zeros(self.n_vocabulary, np.float32)
        n_steps = min(len(self.fed), len(self.tokens))  # the last token again and again
        logits[self.tokens[n_steps - 1]] = 9
        return Scores(logits)

    def rewind(self, cache, length):
        pass


@pytest.fixture
def scripted(assistant):
    """scripted(tokens) -> a language model that answers with them."""
    return lambda tokens: LanguageModel(
        assistant.bundle, ScriptedDecoder(assistant.llm.spec.vocabulary, tokens)
    )


# --- the cache ---


def test_prefill_token_by_token_equals_the_whole_prompt_at_every_length(llm, prompt):
    cache = Cache()
    for n in range(1, len(prompt) + 1):
        assert_close(llm.prefill(prompt[n - 1 : n], cache), llm.prefill(prompt[:n], Cache()))
    assert cache.length == len(prompt)


@pytest.mark.parametrize("cuts", [(1,), (5,), (3, 4), (1, 2, 7)])
def test_prefill_in_parts_equals_the_whole_prompt(llm, prompt, cuts):
    cache = Cache()
    for part in np.split(prompt, cuts):
        logits = llm.prefill(part, cache)
    assert_close(logits, llm.prefill(prompt, Cache()))


def test_prefill_of_a_full_context_in_parts_equals_the_whole(llm):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((llm.spec.max_context, llm.spec.hidden_size))
    context = (noise * llm.embed(range(100)).std()).astype(np.float32)
    cache = Cache()
    for part in np.split(context, [100, 101, 199]):
        logits = llm.prefill(part, cache)
    assert_close(logits, llm.prefill(context, Cache()))


def test_a_cache_doubles_when_it_is_full_and_answers_do_not_change(llm, prompt, monkeypatch):
    expected = list(llm.generate(prompt, Decoding(max_tokens=30)))
    monkeypatch.setattr(budget, "FIRST_POSITIONS", 4)
    cache = Cache()
    capacities = [cache.capacity]
    tokens = []
    for token in llm.generate(prompt, Decoding(max_tokens=30), cache):
        tokens.append(token)
        capacities.append(cache.capacity)
    assert tokens == expected
    assert capacities[0] == 0 and capacities[1] < cache.length  # it grew while decoding
    assert set(capacities[1:]) <= {4, 8, 16, 32, 64, 128, llm.capacity}
    assert cache.length <= cache.capacity < 2 * cache.length


def test_a_cache_is_no_larger_than_the_context():
    assert budget.cache_positions(1, 10_000) == budget.cache_positions(256, 10_000) == 256
    assert budget.cache_positions(257, 10_000) == 512
    assert budget.cache_positions(257, 300) == 300
    assert budget.cache_positions(0, 100) == 100


def test_another_past_changes_the_logits(llm, prompt):
    """The tolerance is far below what another past changes."""
    whole = llm.prefill(prompt, Cache()).logits
    part = llm.prefill(prompt[3:], Cache()).logits
    assert np.abs(whole - part).max() > 4 * TOLERANCE * whole.std()


# --- decoding ---


def test_greedy_decoding_takes_the_likeliest_token_of_an_uncached_prefill(llm, prompt):
    tokens = list(llm.generate(prompt, Decoding(max_tokens=6)))
    for n, token in enumerate(tokens):
        logits = llm.prefill(np.concatenate([prompt, llm.embed(tokens[:n])]), Cache()).logits
        assert logits[token] >= logits.max() - TOLERANCE * logits.std()


def test_greedy_decoding_is_always_the_same(llm, prompt):
    first = list(llm.generate(prompt, Decoding(max_tokens=16, seed=0)))
    other_seed = list(llm.generate(prompt, Decoding(max_tokens=16, seed=1)))
    one_of_one = list(llm.generate(prompt, Decoding(max_tokens=16, temperature=1.0, top_k=1)))
    assert first == other_seed == one_of_one


def test_sampling_repeats_with_its_seed_only(llm, prompt):
    draw = [list(llm.generate(prompt, dataclasses.replace(WARM, seed=seed))) for seed in (3, 3, 4)]
    assert draw[0] == draw[1] != draw[2]


def test_sampling_draws_from_the_top_k(llm, prompt):
    top_k = set(np.argsort(llm.prefill(prompt, Cache()).logits)[-5:])
    for seed in range(8):
        decoding = Decoding(max_tokens=1, temperature=8.0, top_k=5, seed=seed)
        assert set(llm.generate(prompt, decoding)) <= top_k


def test_fewer_tokens_are_the_beginning_of_more(llm, prompt):
    longest = list(llm.generate(prompt, Decoding(max_tokens=12)))
    assert len(longest) <= 12
    for n in (0, 1, 5):
        assert list(llm.generate(prompt, Decoding(max_tokens=n))) == longest[:n]


def test_an_answer_ends_at_max_tokens(scripted, prompt):
    assert list(scripted([7]).generate(prompt, Decoding(max_tokens=5))) == [7] * 5


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(scripted, llm, prompt):
    end = llm.spec.end_tokens[0]
    assert list(scripted([7, 8, end, 9]).generate(prompt, Decoding())) == [7, 8]
    assert list(scripted([end]).generate(prompt, Decoding())) == []


def test_the_prompt_is_prefilled_once_and_then_one_token_at_a_time(scripted, prompt):
    model = scripted([7])
    list(model.generate(prompt, Decoding(max_tokens=4)))
    assert model._decoder.fed[:4] == [len(prompt), 1, 1, 1]


def test_a_long_prompt_is_prefilled_in_chunks(scripted, monkeypatch):
    monkeypatch.setattr(llm_module, "CHUNK", 8)
    model = scripted([7])
    model.prefill(np.zeros((19, model.spec.hidden_size), np.float32), cache := Cache())
    assert model._decoder.fed == [8, 8, 3] and cache.length == 19


def test_prefill_in_chunks_equals_the_whole(llm, prompt, monkeypatch):
    whole = llm.prefill(prompt, Cache())
    monkeypatch.setattr(llm_module, "CHUNK", 4)
    assert_close(llm.prefill(prompt, Cache()), whole)


@pytest.mark.parametrize(("phrase", "longest"), [([7], 24), ([7, 8, 9], 24), ([7] * 7 + [8], 24)])
def test_an_answer_that_repeats_a_phrase_ends(scripted, prompt, phrase, longest):
    answer = scripted(phrase * 20).generate(prompt, Decoding(max_tokens=80))
    assert len(list(answer)) == longest
    unlimited = scripted(phrase * 20).generate(prompt, Decoding(max_tokens=80, loop_tokens=0))
    assert len(list(unlimited)) == 80


def test_a_phrase_that_is_repeated_a_few_times_is_no_loop():
    assert not loops([5, 5, 5, 5, 5, 5, 5, 5, 1, 2, 3, 4] * 2, 24)  # twice is not over and over
    assert not loops([7] * 23, 24) and not loops([], 24) and not loops([7] * 40, 0)
    assert loops([1, 2, 3, *[7, 8] * 12], 24)


def test_an_answer_ends_at_the_end_of_the_context(scripted, llm):
    almost = np.zeros((llm.spec.max_context - 3, llm.spec.hidden_size), np.float32)
    assert list(scripted([7]).generate(almost, Decoding(max_tokens=99))) == [7] * 4


def test_a_prompt_longer_than_the_context_is_refused(llm):
    n_max = llm.spec.max_context
    long = np.zeros((n_max + 1, llm.spec.hidden_size), np.float32)
    cache = Cache()
    message = rf"needs {n_max + 1} positions, the bundle's LLM has {n_max}: shorten"
    with pytest.raises(TinyAlignError, match=message):
        llm.prefill(long, cache)
    assert cache.length == 0 and cache.memory is None
    with pytest.raises(TinyAlignError, match="shorten the instruction or the recording"):
        next(llm.generate(long, Decoding()))


def test_a_cache_counts_towards_the_context(llm):
    half = np.zeros((llm.spec.max_context // 2 + 1, llm.spec.hidden_size), np.float32)
    cache = Cache()
    llm.prefill(half, cache)
    with pytest.raises(TinyAlignError, match=f"needs {2 * len(half)} positions"):
        llm.prefill(half, cache)
    assert cache.length == len(half)


# --- text ---


def test_pieces_join_to_the_decoded_text(llm):
    ids = np.repeat(llm.encode(f"{TEXT} and {TEXT}"), 2).tolist()
    stream = TextStream(llm.tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == llm.tokenizer.decode(ids) == stream.text
    assert len([p for p in pieces if p]) > len(ids) // 2  # streamed, not held back


def test_pieces_of_any_tokens_join(llm):
    ids = np.random.default_rng(0).integers(0, llm.spec.vocabulary, 200).tolist()
    stream = TextStream(llm.tokenizer)
    assert "".join(map(stream.push, ids)) == llm.tokenizer.decode(ids)


def test_a_character_of_several_tokens_is_held_back_until_it_is_complete():
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    stream = TextStream(tokenizer)
    text = "né 日 😀!"
    pieces = [stream.push(i) for i in tokenizer.encode(text).ids]
    assert len(pieces) == len(text.encode()) and [p for p in pieces if p] == list(text)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_no_words_are_refused(llm, text):
    with pytest.raises(DataError, match="the transcript is empty: expected a sentence"):
        llm.encode_words(text, "the transcript")


@pytest.mark.parametrize("strange", ["ж", "日", "€"])
def test_characters_outside_the_tokenizer_are_named(llm, strange):
    with pytest.raises(
        DataError,
        match=rf"the text holds characters outside the LLM's tokenizer: '{strange}'\. Write",
    ):
        llm.encode_words(f"what is {strange}")


def test_a_special_token_without_an_embedding_is_refused_in_an_instruction(scripted, llm):
    model = scripted([1])
    model.tokenizer.add_special_tokens(["<image>"])
    with pytest.raises(
        DataError,
        match="holds <image>, for which the LLM has no embedding: write the instruction in",
    ):
        model.assemble(llm.embed([1, 2]), "Describe <image> to me.")


def test_words_are_encoded_as_in_the_middle_of_a_prompt(llm):
    pieces = llm.prompt
    around = pieces.before + pieces.instruction + pieces.between
    assert llm.encode(around) + llm.encode_words(TEXT) + llm.encode(pieces.after) == llm.encode(
        around + TEXT + pieces.after
    )


@pytest.mark.parametrize("instruction", [None, "Repeat what the user says."])
def test_the_prompt_is_the_chat_template(llm, instruction):
    """The pieces in the manifest give what the tokenizer's own template renders, token by token."""
    transformers = pytest.importorskip("transformers")
    from tiny_align.reference.llm import CHAT_TEMPLATE

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=llm.tokenizer, chat_template=CHAT_TEMPLATE
    )
    system = instruction or llm.prompt.instruction
    messages = [{"role": "system", "content": system}, {"role": "user", "content": TEXT}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ids = rendered["input_ids"]
    assembled = llm.assemble(llm.embed(llm.encode_words(TEXT)), instruction)
    np.testing.assert_array_equal(assembled, llm.embed(ids))
    pieces = llm.prompt
    assert llm.encode(pieces.before + system + pieces.between + TEXT + pieces.after) == ids


def test_embeddings_are_rows_of_the_table(llm, bundle_path):
    table = np.load(bundle_path / "token_embeddings.npy")
    assert table.shape == (llm.spec.vocabulary, llm.spec.hidden_size)
    np.testing.assert_array_equal(
        llm.embed([5, 0, 5]), table[[5, 0, 5]].astype(np.float32) * llm.spec.embedding_scale
    )
    assert llm.embed([]).shape == (0, llm.spec.hidden_size)
