"""`tiny-align bench`: finds regressions, not noise; counts right; results have their form."""

import json
import time

import numpy as np
import pytest

from tiny_align.benchmarks.standard import (
    command,
    diff,
    growth,
    harness,
    pipelines,
    results,
    stages,
    tables,
)
from tiny_align.benchmarks.standard import parts as standard
from tiny_align.benchmarks.standard.counting import Cost, count
from tiny_align.benchmarks.standard.limits import limit_row
from tiny_align.benchmarks.standard.processes import PeerProcess
from tiny_align.runtime.errors import DataError

SECONDS = {  # of a typical turn
    "front end": 6e-3,
    "encoder": 15e-3,
    "projector": 2e-3,
    "readout": 1e-3,
    "prefill": 3e-3,
    "decode": 4e-3,
}


def make_samples(
    seed: int,
    machine: float = 1.0,
    slow: dict[str, float] | None = None,
    n: int = standard.STAGES_RULE.max_rounds,
) -> harness.Samples:
    """Samples of a noisy machine.

    It slows down for whole stretches, every part jitters, and a turn in twenty takes twice as long.

    Args:
        machine: how many times as long everything takes, the kernel too.
        slow: part -> how many times as long it takes.
    """
    rng = np.random.default_rng(seed)
    stretches = np.repeat(1 + 0.5 * (rng.random(n // 5) < 0.3), 5) * machine
    samples = {}
    for part, seconds in {"kernel": 1e-3, "prompt": 2e-5, "text": 1e-5, **SECONDS}.items():
        of_process = 1 + 0.02 * rng.standard_normal()  # for good
        jitter = rng.lognormal(0, 0.06, n) * (1 + (rng.random(n) < 0.05))
        factor = (slow or {}).get(part, 1.0)
        samples[part] = (seconds * factor * of_process * stretches * jitter).tolist()
    return samples


def regressions(a: harness.Samples, b: harness.Samples) -> list[str]:
    return [change.what for change in diff.speed_changes(a, b) if change.regression]


@pytest.mark.parametrize("seed", range(5))
def test_two_runs_of_the_same_code_are_no_regression(seed):
    assert regressions(make_samples(seed), make_samples(100 + seed)) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_slower_machine_is_no_regression(seed):
    assert regressions(make_samples(seed), make_samples(200 + seed, machine=1.5)) == []


@pytest.mark.parametrize("stage", SECONDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_stage_slower_by_a_fifth_is_a_regression(seed, stage):
    slower = make_samples(100 + seed, slow={stage: 1.2})
    assert regressions(make_samples(seed), slower) == [stage]


def test_all_stages_slower_than_the_kernel_are_one_regression():
    slower = make_samples(2, slow=dict.fromkeys(SECONDS, 1.4))
    assert regressions(make_samples(1), slower) == [diff.EVERYTHING]


# --- taking turns ---


def test_sides_take_turns_in_alternating_order():
    calls = []

    def make_work(name):
        def work():
            calls.append(name)
            time.sleep(0.002)

        return work

    sides = {name: harness.make_side(make_work(name)) for name in "ab"}
    rule = harness.StoppingRule(min_rounds=4, max_rounds=4, max_s=60)
    samples = harness.alternate(sides, rule)
    assert "".join(calls) == "ab" + "baab" * 2  # one each to warm up
    for side in samples.values():
        assert len(side["seconds"]) == len(side["kernel"]) == 4
        assert min(side["seconds"]) >= 0.002


def test_turns_go_on_until_the_noise_is_small():
    calm = {"x": {"a": [1.0] * 20, "kernel": [1.0] * 20}}
    noisy = {"x": {"a": [1.0, 2.0] * 10, "kernel": [1.0] * 20}}
    assert harness.is_settled(calm, 0.02)
    assert not harness.is_settled(noisy, 0.02)
    rule = harness.StoppingRule(min_rounds=5, max_rounds=20, max_s=60)
    now = time.perf_counter()
    assert [rule.goes_on(n, now, calm) for n in (4, 5)] == [True, False]
    assert [rule.goes_on(n, now, noisy) for n in (5, 20)] == [True, False]
    assert not rule.goes_on(5, now - 61, noisy)


def test_the_clock_stops_only_while_waiting_for_a_core():
    began = harness.now()
    waited = harness.core_wait_s()
    time.sleep(0.05)
    assert harness.now() - began >= 0.05 - (harness.core_wait_s() - waited)
    assert harness.core_wait_s() >= waited >= 0


def test_a_stages_seconds_exclude_those_of_inner_stages():
    timers = stages.Timers({"readout": 2.0})
    began = harness.now()
    with timers.stage("readout"):
        time.sleep(0.01)
        with timers.stage("projector"):
            time.sleep(0.02)
    whole = harness.now() - began
    assert 0.02 <= timers.seconds["projector"] < timers.seconds["readout"] + 0.02
    assert timers.seconds["readout"] >= 0.02  # a hundredth of a second, twice
    assert sum(timers.seconds.values()) == pytest.approx(whole, rel=0.02)


def test_the_stages_add_up_to_the_answer(assistant, speech):
    side = stages.answering(assistant, speech)
    taken = [side() for _ in range(5)]
    assert all(turn[stage] > 0 for turn in taken for stage in stages.STAGES)
    assert min(abs(stages.unexplained(turn)) for turn in taken) < 0.05
    with stages.timing(assistant) as timers:
        pass
    list(assistant.stream(speech))
    assert not any(timers.seconds.values())  # nothing is timed afterwards


# --- peers ---


class Peer:
    def __init__(self, seconds: float):
        if seconds < 0:
            raise ValueError("no such peer\nat all")
        self._seconds = seconds

    def measure(self, question: int) -> dict:
        time.sleep(self._seconds)
        return {"answer": question + 1}


def test_a_peer_is_measured_in_a_process_of_its_own():
    peer = PeerProcess(Peer, 0.0, threads=1)
    row = peer.measure(4)
    peer.close()
    assert row["answer"] == 5
    assert row["peak_bytes"] > 10 << 20
    assert row["load_s"] < 1


def test_a_peer_that_cannot_be_made_has_a_failure():
    assert PeerProcess(Peer, -1.0, threads=1).failure == "ValueError: no such peer"


def test_a_peer_without_an_answer_in_time_has_a_failure():
    peer = PeerProcess(Peer, 30.0, threads=1, timeout_s=10.0)
    peer.timeout_s = 0.1
    assert peer.measure(1) is None
    assert peer.failure == "it gave no answer within 0.1 s"
    assert peer.measure(1) is None
    peer.close()


@pytest.mark.parametrize("make", [pipelines.plain_graphs, pipelines.torch_eager])
def test_other_engines_give_the_same_answer(make, assistant, speech):
    pytest.importorskip("transformers")
    with make(assistant.bundle, 1) as other:
        assert other.answer(speech).tokens == assistant.answer(speech).tokens


def test_the_cascade_answers_the_encoders_own_transcript(assistant, speech):
    with pipelines.cascade(assistant.bundle, 1) as other:
        letters = other.transcript(speech)
        answer = other.answer(speech)
    assert set(letters) <= set(" abcdefghijklmnopqrstuvwxyz'")
    assert len(letters) > 5
    assert answer.text == assistant.answer_text(letters).text


def test_rotary_pairs_become_neighbours():
    rows = np.arange(16, dtype=np.float32)[:, None]  # two heads of eight
    first_head = [0, 4, 1, 5, 2, 6, 3, 7]
    second_head = [8 + row for row in first_head]
    assert pipelines.interleave_rotary(rows, 8)[:, 0].tolist() == first_head + second_head


# --- counts ---


def test_a_graph_is_counted_as_by_hand(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weights = [
        numpy_helper.from_array(np.ones((6, 4, 3), np.float32), "kernel"),
        numpy_helper.from_array(np.ones((6, 5), np.float32), "matrix"),
    ]
    nodes = [
        helper.make_node(
            "Conv", ["x", "kernel"], ["c"], pads=[1, 1]
        ),  # (1, 6, n), 12 products each
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "matrix"], ["y"]),  # (1, n, 5), 6 products each
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, "n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "n", 5])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    onnx.save(model, str(tmp_path / "g.onnx"))
    cost = count(tmp_path / "g.onnx", {"n": 10})
    assert cost == Cost(2 * (60 * 12 + 50 * 6), 4 * (72 + 30), 4 * (40 + 50))
    assert count(tmp_path / "g.onnx", {"n": 20}).operations == 2 * cost.operations


def test_the_llm_is_counted_from_its_plain_graph(bundle_path, assistant):
    pytest.importorskip("onnx")
    spec = assistant.bundle.manifest.llm
    step = count(bundle_path / "llm.onnx", {"tokens": 1, "past": 10})
    later_step = count(bundle_path / "llm.onnx", {"tokens": 1, "past": 110})
    n_heads = 6  # of the reference LLM, not in its manifest: each reads keys and values
    products = 2 * 100 * n_heads * spec.head_size * spec.n_layers
    assert later_step.operations - step.operations == 2 * products
    with pytest.raises(ValueError, match="GroupQueryAttention"):
        count(bundle_path / "llm.ort.onnx", {})


def test_the_limit_is_the_slower_of_memory_and_arithmetic():
    cost = Cost(operations=2 * 10**9, weight_bytes=10**9, other_bytes=0)
    row = limit_row(cost, 0.5, gb_s=10.0, gflop_s=100.0)
    assert row["limited_by"] == "memory"
    assert row["share"] == pytest.approx(0.1 / 0.5)
    assert row["predicted_s"]["68 GB/s"] == pytest.approx(1 / 68 / 0.8)
    assert limit_row(cost, 0.5, gb_s=1000.0, gflop_s=100.0)["limited_by"] == "arithmetic"


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_is_that_of_the_data(power):
    sizes = [1, 2, 5, 10, 30]
    seconds = [3e-3 * size**power for size in sizes]
    assert growth.exponent(sizes, seconds) == pytest.approx(power, abs=1e-9)


# --- results ---


@pytest.fixture
def result() -> dict:
    """A small one, of one part."""
    ours = make_samples(1)
    ours[stages.FIRST] = [0.03] * 40
    ours[stages.PER_TOKEN] = [1e-3] * 40
    ours[stages.ANSWER] = [sum(SECONDS.values()) * 1.01] * 40
    samples = {
        pipelines.OURS: ours,
        standard.ENCODER_ALONE: {"encoder": [0.015] * 40, "kernel": [1e-3] * 40},
        standard.WITH_THREADS: {stages.ANSWER: [0.03] * 40, "kernel": [1e-3] * 40},
    }
    inference = {
        "audio_s": 2.0,
        "samples": 32_000,
        "features": 50,
        "prompt_positions": 20,
        "answer_tokens": 6,
        "unexplained": 0.01,
        "summary": {side: harness.summary(turns) for side, turns in samples.items()},
        "timings": samples,
    }
    return {
        "schema": results.SCHEMA,
        "date": "2026-01-01T00:00:00",
        "command": "tiny-align bench inference",
        "seconds": 12.0,
        "machine": {
            "system": "Linux",
            "cores": 2,
            "python": "3.11",
            "processor": "Intel(R) Xeon(R) Processor",
        },
        "versions": {"numpy": "2"},
        "before": {},
        "after": {"load": 0.1},
        "setting": {
            "threads": 1,
            "short": False,
            "bundle": "b",
            "bundle_sha256": "0",
            "data": "voice",
            "slow": {},
        },
        "parts": {"inference": inference},
    }


def test_a_result_is_read_as_it_was_written(result, tmp_path):
    path = tmp_path / f"{results.machine_name(result['machine'])}.json"
    assert path.name == "intel-xeon-processor-2-cores.json"
    results.write(path, result)
    assert results.read(path) == result


def test_a_report_has_tables_and_pictures(result, tmp_path):
    path = tmp_path / "result.json"
    tables.write(path, result)
    report = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| unexplained |  | 1.0% |" in report
    picture = tmp_path / "result-inference.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda r: r.pop("machine"), ".machine is missing"),
        (lambda r: r["setting"].update(threads="2"), ".setting.threads is '2'"),
        (lambda r: r["setting"].update(short=0), ".setting.short is 0"),
        (lambda r: r["parts"].update(speed={}), ".parts.speed is not known"),
        (
            lambda r: r["parts"]["inference"]["timings"].update(x={"y": [1, None]}),
            ".parts.inference.timings.x.y[1] is None",
        ),
    ],
)
def test_a_result_of_another_form_is_refused(result, change, fault):
    change(result)
    assert fault in results.faults(result, results.FORM)
    with pytest.raises(DataError, match="measure again"):
        results.check(result, "a.json")


def test_diff_exits_with_1_on_a_regression(result, tmp_path, run_cli):
    slower = json.loads(json.dumps(result))
    slower_samples = make_samples(2, slow={"encoder": 1.3})
    slower["parts"]["inference"]["timings"][pipelines.OURS] = slower_samples
    a = tmp_path / "a.json"
    b = tmp_path / "b.json"
    results.write(a, result)
    results.write(b, slower)
    same = run_cli("bench", "diff", a, a, "--json")
    assert (same.status, same.document["regressions"]) == (0, [])
    worse = run_cli("bench", "diff", a, b, "--json")
    assert (worse.status, worse.document["regressions"]) == (1, ["encoder"])


def test_results_of_two_machines_are_not_compared(result):
    other = result | {"machine": result["machine"] | {"cores": 8}}
    with pytest.raises(DataError, match="two machines"):
        diff.compare(result, other)


def test_every_part_has_a_table_and_a_form():
    assert tuple(standard.PARTS) == command.NAMES
    assert set(standard.PARTS) == set(tables.TABLES)
    assert set(standard.PARTS) == {name.rstrip("?") for name in results.PARTS}


def test_an_unknown_part_is_refused(run_cli):
    assert run_cli("bench", "speed").status == 2


def test_slow_without_a_factor_is_refused(run_cli):
    assert "no STAGE=FACTOR" in run_cli("bench", "inference", "--slow", "encoder").stderr
