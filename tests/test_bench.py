"""The harness behind `tiny-align bench`: noise is told from change, counts are right, what is written has its form."""

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
from tiny_align.benchmarks.standard.limits import against
from tiny_align.benchmarks.standard.processes import Served
from tiny_align.runtime.errors import DataError

SECONDS = {
    "front end": 6e-3,
    "encoder": 15e-3,
    "projector": 2e-3,
    "readout": 1e-3,
    "prefill": 3e-3,
    "decode": 4e-3,
}


def turns(
    seed: int,
    n: int = standard.STAGES_PATIENCE.most,
    machine: float = 1.0,
    slow: dict | None = None,
) -> dict[str, list[float]]:
    """A noisy machine's samples: it slows down for whole stretches, every part jitters, now and then one is held up."""
    rng = np.random.default_rng(seed)
    stretch = np.repeat(1 + 0.5 * (rng.random(n // 5) < 0.3), 5) * machine
    parts = {"kernel": 1e-3, "prompt": 2e-5, "text": 1e-5, **SECONDS}

    def taken(part: str, usual: float) -> list[float]:
        own = 1 + 0.02 * rng.standard_normal()  # of this process, for good
        jitter = rng.lognormal(0, 0.06, n) * (1 + (rng.random(n) < 0.05))
        return (usual * (slow or {}).get(part, 1.0) * own * stretch * jitter).tolist()

    return {part: taken(part, usual) for part, usual in parts.items()}


def regressions(a: dict, b: dict) -> list[str]:
    return [change.what for change in diff.slower(a, b) if change.regression]


@pytest.mark.parametrize("seed", range(5))
def test_two_runs_alike_are_no_regression(seed):
    assert regressions(turns(seed), turns(100 + seed)) == []
    assert (
        regressions(turns(seed), turns(200 + seed, machine=1.5)) == []
    )  # the whole machine is slower


@pytest.mark.parametrize("stage", SECONDS)
@pytest.mark.parametrize("seed", range(5))
def test_a_stage_that_is_slower_by_a_fifth_is_found(seed, stage):
    assert regressions(turns(seed), turns(100 + seed, slow={stage: 1.2})) == [stage]


def test_everything_slower_than_the_kernel_is_found():
    slow = dict.fromkeys(SECONDS, 1.4)
    assert regressions(turns(1), turns(2, slow=slow)) == [diff.EVERYTHING]


# --- taking turns ---


def test_sides_take_turns_until_the_noise_is_small():
    calls = []
    sides = {
        name: harness.timed(lambda name=name: (calls.append(name), time.sleep(0.002)))
        for name in "ab"
    }
    patience = harness.Patience(least=4, most=4, seconds=60)
    samples = harness.alternate(sides, patience)
    assert "".join(calls) == "ab" + "baab" * 2  # one each to warm up
    assert all(len(side["seconds"]) == len(side["kernel"]) == 4 for side in samples.values())
    assert all(second >= 0.002 for side in samples.values() for second in side["seconds"])


def test_more_turns_are_taken_where_there_is_more_noise():
    calm, wild = (
        {"x": {"a": values, "kernel": [1.0] * 20}} for values in ([1.0] * 20, [1.0, 2.0] * 10)
    )
    assert harness.settled(calm, 0.02) and not harness.settled(wild, 0.02)
    patience = harness.Patience(least=5, most=20, seconds=60)
    now = time.perf_counter()
    assert [patience.lasts(n, now, calm) for n in (4, 5)] == [True, False]
    assert [patience.lasts(n, now, wild) for n in (5, 20)] == [True, False]
    assert not patience.lasts(5, now - 61, wild)


def test_the_clock_stands_still_for_others_only():
    began, waited = harness.now(), harness.waited()
    time.sleep(0.05)
    assert (
        harness.now() - began >= 0.05 - (harness.waited() - waited)
        and harness.waited() >= waited >= 0
    )


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


def test_a_peer_lives_in_a_process_of_its_own():
    peer = Served(Peer, 0.0, threads=1)
    row = peer.measure(4)
    peer.close()
    assert row["answer"] == 5 and row["peak_bytes"] > 10 << 20 and row["load_s"] < 1


def test_a_peer_that_fails_says_why():
    assert Served(Peer, -1.0, threads=1).why == "ValueError: no such peer"
    slow = Served(Peer, 30.0, threads=1, patience_s=10.0)
    slow._patience_s = 0.1
    assert slow.measure(1) is None and slow.why == "it gave no answer within 0.1 s"
    slow.close()


@pytest.mark.parametrize("make", [pipelines.plain, pipelines.torch_pipeline])
def test_other_engines_say_the_same(make, assistant, speech):
    pytest.importorskip("transformers")
    with make(assistant.bundle, 1) as other:
        assert other.answer(speech).tokens == assistant.answer(speech).tokens


def test_the_cascade_reads_the_encoders_own_letters(assistant, speech):
    with pipelines.cascade(assistant.bundle, 1) as other:
        letters, answer = other.transcript(speech), other.answer(speech)
    assert set(letters) <= set(" abcdefghijklmnopqrstuvwxyz'") and len(letters) > 5
    assert answer.text == assistant.answer_text(letters).text


def test_rotated_halves_become_neighbours():
    rows = np.arange(16, dtype=np.float32)[:, None]  # two heads of eight
    assert pipelines.turned(rows, 8)[:, 0].tolist() == [
        0,
        4,
        1,
        5,
        2,
        6,
        3,
        7,
        8,
        12,
        9,
        13,
        10,
        14,
        11,
        15,
    ]


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
        ),  # (1, 6, n), 12 products for each
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "matrix"], ["y"]),  # (1, n, 5), 6 products for each
    ]
    value = helper.make_tensor_value_info
    io = [value("x", TensorProto.FLOAT, [1, 4, "n"])], [value("y", TensorProto.FLOAT, [1, "n", 5])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *io, weights),
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
    step, deeper = (count(bundle_path / "llm.onnx", {"tokens": 1, "past": n}) for n in (10, 110))
    heads = 6  # of the reference LLM, which its manifest does not tell: each reads keys and values
    assert (
        deeper.operations - step.operations == 2 * 2 * 100 * heads * spec.head_size * spec.n_layers
    )
    with pytest.raises(ValueError, match="GroupQueryAttention"):
        count(bundle_path / "llm.ort.onnx", {})


def test_the_share_of_a_limit_is_by_the_slower_of_two():
    cost = Cost(operations=2 * 10**9, weight_bytes=10**9, other_bytes=0)
    row = against(cost, 0.5, gb_s=10.0, gflop_s=100.0)
    assert row["limited_by"] == "memory" and row["share"] == pytest.approx(0.1 / 0.5)
    assert row["predicted_s"]["68 GB/s"] == pytest.approx(1 / 68 / 0.8)
    assert against(cost, 0.5, gb_s=1000.0, gflop_s=100.0)["limited_by"] == "arithmetic"


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_is_that_of_the_data(power):
    sizes = [1, 2, 5, 10, 30]
    assert growth.exponent(sizes, [3e-3 * size**power for size in sizes]) == pytest.approx(
        power, abs=1e-9
    )


# --- what is written ---


@pytest.fixture
def result() -> dict:
    """A small one, of one part."""
    samples = {standard.OURS: turns(1) | {stages.FIRST: [0.03] * 40, stages.PER_TOKEN: [1e-3] * 40}}
    samples[standard.OURS][stages.ANSWER] = [sum(SECONDS.values()) * 1.01] * 40
    samples[standard.ALONE] = {"encoder": [0.015] * 40, "kernel": [1e-3] * 40}
    samples[standard.THREADED] = {stages.ANSWER: [0.03] * 40, "kernel": [1e-3] * 40}
    inference = {
        "audio_s": 2.0,
        "samples": 32_000,
        "features": 50,
        "prompt_positions": 20,
        "answer_tokens": 6,
        "unexplained": 0.01,
        "summary": {side: harness.summary(taken) for side, taken in samples.items()},
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


def test_a_result_has_its_form(result, tmp_path):
    path = tmp_path / f"{results.machine_name(result['machine'])}.json"
    assert path.name == "intel-xeon-processor-2-cores.json"
    results.write(path, result)
    assert results.read(path) == result
    tables.write(path, result)
    report = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| unexplained |  | 1.0% |" in report
    assert (
        path.with_name("intel-xeon-processor-2-cores-inference.png")
        .read_bytes()
        .startswith(b"\x89PNG")
    )


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
def test_another_form_is_refused(result, change, fault):
    change(result)
    assert fault in results.faults(result, results.FORM)
    with pytest.raises(DataError, match="measure again"):
        results.check(result, "a.json")


def test_a_regression_is_the_commands_exit_status(result, tmp_path, run_cli):
    slower = json.loads(json.dumps(result))
    slower["parts"]["inference"]["timings"][standard.OURS] = turns(2, slow={"encoder": 1.3})
    for name, one in (("a", result), ("b", slower)):
        results.write(tmp_path / f"{name}.json", one)
    same, worse = (
        run_cli("bench", "diff", tmp_path / "a.json", tmp_path / f"{b}.json", "--json")
        for b in "ab"
    )
    assert (same.status, same.document["regressions"]) == (0, [])
    assert (worse.status, worse.document["regressions"]) == (1, ["encoder"])


def test_results_of_two_machines_are_not_compared(result):
    other = result | {"machine": result["machine"] | {"cores": 8}}
    with pytest.raises(DataError, match="two machines"):
        diff.compare(result, other)


def test_the_parts_have_their_tables(run_cli):
    assert tuple(standard.PARTS) == command.NAMES
    assert set(standard.PARTS) == set(tables.TABLES) == {name.rstrip("?") for name in results.PARTS}
    assert run_cli("bench", "speed").status == 2
    assert "no STAGE=FACTOR" in run_cli("bench", "inference", "--slow", "encoder").stderr
