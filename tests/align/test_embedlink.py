"""EmbedLink: which token stands at which place, guessed and aligned, and the loss against the table's rows."""

import itertools

import numpy as np
import pytest
import torch

from tiny_align.align.embedlink import aligned_places, cast_places, embedlink_loss, pair_costs

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
        one = embedlink_loss(soft_tokens[None, t : t + 1], tokens[None, token : token + 1], variance=0.7)
        assert costs[t, token].item() == pytest.approx(one.item(), rel=1e-5)


def test_the_loss_of_equal_input_is_zero():
    targets = torch.randn(2, T, 8)
    assert embedlink_loss(targets, targets, variance=1.0).item() == pytest.approx(0, abs=1e-6)


def test_the_loss_is_mse_in_units_of_the_variance_plus_cosine_distance():
    targets = torch.randn(2, T, 8)
    mse = 4 * targets.square().mean().item()
    assert embedlink_loss(-targets, targets, variance=0.5).item() == pytest.approx(mse / 0.5 + 2, rel=1e-5)


def test_the_scale_of_the_table_drops_out():
    made, targets = torch.randn(2, T, 8), torch.randn(2, T, 8)
    small, large = embedlink_loss(made, targets, 1.0), embedlink_loss(50 * made, 50 * targets, 50.0**2)
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
