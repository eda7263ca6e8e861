"""The objectives: each against a case with a known answer, alignments against every alignment there is."""

import itertools

import numpy as np
import pytest
import torch

from tiny_align.align.data.examples import Example
from tiny_align.align.model import objectives
from tiny_align.align.model.objectives.aligned import aligned_places, pair_costs
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
def test_places_are_tokens_in_the_order_they_are_said(seed):
    places = cast_places(lengths(seed), T)
    assert places.shape == (T,) and (np.diff(places) >= 0).all()
    assert places.min() >= 0 and places.max() < len(lengths(seed))


@pytest.mark.parametrize("seed", range(8))
def test_every_token_has_a_place_where_there_is_one_per_letter(seed):
    said = lengths(seed)
    letters = sum(max(1, n) for n in said)
    for soft_tokens in (letters, letters + 1, 3 * letters):
        assert set(cast_places(said, soft_tokens)) == set(range(len(said)))


@pytest.mark.parametrize("seed", range(8))
def test_shares_are_in_proportion_to_letters(seed):
    letters = np.maximum(1, lengths(seed))
    counts = np.bincount(cast_places(lengths(seed), T), minlength=len(letters))
    assert np.abs(counts - T * letters / letters.sum()).max() <= 1


def test_places_of_a_sentence_with_whole_shares():
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
    ways = [costs[np.arange(n_places), way].sum() for way in every_assignment(n_places, n_tokens)]
    assert costs[np.arange(n_places), places].sum() == pytest.approx(min(ways), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_aligned_places_take_every_token_in_order(seed):
    rng = np.random.default_rng(seed)
    n_tokens = rng.integers(1, T + 1)
    places = aligned_places(rng.normal(size=(T, n_tokens)))
    assert places[0] == 0 and places[-1] == n_tokens - 1 and set(np.diff(places)) <= {0, 1}


def test_tokens_are_found_where_they_are():
    said = torch.randn(4, 8)
    places = [0, 0, 0, 1, 2, 2, 3, 3]
    costs = pair_costs(said[places] + 0.05 * torch.randn(8, 8), said, variance=1.0)
    assert aligned_places(costs.numpy()).tolist() == places


def test_pair_costs_are_the_loss_of_every_pair():
    soft_tokens, tokens = torch.randn(3, 8), torch.randn(2, 8)
    costs = pair_costs(soft_tokens, tokens, variance=0.7)
    assert costs.shape == (3, 2)
    for t, token in itertools.product(range(3), range(2)):
        one = embedlink_loss(
            soft_tokens[None, t : t + 1], tokens[None, token : token + 1], variance=0.7
        )
        assert costs[t, token].item() == pytest.approx(one.item(), rel=1e-5)


def test_the_loss_of_equal_input_is_zero():
    targets = torch.randn(2, T, 8)
    assert embedlink_loss(targets, targets, variance=1.0).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_mse_in_units_of_the_variance_plus_cosine_distance():
    targets = torch.randn(2, T, 8)
    mse = 4 * targets.square().mean().item()
    assert embedlink_loss(-targets, targets, variance=0.5).item() == pytest.approx(
        mse / 0.5 + 2, rel=1e-5
    )


def test_the_scale_of_the_table_drops_out():
    made, targets = torch.randn(2, T, 8), torch.randn(2, T, 8)
    small, large = (
        embedlink_loss(made, targets, 1.0),
        embedlink_loss(50 * made, 50 * targets, 50.0**2),
    )
    assert large.item() == pytest.approx(small.item(), rel=1e-4)


def test_the_gradient_reaches_every_place_and_training_reduces_the_loss():
    torch.manual_seed(0)
    targets, soft_tokens = torch.randn(2, T, 8), torch.randn(2, T, 8, requires_grad=True)
    optimiser, losses = torch.optim.Adam([soft_tokens], 0.05), []
    for _ in range(60):
        optimiser.zero_grad()
        loss = embedlink_loss(soft_tokens, targets, variance=1.0)
        loss.backward()
        assert (soft_tokens.grad.abs().sum(-1) > 0).all()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(b < a for a, b in zip(losses[:40], losses[1:]))


# --- the paper's two readings ---


def utterance(tokens, lengths=None, answers=()):
    return Example(
        np.zeros((1, 1), np.float32), tokens, lengths or [1] * len(tokens), answers=answers
    )


def test_padded_targets_stand_one_token_per_place():
    table = torch.randn(5, 3)
    padded = Paper(table, padded=True)
    assert torch.equal(
        padded.targets(utterance([4, 2]), 3), torch.stack([table[4], table[2], 0 * table[0]])
    )
    assert torch.equal(padded.targets(utterance([4, 2, 1, 0]), 3), table[[4, 2, 1]])


def test_stretched_targets_share_the_places_by_letters():
    table = torch.randn(5, 3)
    assert torch.equal(Paper(table).targets(utterance([4, 2], [1, 3]), 4), table[[4, 2, 2, 2]])


def test_the_paper_s_loss_is_nothing_on_its_targets():
    table, said = torch.randn(9, 6), utterance([3, 1, 1, 8])
    paper = Paper(table)
    there = paper.targets(said, 8)[None].requires_grad_()
    loss = paper(there, torch.tensor([8]), [said], 0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and there.grad.abs().max() < 1e-6


# --- CTC over the embedding table ---


def collapsed(path):
    """What a path of tokens and blanks (None) says."""
    return [token for token, _ in itertools.groupby(path) if token is not None]


def every_path_loss(frames, table, scale, tokens):
    """Minus the log of the summed probabilities of all paths that say `tokens`: the definition of CTC."""
    logits = torch.cat([frames[:, :-1] @ table.T * scale, frames[:, -1:]], dim=1)  # blank last
    probs = logits.softmax(dim=-1)
    symbols = [*range(len(table)), None]
    total = torch.zeros(())
    for path in itertools.product(range(len(symbols)), repeat=len(frames)):
        if collapsed([symbols[s] for s in path]) == tokens:
            total = total + torch.stack([probs[i, s] for i, s in enumerate(path)]).prod()
    return -total.log()


@pytest.mark.parametrize("tokens", [[], [1], [0, 2], [1, 1], [2, 0, 1]])
def test_ctc_is_the_sum_over_all_paths_and_so_is_its_gradient(tokens):
    table, scale = torch.randn(3, 4, dtype=torch.float64), 0.7
    frames = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    want = every_path_loss(frames, table, scale, tokens)
    (gradient,) = torch.autograd.grad(want, frames)
    got = Ctc(table, scale)(frames[None], torch.tensor([4]), [utterance(tokens)], 0) * max(
        1, len(tokens)
    )
    (ours,) = torch.autograd.grad(got, frames)
    assert got.item() == pytest.approx(want.item(), rel=1e-9) and torch.allclose(
        ours, gradient, atol=1e-9
    )


def test_a_batch_is_the_mean_per_token_of_its_utterances():
    table, frames = torch.randn(9, 4), torch.randn(2, 7, 5)
    ctc, said = Ctc(table, 1.0), [utterance([1, 2, 3]), utterance([8])]
    alone = [
        ctc(f[None, :n], torch.tensor([n]), [u], 0) * len(u.tokens)
        for f, n, u in zip(frames, (7, 4), said)
    ]
    assert ctc(frames, torch.tensor([7, 4]), said, 0).item() == pytest.approx(
        sum(alone).item() / 4, rel=1e-5
    )


def test_a_flat_start_is_the_cross_entropy_with_the_cast_tokens():
    table, frames = torch.randn(9, 4), torch.randn(2, 6, 5, requires_grad=True)
    said = [utterance([3, 7]), utterance([])]  # six frames, and four of nothing
    loss = Ctc(table, 0.5, flat_start=2)(frames, torch.tensor([6, 4]), said, 1)
    logits = torch.cat([frames[..., :-1] @ table.T * 0.5, frames[..., -1:]], dim=-1)
    wanted = torch.tensor([3, 3, 3, 7, 7, 7, 9, 9, 9, 9])  # 9: the blank
    expected = torch.nn.functional.cross_entropy(torch.cat([logits[0], logits[1, :4]]), wanted)
    torch.testing.assert_close(loss, expected)
    assert (torch.autograd.grad(loss, frames)[0][1, 4:] == 0).all()


def test_after_a_flat_start_the_loss_is_ctc():
    table, frames, said = torch.randn(9, 4), torch.randn(1, 6, 5), [utterance([3, 7])]
    losses = [Ctc(table, 1.0, flat)(frames, torch.tensor([6]), said, 2) for flat in (0, 2)]
    torch.testing.assert_close(*losses)


def test_more_tokens_than_frames_teach_nothing():
    frames = torch.randn(1, 2, 5, requires_grad=True)
    loss = Ctc(torch.randn(9, 4), 1.0)(frames, torch.tensor([2]), [utterance([1, 2, 3])], 0)
    loss.backward()
    assert loss.item() == 0 and not frames.grad.any()


def test_the_normaliser_of_a_large_vocabulary_is_estimated_from_a_sample():
    """Without bias to speak of; the batch's own tokens, here by far the likeliest, count exactly."""
    table, own = 0.3 * torch.randn(3 * EXACT, 8), torch.tensor([5, 77])
    frames = torch.cat([3 * table[own], torch.zeros(2, 1)], dim=-1)[None]
    want = log_normaliser(frames, table, 1.0)
    got = torch.stack([sampled_log_normaliser(frames, table, 1.0, own, seed) for seed in range(50)])
    assert (got.mean(dim=0) - want).abs().max() < 0.02 and got.std(dim=0).max() < 0.15


def test_a_large_vocabulary_is_sampled_and_a_small_one_is_not():
    frames, said, n = (
        torch.randn(1, 5, 5, requires_grad=True),
        [utterance([1, 2])],
        torch.tensor([5]),
    )
    small, large = (
        Ctc(torch.randn(size, 4, generator=torch.Generator().manual_seed(0)), 1.0)
        for size in (EXACT, EXACT + 1)
    )
    assert small(frames, n, said, 0).item() == small(frames, n, said, 1).item()
    one, again, other = (large(frames, n, said, step).item() for step in (0, 0, 1))
    assert one == again != other and one == pytest.approx(other, rel=0.1)


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
    said = [utterance([1], answers=((5, 6, 7), (3,))), utterance([1], answers=((2,), (8, 9)))]
    loss = EndToEnd(small_llm)(soft_tokens, torch.tensor([4, 4]), said, 0)
    costs = []
    for turn, (soft, u) in enumerate(zip(soft_tokens, said)):  # the prompts take turns
        answer = torch.tensor(u.answers[turn])
        embedded = small_llm.model.get_input_embeddings()(answer)
        row = torch.cat([small_llm.prompts[turn], soft, small_llm.after, embedded])
        log_probs = small_llm.model(inputs_embeds=row[None]).logits[0].log_softmax(-1)
        costs += [
            -log_probs[len(row) - len(answer) - 1 + i, token] for i, token in enumerate(answer)
        ]
    assert loss.item() == pytest.approx(torch.stack(costs).mean().item(), rel=1e-5)
    loss.backward()
    assert soft_tokens.grad.abs().sum(-1).min() > 0
    assert all(p.grad is None for p in small_llm.model.parameters())


# --- which for which projector ---


def test_a_projector_has_objectives_of_its_form():
    assert objectives.default_for(None) == "ctc" and objectives.default_for(32) == "paper"
    objectives.check("ctc", None)
    objectives.check("paper", 32)
    with pytest.raises(TinyAlignError, match="choose ctc, or export the bundle with --soft-tokens"):
        objectives.check("paper", None)
    with pytest.raises(TinyAlignError, match="pools to 32 soft tokens"):
        objectives.check("ctc", 32)


@pytest.mark.parametrize("name", objectives.LLM_FREE)
def test_every_objective_is_made_by_its_name(name):
    made = objectives.make(TrainOptions(name), torch.randn(5, 3), scale=1.0)
    assert made.table.shape == (5, 3)
