"""The trainer on synthetic speech: every token sounds like four noisy frames of its own pattern."""

import copy
import itertools
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiny_align.align.data.examples import Example
from tiny_align.align.model.objectives import make
from tiny_align.align.model.objectives.paper import cast_places
from tiny_align.align.model.projector import BridgeFormer, ProjectorConfig
from tiny_align.align.training import trainer as trainer_module
from tiny_align.align.training.trainer import LAST_RATE, Trainer, TrainOptions, held_out
from tiny_align.runtime.readout import collapse, ctc_scale

CONFIG = ProjectorConfig(
    feature_size=12,
    embedding_size=16,
    soft_tokens=8,
    hidden_size=32,
    n_layers=1,
    n_heads=2,
    shortcut_size=12,
)
VOCABULARY, FRAMES_PER_TOKEN, LETTERS = 20, 4, 3
OPTIONS = TrainOptions(
    "paper",
    trainable=(),
    steps=60,
    batch=8,
    rate=2e-3,
    warmup=5,
    weight_decay=0.0,
    check_every=15,
    max_seconds=600,
)
OBJECTIVES = {  # as keywords of TrainOptions
    "ctc": {"objective": "ctc"},
    "ctc after a flat start": {"objective": "ctc", "flat_start": 20},
    "paper": {"objective": "paper"},
    "paper padded": {"objective": "paper-padded"},
    "aligned": {"objective": "aligned", "flat_start": 0},
    "aligned after a flat start": {"objective": "aligned", "flat_start": 35},
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
RNG = np.random.default_rng(0)
PATTERNS = RNG.normal(size=(VOCABULARY, CONFIG.feature_size)).astype(np.float32)
TABLE = torch.from_numpy(RNG.normal(size=(VOCABULARY, CONFIG.embedding_size)).astype(np.float32))
SCALE = ctc_scale(TABLE.numpy())


def say(tokens, rng):
    frames = PATTERNS[tokens].repeat(FRAMES_PER_TOKEN, axis=0)  # (N, Da)
    noise = 0.3 * rng.normal(size=frames.shape)
    return Example((frames + noise).astype(np.float32), list(tokens), [LETTERS] * len(tokens))


def sentences(n, seed=1):
    rng = np.random.default_rng(seed)
    return [say(rng.integers(VOCABULARY, size=rng.integers(2, 7)).tolist(), rng) for _ in range(n)]


def new_projector(objective="paper"):
    torch.manual_seed(0)
    return BridgeFormer(replace(CONFIG, soft_tokens=None) if objective == "ctc" else CONFIG)


def trainer(options=OPTIONS, work=None, examples=None, table=TABLE, kind=Trainer):
    examples = sentences(40) if examples is None else examples
    return kind(
        new_projector(options.objective), examples, make(options, table, SCALE), options, work
    )


class Stopped(Trainer):
    """Interrupted in its 41st step, as by Ctrl-C or the battery: the last check was after the 30th."""

    def _train_step(self):
        if self.step == 40:
            raise KeyboardInterrupt
        return super()._train_step()


class Counted(Trainer):
    """Counts the steps it takes itself."""

    taken = 0

    def _train_step(self):
        self.taken += 1
        return super()._train_step()


def interrupt(work, options=OPTIONS):
    with pytest.raises(KeyboardInterrupt):
        trainer(options, work, kind=Stopped).run(quiet=True)


@pytest.fixture
def interrupted(tmp_path):
    """The work folder of a training that was stopped."""
    interrupt(tmp_path)
    return tmp_path


@pytest.fixture
def seconds(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(
        trainer_module, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    )


def steps_taken(**changes):
    run = trainer(kind=Counted, **changes)
    run.run(quiet=True)
    return run.taken


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(curve):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in curve]


def wanted(objective, example):
    """The tokens that belong at the soft tokens, as the objective places them."""
    if objective == "ctc":
        return example.tokens
    return np.array(example.tokens)[cast_places(example.token_lengths, CONFIG.soft_tokens)].tolist()


def nearest_token_accuracy(projector, examples, objective):
    """Share of places whose soft token lies nearest to the embedding of the token that belongs there."""
    hits, table = [], TABLE.numpy()
    for example in examples:
        out = projector(torch.from_numpy(example.features)[None])[0].detach().numpy()
        soft_tokens = collapse(out, table, SCALE) if objective == "ctc" else out  # (T, D)
        nearest = ((soft_tokens[:, None] - table) ** 2).sum(-1).argmin(-1)  # (T,)
        hits.extend(a == b for a, b in itertools.zip_longest(nearest, wanted(objective, example)))
    return np.mean(hits)


# --- learning ---


@pytest.mark.parametrize("objective", [o for n, o in OBJECTIVES.items() if n != "paper padded"])
def test_training_learns_which_token_was_said(objective):
    """All but the padded targets, of which most are nothing: pooled places do not know their number."""
    options = replace(OPTIONS, steps=200, check_every=50, **objective)
    projector, unseen = new_projector(options.objective), sentences(40, seed=2)
    before = nearest_token_accuracy(projector, unseen, options.objective)
    trained = Trainer(projector, sentences(200), make(options, TABLE, SCALE), options, None).run(
        quiet=True
    )
    projector.load_state_dict(trained.weights)
    losses = [entry["held_out"] for entry in trained.record["curve"]]
    assert trained.record["improved"] and losses[-1] < 0.6 * losses[0]
    assert before < 0.2 < 0.5 < nearest_token_accuracy(projector.eval(), unseen, options.objective)


@pytest.mark.parametrize(("n", "steps"), [(2, 50), (25, 62), (60, 150), (100, 250), (5000, 250)])
def test_few_recordings_are_not_gone_through_for_ever(n, steps):
    assert trainer_module.steps_for(n, batch=16) == steps


def test_training_never_sees_what_is_held_out():
    examples, silence = sentences(400), [replace(sentences(1)[0], tokens=[])]
    run = Trainer(new_projector(), examples, make(OPTIONS, TABLE), OPTIONS, None, silence)
    held = {id(e) for e in run.held}
    assert 0.5 < len(held) / (400 * OPTIONS.held_out) < 1.5 and held.isdisjoint(
        id(e) for e in run.used
    )
    assert len(run.used) + len(held) == len(examples) and run.rehearsal == silence


@pytest.mark.parametrize("share", [0.12, 1e-9])
def test_what_was_trained_on_is_never_held_out_when_recordings_are_added(share):
    before, after = (held_out(sentences(n), share) for n in (25, 60))
    was, now = (
        [{e.features.tobytes() for e in part} for part in split] for split in (before, after)
    )
    assert was[0] and now[0] and was[1] <= now[1]


@pytest.mark.parametrize(
    ("n", "judges"), [(1, 0), (4, 0), (5, 1), (9, 1), (10, 2), (25, 4), (100, 4)]
)
def test_of_few_recordings_one_in_five_is_held_out_up_to_four(n, judges):
    held, used = held_out(sentences(n), 1e-9)
    assert (len(held), len(used)) == (judges, n - judges)


def test_weights_are_pulled_towards_those_they_began_with():
    def moved(weight_decay):
        run = trainer(replace(OPTIONS, weight_decay=weight_decay))
        run.run(quiet=True)
        return sum(
            (now - start).square().sum().item()
            for now, start in zip(run.projector.parameters(), run.start.parameters())
        )

    assert moved(200.0) < 0.5 * moved(0.0)


def test_two_recordings_are_enough_to_train_on():
    trained = trainer(examples=sentences(2)).run(quiet=True)
    losses = [entry["held_out"] for entry in trained.record["curve"]]
    assert trained.record["utterances"] == 2 and losses[-1] < losses[0]


@each_objective
def test_more_tokens_than_places_can_be_trained_on(objective):
    rng = np.random.default_rng(3)
    examples = [say(list(range(CONFIG.soft_tokens + 3)), rng), say([1], rng)]
    record = (
        trainer(replace(OPTIONS, steps=3, **objective), examples=examples).run(quiet=True).record
    )
    assert all(np.isfinite(entry["held_out"]) for entry in record["curve"])


def test_the_record_says_how_the_weights_came_about():
    record = trainer().run(quiet=True).record
    assert record["steps"] == 60 and record["utterances"] == 40 and record["train_seconds"] > 0
    assert [entry["step"] for entry in record["curve"]] == [0, 15, 30, 45, 60]
    assert record["options"]["seed"] == OPTIONS.seed


def test_the_weights_are_the_mean_at_the_end():
    run = trainer()
    trained = run.run(quiet=True)
    assert trained.record["improved"] and same(trained.weights, run.mean.state_dict())
    run.mean.load_state_dict(trained.weights)
    last = trained.record["curve"][-1]
    assert run._held_out_figures() == pytest.approx(
        (last["held_out"], last["held_out_loss"]), rel=1e-6
    )


def test_the_mean_counts_later_steps_more():
    """As t(t + 1)(t + 2), which is what the mean's eta of 3 comes to when it is worked out."""
    run = trainer()
    seen = []
    for run.step in range(7):
        run._train_step()
        seen.append(copy.deepcopy(run.projector.state_dict()))
    counts = np.array([t * (t + 1) * (t + 2) for t in range(1, 8)], dtype=np.float32)
    for name, mean in run.mean.state_dict().items():
        expected = sum(float(c) * weights[name] for c, weights in zip(counts / counts.sum(), seen))
        assert torch.allclose(mean, expected, atol=1e-6)


def test_a_training_that_only_spoils_gives_the_weights_it_began_with():
    trained = trainer(replace(OPTIONS, rate=30.0, warmup=1)).run(quiet=True)
    assert not trained.record["improved"] and same(trained.weights, new_projector().state_dict())


@pytest.mark.parametrize(
    ("before", "after", "improved"),
    [
        pytest.param((0.5, 1.0), (0.4, 2.0), True, id="fewer errors"),
        pytest.param((0.5, 2.0), (0.6, 1.0), False, id="more errors"),
        pytest.param((0.5, 2.0), (0.5, 1.0), True, id="as many, smaller loss"),
        pytest.param((0.5, 1.0), (0.5, 1.0), False, id="all the same"),
    ],
)
def test_errors_decide_and_where_they_are_as_many_the_loss(monkeypatch, before, after, improved):
    figures = iter([before, after])
    monkeypatch.setattr(Trainer, "_held_out_figures", lambda trainer: next(figures))
    trained = trainer(replace(OPTIONS, steps=1)).run(quiet=True)
    assert trained.record["improved"] == improved
    assert same(trained.weights, new_projector().state_dict()) != improved


def test_the_loss_is_judged_as_at_the_end_of_a_flat_start():
    """Or no tie before it could be compared with one after it."""
    options = replace(OPTIONS, objective="ctc", flat_start=20)
    run = trainer(options)
    ctc = trainer(replace(options, flat_start=0))
    assert run._held_out_figures() == ctc._held_out_figures()


@pytest.mark.parametrize(
    "objective, far, is_far",
    [("paper", 0.2, False), ("ctc", 0.2, True), ("ctc", 2.0, False), ("ctc", None, False)],
)
@pytest.mark.parametrize("parts", [("enter",), ()])
def test_the_shortcut_is_trained_for_somebody_far_only(objective, far, is_far, parts):
    run = trainer(
        replace(OPTIONS, objective=objective, trainable=parts, shortcut_threshold=far, steps=5)
    )
    start = {name: value.clone() for name, value in run.projector.state_dict().items()}
    run.run(quiet=True)
    now = run.projector.state_dict()
    changed = {name for name in start if not torch.equal(now[name], start[name])}
    shortcut = {name for name in start if name.startswith("shortcut")}
    assert bool(shortcut) == (objective == "ctc")  # what pools has none
    others = {name for name in start.keys() - shortcut if not parts or name.startswith(parts)}
    assert changed == (others | shortcut if is_far else others)


def test_who_is_far_is_told_by_all_recordings(monkeypatch):
    """A few held-out ones may all be heard well."""
    run = trainer(replace(OPTIONS, objective="ctc", shortcut_threshold=0.2))
    share = {id(e): wrong for part, wrong in ((run.held, 0.0), (run.used, 0.3)) for e in part}
    monkeypatch.setattr(
        Trainer, "_figures", lambda run, _, of: (np.mean([share[id(e)] for e in of]), 0.0)
    )
    assert run.needs_shortcut


def test_somebody_far_stays_so_with_a_projector_of_their_own():
    """It hears them well; what it learnt of their sounds is in its shortcut all the same, and goes on there."""
    options = replace(OPTIONS, objective="ctc", shortcut_threshold=0.6, steps=200)
    own = new_projector("ctc")
    own.load_state_dict(trainer(options).run(quiet=True).weights)
    for general, far in ((None, False), (new_projector("ctc"), True)):
        projector = copy.deepcopy(own)
        target = make(options, TABLE, SCALE)
        run = Trainer(
            projector, sentences(40), target, replace(options, steps=5), None, general=general
        )
        run.run(quiet=True)
        moved = not torch.equal(projector.shortcut.patterns.weight, own.shortcut.patterns.weight)
        assert run.needs_shortcut == moved == far


def test_a_shortcut_learns_little_from_small_gradients_and_other_weights_as_much():
    """Of other weights a step is of one size, however small the gradients: in a shortcut's many, noise would add up."""
    moved = []
    for scale in (1.0, 1e-5):
        run = trainer(replace(OPTIONS, objective="ctc"))
        before = copy.deepcopy(run.projector)
        for value in run.projector.parameters():
            value.grad = scale * torch.ones_like(value)
        for optimiser in run.optimisers:
            optimiser.step()
        pairs = zip(run.projector.named_parameters(), before.parameters())
        moved.append({name: (now - old).abs().max().item() for (name, now), old in pairs})
    for name, full in moved[0].items():
        assert (
            moved[1][name] < 0.02 * full
            if name.startswith("shortcut")
            else moved[1][name] > 0.9 * full
        )


# --- the same again ---


def test_a_seed_determines_the_weights():
    one, same_seed = trainer().run(quiet=True), trainer().run(quiet=True)
    other = trainer(replace(OPTIONS, seed=1)).run(quiet=True)
    assert same(one.weights, same_seed.weights) and not same(one.weights, other.weights)


def test_the_random_numbers_of_others_change_nothing():
    one = trainer().run(quiet=True)
    run = trainer()
    torch.manual_seed(99)
    assert same(one.weights, run.run(quiet=True).weights)


# --- when it ends ---


def test_time_runs_out(seconds):
    record = trainer(replace(OPTIONS, max_seconds=20.0)).run(quiet=True).record
    assert record["steps"] == 21 and record["train_seconds"] == 21.0
    assert [entry["step"] for entry in record["curve"]] == [0, 15, 21]


def test_the_rate_has_fallen_when_time_runs_out_and_is_that_of_the_steps_where_there_is_enough(
    seconds,
):
    short, enough = (trainer(replace(OPTIONS, max_seconds=m)) for m in (20.0, 61.0))
    short.run(quiet=True)
    assert short._rate() == pytest.approx(LAST_RATE * OPTIONS.rate)
    at = []
    for enough.step in range(OPTIONS.steps):
        enough.spent_s = float(enough.step)
        at.append(enough._rate())
    assert at == [rate_at(enough, step) for step in range(OPTIONS.steps)]


def rate_at(run, step):
    """The rate at a step where no time has passed."""
    run.step, run.spent_s = step, 0.0
    return run._rate()


def test_time_that_runs_out_before_the_first_check_still_gives_measured_weights(seconds):
    trained = trainer(replace(OPTIONS, max_seconds=2.0)).run(quiet=True)
    assert trained.record["steps"] == 3 and np.isfinite(trained.record["curve"][-1]["held_out"])
    assert not same(trained.weights, new_projector().state_dict())


def test_time_spent_before_an_interruption_counts(seconds, tmp_path):
    options = replace(OPTIONS, max_seconds=50.0)
    interrupt(tmp_path, options)
    assert steps_taken(options=options, work=tmp_path) == 21  # 30 s were spent


# --- interrupted and resumed ---


@each_objective
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, objective):
    options = replace(OPTIONS, **objective)
    interrupt(tmp_path, options)
    whole, again = trainer(options, kind=Counted), trainer(options, tmp_path, kind=Counted)
    uninterrupted, resumed = whole.run(quiet=True), again.run(quiet=True)
    assert (whole.taken, again.taken) == (60, 30)
    assert same(resumed.weights, uninterrupted.weights)
    assert same(again.projector.state_dict(), whole.projector.state_dict())
    assert without_seconds(resumed.record["curve"]) == without_seconds(
        uninterrupted.record["curve"]
    )


def test_a_training_that_ended_is_not_done_again(tmp_path):
    first = trainer(work=tmp_path).run(quiet=True)
    again = trainer(work=tmp_path, kind=Counted)
    assert same(again.run(quiet=True).weights, first.weights) and again.taken == 0


def longer_tokens(example):
    return replace(example, token_lengths=[LETTERS + 2 * i for i, _ in enumerate(example.tokens)])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"examples": sentences(40, seed=9)}, id="other recordings"),
        pytest.param({"examples": [longer_tokens(e) for e in sentences(40)]}, id="other places"),
        pytest.param({"options": replace(OPTIONS, seed=1)}, id="other options"),
        pytest.param({"table": TABLE + 1}, id="another LLM"),
    ],
)
def test_a_state_of_another_training_is_not_resumed(interrupted, changes):
    assert steps_taken(work=interrupted, **changes) == OPTIONS.steps


@pytest.mark.parametrize("whose", ["projector", "general"])
def test_a_state_of_other_weights_is_not_resumed(interrupted, whose):
    torch.manual_seed(7)
    other = BridgeFormer(CONFIG)
    projectors = {"projector": new_projector(), "general": new_projector(), whose: other}
    target = make(OPTIONS, TABLE)
    run = Counted(
        **projectors, examples=sentences(40), objective=target, options=OPTIONS, work=interrupted
    )
    run.run(quiet=True)
    assert run.taken == OPTIONS.steps


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"no state" * 99]
)
def test_a_damaged_state_means_a_fresh_start_with_a_warning(interrupted, damage, caplog):
    state = interrupted / "state.safetensors"
    state.write_bytes(damage(state.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert steps_taken(work=interrupted) == OPTIONS.steps
    assert "state.safetensors is damaged" in caplog.text


def test_a_half_written_state_is_no_state(interrupted):
    """Killed while saving: the last whole state is still there."""
    (interrupted / ".state.safetensors.partial").write_bytes(b"half")
    assert steps_taken(work=interrupted) == 30
