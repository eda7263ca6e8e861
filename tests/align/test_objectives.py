"""The objectives against cases with a known answer, alignments against all alignments."""

import itertools

import numpy as np
import pytest
import torch

from tiny_align.align.data.examples import Example
from tiny_align.align.model import objectives
from tiny_align.align.model.objectives.aligned import aligned_places, pair_costs
from tiny_align.align.model.objectives.base import HasTokenErrorRate
from tiny_align.align.model.objectives.ctc import EXACT, Ctc, log_normaliser, sampled_log_normaliser
from tiny_align.align.model.objectives.end_to_end import EndToEnd, FrozenLlm
from tiny_align.align.model.objectives.paper import Paper, cast_places, embedlink_loss
from tiny_align.align.training.trainer import TrainOptions
from tiny_align.runtime.errors import TinyAlignError

T = 24


def lengths(seed):
    """Letters of the 1 to 12 tokens of a sentence; some have none."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, size=rng.integers(1, 13)).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_cast_places_are_tokens_in_order(seed):
    places = cast_places(lengths(seed), T)
    assert places.shape == (T,) and (np.diff(places) >= 0).all()
    assert places.min() >= 0 and places.max() < len(lengths(seed))


@pytest.mark.parametrize("seed", range(8))
def test_every_token_has_a_place_where_there_is_one_per_letter(seed):
    token_lengths = lengths(seed)
    n_letters = sum(max(1, n) for n in token_lengths)
    for soft_tokens in (n_letters, n_letters + 1, 3 * n_letters):
        places = cast_places(token_lengths, soft_tokens)
        assert set(places) == set(range(len(token_lengths)))


@pytest.mark.parametrize("seed", range(8))
def test_cast_shares_are_in_proportion_to_letters(seed):
    letters = np.maximum(1, lengths(seed))
    counts = np.bincount(cast_places(lengths(seed), T), minlength=len(letters))
    assert np.abs(counts - T * letters / letters.sum()).max() <= 1


def test_cast_places_of_a_sentence_with_whole_shares():
    assert cast_places([1, 2, 1], 8).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert cast_places([0, 0], 4).tolist() == [0, 0, 1, 1]  # no letters count as one


def test_more_tokens_than_places_are_thinned_evenly():
    assert cast_places([1] * 8, 4).tolist() == [1, 3, 5, 7]


def every_assignment(n_places, n_tokens):
    """All ways to give n_tokens in order to n_places, every token one place or more."""
    for starts in itertools.combinations(range(1, n_places), n_tokens - 1):
        yield np.searchsorted(starts, np.arange(n_places), side="right")


@pytest.mark.parametrize(("n_places", "n_tokens"), [(1, 1), (6, 1), (6, 2), (7, 3), (6, 5), (6, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_aligned_places_are_the_cheapest_of_all(n_places, n_tokens, seed):
    costs = np.random.default_rng(seed).random((n_places, n_tokens)).astype(np.float32)
    places = aligned_places(costs)
    rows = np.arange(n_places)
    totals = [costs[rows, every].sum() for every in every_assignment(n_places, n_tokens)]
    assert costs[rows, places].sum() == pytest.approx(min(totals), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_aligned_places_take_every_token_in_order(seed):
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(1, T + 1)
    places = aligned_places(rng.normal(size=(T, n_tokens)))
    assert places[0] == 0 and places[-1] == n_tokens - 1 and set(np.diff(places)) <= {0, 1}


def test_aligned_places_recover_known_places():
    tokens = torch.randn(4, 8)
    places = [0, 0, 0, 1, 2, 2, 3, 3]
    costs = pair_costs(tokens[places] + 0.05 * torch.randn(8, 8), tokens, variance=1.0)
    assert aligned_places(costs.numpy()).tolist() == places


def test_pair_costs_are_the_loss_of_every_pair():
    soft_tokens = torch.randn(3, 8)
    tokens = torch.randn(2, 8)
    costs = pair_costs(soft_tokens, tokens, variance=0.7)
    assert costs.shape == (3, 2)
    for t, token in itertools.product(range(3), range(2)):
        soft_token, target = soft_tokens[None, t : t + 1], tokens[None, token : token + 1]
        one = embedlink_loss(soft_token, target, variance=0.7)
        assert costs[t, token].item() == pytest.approx(one.item(), rel=1e-5)


def test_the_loss_of_equal_input_is_zero():
    targets = torch.randn(2, T, 8)
    assert embedlink_loss(targets, targets, variance=1.0).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_mse_in_units_of_the_variance_plus_cosine_distance():
    targets = torch.randn(2, T, 8)
    mse = 4 * targets.square().mean().item()
    loss = embedlink_loss(-targets, targets, variance=0.5).item()
    assert loss == pytest.approx(mse / 0.5 + 2, rel=1e-5)


def test_the_loss_does_not_depend_on_the_scale_of_the_table():
    soft_tokens = torch.randn(2, T, 8)
    targets = torch.randn(2, T, 8)
    small = embedlink_loss(soft_tokens, targets, 1.0)
    large = embedlink_loss(50 * soft_tokens, 50 * targets, 50.0**2)
    assert large.item() == pytest.approx(small.item(), rel=1e-4)


def test_the_gradient_reaches_every_place_and_training_reduces_the_loss():
    torch.manual_seed(0)
    targets = torch.randn(2, T, 8)
    soft_tokens = torch.randn(2, T, 8, requires_grad=True)
    optimiser = torch.optim.Adam([soft_tokens], 0.05)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = embedlink_loss(soft_tokens, targets, variance=1.0)
        loss.backward()
        assert (soft_tokens.grad.abs().sum(-1) > 0).all()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(b < a for a, b in zip(losses[:40], losses[1:]))


# --- the paper's two variants ---


def utterance(tokens, lengths=None, answers=()):
    return Example(
        np.zeros((1, 1), np.float32), tokens, lengths or [1] * len(tokens), answers=answers
    )


def test_padded_targets_stand_one_token_per_place():
    table = torch.randn(5, 3)
    padded = Paper(table, padded=True)
    expected = torch.stack([table[4], table[2], 0 * table[0]])
    assert torch.equal(padded.targets(utterance([4, 2]), 3), expected)
    assert torch.equal(padded.targets(utterance([4, 2, 1, 0]), 3), table[[4, 2, 1]])


def test_stretched_targets_share_the_places_by_letters():
    table = torch.randn(5, 3)
    assert torch.equal(Paper(table).targets(utterance([4, 2], [1, 3]), 4), table[[4, 2, 2, 2]])


def test_the_loss_is_zero_on_the_paper_s_targets():
    paper = Paper(torch.randn(9, 6))
    example = utterance([3, 1, 1, 8])
    soft_tokens = paper.targets(example, 8)[None].requires_grad_()
    loss = paper(soft_tokens, torch.tensor([8]), [example], 0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert soft_tokens.grad.abs().max() < 1e-6


# --- CTC over the embedding table ---


def collapsed(path):
    """The tokens of a path of tokens and blanks (None)."""
    return [token for token, _ in itertools.groupby(path) if token is not None]


def every_path_loss(frames, table, scale, tokens):
    """Minus the log of the summed probabilities of all paths of `tokens`: CTC by definition."""
    logits = torch.cat([frames[:, :-1] @ table.T * scale, frames[:, -1:]], dim=1)  # blank last
    probs = logits.softmax(dim=-1)
    symbols = [*range(len(table)), None]
    total = torch.zeros(())
    for path in itertools.product(range(len(symbols)), repeat=len(frames)):
        if collapsed([symbols[s] for s in path]) == tokens:
            total = total + probs[torch.arange(len(frames)), torch.tensor(path)].prod()
    return -total.log()


@pytest.mark.parametrize("tokens", [[], [1], [0, 2], [1, 1], [2, 0, 1]])
def test_ctc_is_the_sum_over_all_paths_and_so_is_its_gradient(tokens):
    table, scale = torch.randn(3, 4, dtype=torch.float64), 0.7
    frames = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    want = every_path_loss(frames, table, scale, tokens)
    (gradient,) = torch.autograd.grad(want, frames)
    per_token = Ctc(table, scale)(frames[None], torch.tensor([4]), [utterance(tokens)], 0)
    got = per_token * max(1, len(tokens))
    (ours,) = torch.autograd.grad(got, frames)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert torch.allclose(ours, gradient, atol=1e-9)


def test_a_batch_is_the_mean_per_token_of_its_utterances():
    ctc = Ctc(torch.randn(9, 4), 1.0)
    frames = torch.randn(2, 7, 5)
    lengths = torch.tensor([7, 4])
    examples = [utterance([1, 2, 3]), utterance([8])]
    total = 0.0
    for row, n, example in zip(frames, lengths, examples):
        one = ctc(row[None, :n], n[None], [example], 0).item()
        total += one * len(example.tokens)
    assert ctc(frames, lengths, examples, 0).item() == pytest.approx(total / 4, rel=1e-5)


def test_a_flat_start_is_the_cross_entropy_with_the_cast_tokens():
    table = torch.randn(9, 4)
    frames = torch.randn(2, 6, 5, requires_grad=True)
    examples = [utterance([3, 7]), utterance([])]  # six frames, and four without a word
    loss = Ctc(table, 0.5, flat_start=2)(frames, torch.tensor([6, 4]), examples, 1)
    logits = torch.cat([frames[..., :-1] @ table.T * 0.5, frames[..., -1:]], dim=-1)
    wanted = torch.tensor([3, 3, 3, 7, 7, 7, 9, 9, 9, 9])  # 9: the blank
    expected = torch.nn.functional.cross_entropy(torch.cat([logits[0], logits[1, :4]]), wanted)
    torch.testing.assert_close(loss, expected)
    assert (torch.autograd.grad(loss, frames)[0][1, 4:] == 0).all()


def test_after_a_flat_start_the_loss_is_ctc():
    table = torch.randn(9, 4)
    frames = torch.randn(1, 6, 5)
    losses = []
    for flat_start in (0, 2):
        ctc = Ctc(table, 1.0, flat_start)
        losses.append(ctc(frames, torch.tensor([6]), [utterance([3, 7])], 2))
    torch.testing.assert_close(*losses)


def test_more_tokens_than_frames_give_no_loss_and_no_gradient():
    frames = torch.randn(1, 2, 5, requires_grad=True)
    loss = Ctc(torch.randn(9, 4), 1.0)(frames, torch.tensor([2]), [utterance([1, 2, 3])], 0)
    loss.backward()
    assert loss.item() == 0 and not frames.grad.any()


def frames_of(path, table):
    """(1, N', D + 1) frames whose likeliest symbols are `path`; None is the blank."""
    rows = []
    for token in path:
        blank = torch.tensor([1e3 if token is None else 0.0])
        rows.append(torch.cat([torch.zeros(4) if token is None else 1e3 * table[token], blank]))
    return torch.stack(rows)[None]


@pytest.mark.parametrize(
    ("path", "rate"),
    [
        ([1, 1, None, 2, 3], 0),
        ([1, None, 1, 2, 3], 1 / 3),  # one extra
        ([1, None, None, None, 3], 1 / 3),  # one missing
        ([0, 2, 2, 2, 3], 1 / 3),  # one wrong
        ([None] * 5, 1),
    ],
)
def test_token_error_rate_counts_wrong_missing_and_extra_tokens(path, rate):
    table = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.manual_seed(0)), dim=1)
    ctc = Ctc(table, 1.0)
    frames = frames_of(path, table)
    assert isinstance(ctc, HasTokenErrorRate)
    assert ctc.token_error_rate(frames, torch.tensor([5]), [utterance([1, 2, 3])], 0) == rate


def test_the_normaliser_of_a_large_vocabulary_is_estimated_from_a_sample():
    """Nearly without bias; the batch's own tokens, here by far the likeliest, count exactly."""
    table = 0.3 * torch.randn(3 * EXACT, 8)
    own = torch.tensor([5, 77])
    frames = torch.cat([3 * table[own], torch.zeros(2, 1)], dim=-1)[None]
    want = log_normaliser(frames, table, 1.0)
    got = torch.stack([sampled_log_normaliser(frames, table, 1.0, own, seed) for seed in range(50)])
    assert (got.mean(dim=0) - want).abs().max() < 0.02 and got.std(dim=0).max() < 0.15


def test_a_large_vocabulary_is_sampled_and_a_small_one_is_not():
    frames = torch.randn(1, 5, 5, requires_grad=True)

    def loss(n_tokens, step):
        table = torch.randn(n_tokens, 4, generator=torch.Generator().manual_seed(0))
        return Ctc(table, 1.0)(frames, torch.tensor([5]), [utterance([1, 2])], step).item()

    assert loss(EXACT, step=0) == loss(EXACT, step=1)
    assert loss(EXACT + 1, step=0) == loss(EXACT + 1, step=0)
    assert loss(EXACT + 1, step=0) != loss(EXACT + 1, step=1)
    assert loss(EXACT + 1, step=0) == pytest.approx(loss(EXACT + 1, step=1), rel=0.1)


# --- end to end ---


@pytest.fixture(scope="module")
def small_llm():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes)).eval()
    return FrozenLlm(model, [torch.randn(3, 16), torch.randn(4, 16)], after=torch.randn(2, 16))


def test_end_to_end_is_the_cross_entropy_of_the_answer(small_llm):
    soft_tokens = torch.randn(2, 4, 16, requires_grad=True)
    examples = [
        utterance([1], answers=((5, 6, 7), (3,))),
        utterance([1], answers=((2,), (8, 9))),
    ]
    loss = EndToEnd(small_llm)(soft_tokens, torch.tensor([4, 4]), examples, 0)
    costs = []
    for i, example in enumerate(examples):  # the prompts take turns
        answer = torch.tensor(example.answers[i])
        embedded = small_llm.model.get_input_embeddings()(answer)
        row = torch.cat([small_llm.prompts[i], soft_tokens[i], small_llm.after, embedded])
        log_probs = small_llm.model(inputs_embeds=row[None]).logits[0].log_softmax(-1)
        first = len(row) - len(answer) - 1
        for k, token in enumerate(answer):
            costs.append(-log_probs[first + k, token])
    assert loss.item() == pytest.approx(torch.stack(costs).mean().item(), rel=1e-5)
    loss.backward()
    assert soft_tokens.grad.abs().sum(-1).min() > 0
    assert all(p.grad is None for p in small_llm.model.parameters())


# --- choosing an objective ---


def test_a_projector_has_objectives_of_its_form():
    assert objectives.default_for(None) == "ctc" and objectives.default_for(32) == "paper"
    objectives.check("ctc", None)
    objectives.check("paper", 32)
    with pytest.raises(TinyAlignError, match="choose ctc, or export the bundle with --soft-tokens"):
        objectives.check("paper", None)
    with pytest.raises(TinyAlignError, match="pools to 32 soft tokens"):
        objectives.check("ctc", 32)


def test_the_message_offers_only_objectives_that_a_command_takes():
    with pytest.raises(TinyAlignError, match="choose paper or aligned or paper-padded, or export"):
        objectives.check("ctc", 32)


@pytest.mark.parametrize("name", objectives.LLM_FREE)
def test_every_objective_is_made_by_its_name(name):
    made = objectives.make(TrainOptions(name), torch.randn(5, 3), scale=1.0)
    assert made.table.shape == (5, 3)


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("ctc", None, "give `table`"),
        ("ctc", torch.zeros(5, 3), "give `scale`"),
        ("end-to-end", None, "give `llm`"),
        ("papers", torch.zeros(5, 3), "unknown objective 'papers': expected one of ctc, paper"),
    ],
)
def test_make_names_what_is_missing(name, table, message):
    with pytest.raises(ValueError, match=message):
        objectives.make(TrainOptions(name), table)
