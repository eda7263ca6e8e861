"""The trainer on synthetic speech: every token is four noisy frames of its own pattern."""

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
from tiny_align.align.training.schedule import LAST_RATE, Schedule, steps_for
from tiny_align.align.training.trainer import Trainer, TrainOptions
from tiny_align.align.training.validation import Score, Validator, split_examples
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


def synthesise(tokens, rng):
    frames = PATTERNS[tokens].repeat(FRAMES_PER_TOKEN, axis=0)  # (N, Da)
    noise = 0.3 * rng.normal(size=frames.shape)
    return Example((frames + noise).astype(np.float32), list(tokens), [LETTERS] * len(tokens))


def sentences(n, seed=1):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        tokens = rng.integers(VOCABULARY, size=rng.integers(2, 7)).tolist()
        examples.append(synthesise(tokens, rng))
    return examples


def new_projector(objective="paper"):
    torch.manual_seed(0)
    return BridgeFormer(replace(CONFIG, soft_tokens=None) if objective == "ctc" else CONFIG)


def new_trainer(options=OPTIONS, work=None, examples=None, table=TABLE, kind=Trainer):
    examples = sentences(40) if examples is None else examples
    objective = make(options, table, SCALE)
    return kind(new_projector(options.objective), examples, objective, options, work)


class Stopped(Trainer):
    """Interrupted in its 41st step, as by Ctrl-C: the last check was after the 30th."""

    def train_step(self):
        if self.progress.step == 40:
            raise KeyboardInterrupt
        return super().train_step()


class Counted(Trainer):
    """Counts the steps that it takes itself, without those before an interruption."""

    taken = 0

    def train_step(self):
        self.taken += 1
        return super().train_step()


def interrupt(work, options=OPTIONS):
    with pytest.raises(KeyboardInterrupt):
        new_trainer(options, work, kind=Stopped).run(quiet=True)


@pytest.fixture
def interrupted(tmp_path):
    """The work folder of a training that was interrupted."""
    interrupt(tmp_path)
    return tmp_path


@pytest.fixture
def seconds(monkeypatch):
    """A clock that advances by a second whenever the trainer reads it."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr(trainer_module, "time", clock)


def steps_taken(**changes):
    trainer = new_trainer(kind=Counted, **changes)
    trainer.run(quiet=True)
    return trainer.taken


def same(one, other):
    """Whether two sets of weights are equal, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_seconds(curve):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in curve]


def expected_tokens(objective, example):
    """The token of each soft token, as the objective places them."""
    if objective == "ctc":
        return example.tokens
    return np.array(example.tokens)[cast_places(example.token_lengths, CONFIG.soft_tokens)].tolist()


def nearest_token_accuracy(projector, examples, objective):
    """Share of soft tokens that lie nearest to the embedding of the expected token."""
    table = TABLE.numpy()
    hits = []
    for example in examples:
        vectors = projector(torch.from_numpy(example.features)[None])[0].detach().numpy()
        soft_tokens = collapse(vectors, table, SCALE) if objective == "ctc" else vectors  # (T, D)
        nearest = ((soft_tokens[:, None] - table) ** 2).sum(-1).argmin(-1)  # (T,)
        expected = expected_tokens(objective, example)
        hits += [got == token for got, token in itertools.zip_longest(nearest, expected)]
    return np.mean(hits)


# --- learning ---


@pytest.mark.parametrize("objective", [o for n, o in OBJECTIVES.items() if n != "paper padded"])
def test_training_learns_the_token_of_each_soft_token(objective):
    """Not for padded targets, most of which are padding: a pooled place lacks its number."""
    options = replace(OPTIONS, steps=200, check_every=50, **objective)
    projector = new_projector(options.objective)
    unseen = sentences(40, seed=2)
    before = nearest_token_accuracy(projector, unseen, options.objective)
    trainer = Trainer(projector, sentences(200), make(options, TABLE, SCALE), options, None)
    trained = trainer.run(quiet=True)
    projector.load_state_dict(trained.weights)
    losses = [entry["held_out"] for entry in trained.record["curve"]]
    assert trained.record["improved"] and losses[-1] < 0.6 * losses[0]
    assert before < 0.2 < 0.5 < nearest_token_accuracy(projector.eval(), unseen, options.objective)


@pytest.mark.parametrize(("n", "steps"), [(2, 50), (25, 62), (60, 150), (100, 250), (5000, 250)])
def test_steps_follow_the_number_of_recordings_within_bounds(n, steps):
    assert steps_for(n, batch=16) == steps


def test_no_held_out_example_is_trained_on():
    examples = sentences(400)
    non_speech = [replace(sentences(1)[0], tokens=[])]
    trainer = Trainer(new_projector(), examples, make(OPTIONS, TABLE), OPTIONS, None, non_speech)
    validation = {id(e) for e in trainer.validation_examples}
    training = {id(e) for e in trainer.training_examples}
    assert 0.5 < len(validation) / (400 * OPTIONS.held_out) < 1.5
    assert validation.isdisjoint(training)
    assert len(training) + len(validation) == len(examples)
    assert trainer.rehearsal == non_speech


@pytest.mark.parametrize("share", [0.12, 1e-9])
def test_training_examples_stay_training_examples_when_recordings_are_added(share):
    training, validation = split_examples(sentences(25), share)
    more_training, more_validation = split_examples(sentences(60), share)
    assert validation and more_validation
    before = {e.features.tobytes() for e in training}
    after = {e.features.tobytes() for e in more_training}
    assert before <= after


@pytest.mark.parametrize(
    ("n", "n_validation"), [(1, 0), (4, 0), (5, 1), (9, 1), (10, 2), (25, 4), (100, 4)]
)
def test_of_few_recordings_one_in_five_is_held_out_up_to_four(n, n_validation):
    training, validation = split_examples(sentences(n), 1e-9)
    assert (len(validation), len(training)) == (n_validation, n - n_validation)


def test_weight_decay_pulls_towards_the_first_weights():
    assert squared_distance_moved(200.0) < 0.5 * squared_distance_moved(0.0)


def squared_distance_moved(weight_decay):
    trainer = new_trainer(replace(OPTIONS, weight_decay=weight_decay))
    trainer.run(quiet=True)
    distance = 0.0
    for now, start in zip(trainer.projector.parameters(), trainer.start.parameters()):
        distance += (now - start).square().sum().item()
    return distance


def test_two_recordings_are_enough_to_train_on():
    trained = new_trainer(examples=sentences(2)).run(quiet=True)
    losses = [entry["held_out"] for entry in trained.record["curve"]]
    assert trained.record["utterances"] == 2 and losses[-1] < losses[0]


@each_objective
def test_more_tokens_than_places_give_a_finite_loss(objective):
    rng = np.random.default_rng(3)
    examples = [synthesise(list(range(CONFIG.soft_tokens + 3)), rng), synthesise([1], rng)]
    options = replace(OPTIONS, steps=3, **objective)
    record = new_trainer(options, examples=examples).run(quiet=True).record
    assert all(np.isfinite(entry["held_out"]) for entry in record["curve"])


def test_the_record_holds_steps_utterances_curve_and_options():
    record = new_trainer().run(quiet=True).record
    assert record["steps"] == 60 and record["utterances"] == 40 and record["train_seconds"] > 0
    assert [entry["step"] for entry in record["curve"]] == [0, 15, 30, 45, 60]
    assert record["options"]["seed"] == OPTIONS.seed


def test_the_trained_weights_are_the_mean_of_the_steps():
    trainer = new_trainer()
    trained = trainer.run(quiet=True)
    assert trained.record["improved"] and same(trained.weights, trainer.mean.state_dict())
    trainer.mean.load_state_dict(trained.weights)
    score = trainer.validation_score()
    last = trained.record["curve"][-1]
    assert score.error_rate == pytest.approx(last["held_out"], rel=1e-6)
    assert score.loss == pytest.approx(last["held_out_loss"], rel=1e-6)


def test_the_mean_counts_later_steps_more():
    """As t(t + 1)(t + 2), which is what the mean's eta of 3 comes to when it is worked out."""
    trainer = new_trainer()
    seen = []
    for trainer.progress.step in range(7):
        trainer.train_step()
        seen.append(copy.deepcopy(trainer.projector.state_dict()))
    counts = np.array([t * (t + 1) * (t + 2) for t in range(1, 8)], dtype=np.float32)
    shares = (counts / counts.sum()).tolist()
    for name, mean in trainer.mean.state_dict().items():
        expected = sum(share * weights[name] for share, weights in zip(shares, seen))
        assert torch.allclose(mean, expected, atol=1e-6)


def test_a_training_that_does_not_improve_gives_the_first_weights():
    trained = new_trainer(replace(OPTIONS, rate=30.0, warmup=1)).run(quiet=True)
    assert not trained.record["improved"] and same(trained.weights, new_projector().state_dict())


@pytest.mark.parametrize(
    ("before", "after", "improved"),
    [
        pytest.param((0.5, 1.0), (0.4, 2.0), True, id="fewer errors"),
        pytest.param((0.5, 2.0), (0.6, 1.0), False, id="more errors"),
        pytest.param((0.5, 2.0), (0.5, 1.0), True, id="equal errors, smaller loss"),
        pytest.param((0.5, 1.0), (0.5, 1.0), False, id="equal errors and loss"),
    ],
)
def test_the_error_rate_decides_and_on_a_tie_the_loss(monkeypatch, before, after, improved):
    scores = iter([Score(*before), Score(*after)])
    monkeypatch.setattr(Trainer, "validation_score", lambda trainer: next(scores))
    trained = new_trainer(replace(OPTIONS, steps=1)).run(quiet=True)
    assert trained.record["improved"] == improved
    assert same(trained.weights, new_projector().state_dict()) != improved


def test_the_validation_loss_is_always_that_after_the_flat_start():
    """Or no tie before its end could be compared with one after it."""
    options = replace(OPTIONS, objective="ctc", flat_start=20)
    without_flat_start = replace(options, flat_start=0)
    score = new_trainer(options).validation_score()
    assert score == new_trainer(without_flat_start).validation_score()


# --- the shortcut ---


@pytest.mark.parametrize(
    "objective, threshold, expected",
    [("paper", 0.2, False), ("ctc", 0.2, True), ("ctc", 2.0, False), ("ctc", None, False)],
)
@pytest.mark.parametrize("trainable", [("enter",), ()])
def test_the_shortcut_is_trained_above_the_threshold_only(
    objective, threshold, expected, trainable
):
    options = replace(OPTIONS, objective=objective, trainable=trainable, steps=5)
    trainer = new_trainer(replace(options, shortcut_threshold=threshold))
    start = {name: value.clone() for name, value in trainer.projector.state_dict().items()}
    trainer.run(quiet=True)
    now = trainer.projector.state_dict()
    changed = {name for name in start if not torch.equal(now[name], start[name])}
    shortcut = {name for name in start if name.startswith("shortcut")}
    assert bool(shortcut) == (objective == "ctc")  # a projector that pools has none
    others = start.keys() - shortcut
    if trainable:
        others = {name for name in others if name.startswith(trainable)}
    assert changed == (others | shortcut if expected else others)


def test_all_of_a_users_examples_decide_on_the_shortcut(monkeypatch):
    """The few held-out ones may happen to be right."""
    trainer = new_trainer(replace(OPTIONS, objective="ctc", shortcut_threshold=0.2))
    error_rates = dict.fromkeys(map(id, trainer.validation_examples), 0.0)
    error_rates |= dict.fromkeys(map(id, trainer.training_examples), 0.3)

    def score(validator, projector, examples, step):
        return Score(np.mean([error_rates[id(example)] for example in examples]), loss=0.0)

    monkeypatch.setattr(Validator, "score", score)
    assert trainer.needs_shortcut


def test_the_general_projector_decides_on_the_shortcut_of_a_trained_user():
    """A user's own projector has few errors, but its shortcut must be trained on all the same."""
    options = replace(OPTIONS, objective="ctc", shortcut_threshold=0.6, steps=200)
    own = new_projector("ctc")
    own.load_state_dict(new_trainer(options).run(quiet=True).weights)
    objective = make(options, TABLE, SCALE)
    options = replace(options, steps=5)
    for general, expected in ((None, False), (new_projector("ctc"), True)):
        projector = copy.deepcopy(own)
        trainer = Trainer(projector, sentences(40), objective, options, None, general=general)
        trainer.run(quiet=True)
        moved = not torch.equal(projector.shortcut.patterns.weight, own.shortcut.patterns.weight)
        assert trainer.needs_shortcut == moved == expected


def test_small_gradients_move_the_shortcut_little_and_other_weights_fully():
    """Adam's steps have one size, however small the gradient: noise in many weights adds up."""
    full = largest_moves(gradient=1.0)
    small = largest_moves(gradient=1e-5)
    for name in full:
        if name.startswith("shortcut"):
            assert small[name] < 0.02 * full[name]
        else:
            assert small[name] > 0.9 * full[name]


def largest_moves(gradient):
    """Parameter -> how far one step moves it."""
    trainer = new_trainer(replace(OPTIONS, objective="ctc"))
    before = copy.deepcopy(trainer.projector)
    for value in trainer.projector.parameters():
        value.grad = gradient * torch.ones_like(value)
    for optimiser in trainer.optimisers:
        optimiser.step()
    pairs = zip(trainer.projector.named_parameters(), before.parameters())
    return {name: (now - old).abs().max().item() for (name, now), old in pairs}


# --- the same again ---


def test_a_seed_determines_the_weights():
    one = new_trainer().run(quiet=True)
    same_seed = new_trainer().run(quiet=True)
    other = new_trainer(replace(OPTIONS, seed=1)).run(quiet=True)
    assert same(one.weights, same_seed.weights) and not same(one.weights, other.weights)


def test_the_global_random_state_changes_nothing():
    one = new_trainer().run(quiet=True)
    trainer = new_trainer()
    torch.manual_seed(99)
    assert same(one.weights, trainer.run(quiet=True).weights)


# --- when it ends ---


def test_max_seconds_end_the_training(seconds):
    record = new_trainer(replace(OPTIONS, max_seconds=20.0)).run(quiet=True).record
    assert record["steps"] == 21 and record["train_seconds"] == 21.0
    assert [entry["step"] for entry in record["curve"]] == [0, 15, 21]


def test_the_rate_is_at_its_lowest_when_time_runs_out(seconds):
    trainer = new_trainer(replace(OPTIONS, max_seconds=20.0))
    trainer.run(quiet=True)
    progress = trainer.progress
    rate = trainer.schedule.rate(OPTIONS.rate, progress.step, progress.spent_s)
    assert rate == pytest.approx(LAST_RATE * OPTIONS.rate)


def test_the_rate_follows_the_steps_if_there_is_time_enough():
    """A second per step, and a second more than there are steps."""
    schedule = Schedule(OPTIONS.steps, OPTIONS.warmup, max_seconds=OPTIONS.steps + 1.0)
    for step in range(OPTIONS.steps):
        rate = schedule.rate(OPTIONS.rate, step, spent_s=float(step))
        assert rate == schedule.rate(OPTIONS.rate, step, spent_s=0.0)


def test_weights_are_measured_if_time_runs_out_before_the_first_check(seconds):
    trained = new_trainer(replace(OPTIONS, max_seconds=2.0)).run(quiet=True)
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
    whole = new_trainer(options, kind=Counted)
    again = new_trainer(options, tmp_path, kind=Counted)
    uninterrupted = whole.run(quiet=True)
    resumed = again.run(quiet=True)
    assert (whole.taken, again.taken) == (60, 30)
    assert same(resumed.weights, uninterrupted.weights)
    assert same(again.projector.state_dict(), whole.projector.state_dict())
    curve = without_seconds(resumed.record["curve"])
    assert curve == without_seconds(uninterrupted.record["curve"])


def test_a_finished_training_takes_no_more_steps(tmp_path):
    first = new_trainer(work=tmp_path).run(quiet=True)
    again = new_trainer(work=tmp_path, kind=Counted)
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


@pytest.mark.parametrize("changed", ["projector", "general"])
def test_a_state_of_other_weights_is_not_resumed(interrupted, changed):
    torch.manual_seed(7)
    other = BridgeFormer(CONFIG)
    projectors = {"projector": new_projector(), "general": new_projector(), changed: other}
    objective = make(OPTIONS, TABLE)
    trainer = Counted(
        **projectors, examples=sentences(40), objective=objective, options=OPTIONS, work=interrupted
    )
    trainer.run(quiet=True)
    assert trainer.taken == OPTIONS.steps


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
