"""The `slo` policy steers vLLM's real schedulers: streams stay in time, budgets follow the target, and all else is vLLM's."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from stallfree.core.slo import Slo as Targets
from stallfree.engine.recording import load
from stallfree.perf.fitted import Fitted
from stallfree.policies.slo import Slo
from stallfree.sim.replay import Machine, what_if
from stallfree.vllm import SloScheduler, pacer
from tests.vllm.connector import ELSEWHERE
from tests.vllm.real import BLOCK, LONGEST, Runner, model_folder, request, scheduler

COST = Fitted((0.005, 0.01, 0.002, 0.002, 0.005, 0.0))
"""5 ms an iteration and 0.1 ms a token."""


@pytest.fixture
def folder(tmp_path) -> Path:
    return model_folder(tmp_path)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def ahead(request) -> bool:
    return request.param


def paced(folder: Path, slo: str = "tbt=30ms", **options) -> tuple[object, Runner]:
    """A scheduler with the policy, whose clock is the runner's."""
    made = scheduler(SloScheduler, folder, **options)
    runner = Runner(made, COST.seconds)
    made.pacer.policy = Slo(slo, Fitted.from_state(COST.state()))
    made.pacer._clock = runner.clock
    return made, runner


def serve(made, runner: Runner, requests, most: int = 20_000) -> None:
    """Run `requests`, (at, request), until all have ended."""
    left = sorted(requests, key=lambda pair: pair[0])
    for _ in range(most):
        while left and left[0][0] <= runner.now:
            made.add_request(left.pop(0)[1])
        if runner.idle:
            if not left:
                runner.step()  # vLLM tells the model runner of the last to end
                return
            runner.now = left[0][0]
            continue
        runner.step()
    raise AssertionError(f"{len(made.requests)} requests have not ended")


def load_of(seed: int, number: int, rate: float) -> list:
    rng, at, requests = random.Random(seed), 0.0, []
    for i in range(number):
        at += rng.expovariate(rate)
        length = rng.choice([20, 60, 150, 300, 1500])
        requests.append((at, request(f"r{i}", [rng.randrange(40_000) for _ in range(length)], rng.randint(1, 60))))
    return requests


def test_every_request_gets_its_tokens(folder, ahead):
    made, runner = paced(folder, ahead=ahead)
    requests = load_of(1, 120, 12.0)
    serve(made, runner, requests)
    assert all(len(r.output_token_ids) == r.max_tokens for _, r in requests)
    assert all(list(r.output_token_ids) == list(range(r.num_prompt_tokens, r.num_tokens)) for _, r in requests)
    assert made.kv_cache_manager.usage == 0
    assert not made.pacer._views


def test_streams_are_in_time_beside_long_prompts(folder, ahead):
    made, runner = paced(folder, ahead=ahead, tokens=4096)
    serve(made, runner, load_of(2, 200, 10.0))
    gaps = [b - a for times in runner.times.values() for a, b in pairwise(times)]
    late = sum(gap > 0.030 for gap in gaps)
    assert late <= 0.01 * len(gaps)
    assert max(sum(shape.values()) for shape in runner.shapes) > 200  # and prompts still come in large chunks


def test_nobody_is_left_out_while_kv_lasts(folder, ahead):
    made, runner = paced(folder, ahead=ahead)
    serve(made, runner, load_of(3, 80, 20.0))
    for id, times in runner.times.items():
        assert max((b - a for a, b in pairwise(times)), default=0) < 0.2, id


def test_the_budget_is_only_a_limit_above(folder):
    made, runner = paced(folder, "tbt=1s", tokens=128, seqs=16)
    serve(made, runner, load_of(4, 30, 20.0))
    assert max(sum(shape.values()) for shape in runner.shapes) == 128


def test_a_waiting_request_may_come_before_a_long_prompt_that_runs(folder, ahead):
    made, runner = paced(folder, ahead=ahead)
    made.add_request(request("stream", range(40), 500))
    while not runner.times.get("stream"):
        runner.step()
    made.add_request(request("long", range(100, 4000), 2))
    for _ in range(5):
        runner.step()
    made.add_request(request("short", range(5000, 5060), 2))
    while not runner.times.get("short"):
        runner.step()
    assert "long" not in runner.times
    assert made.requests["long"].num_computed_tokens > 0


def test_priority_queues_keep_their_order(folder):
    made, runner = paced(folder, queue="priority", seqs=2)
    requests = [(0.0, request(f"p{p}", range(1000 * p, 1000 * p + 50), 3, arrival=p, priority=-p)) for p in range(6)]
    serve(made, runner, requests)
    first = {id: times[0] for id, times in runner.times.items()}
    assert sorted(first, key=lambda id: (first[id], id)) == ["p4", "p5", "p2", "p3", "p0", "p1"]


def test_cached_tokens_are_priced_as_cached(folder):
    made, runner = paced(folder, caching=True, tokens=4096)
    prompt = list(range(2000))
    serve(made, runner, [(0.0, request("first", prompt, 2))])
    made.add_request(request("stream", range(10_000, 10_040), 400))
    for _ in range(4):
        runner.step()
    made.add_request(request("again", [*prompt, *range(30_000, 30_050)], 2))
    runner.step()
    at = runner.shapes[-1]
    assert at["again"] == 2050 - 2000 // BLOCK * BLOCK  # all that is left of it fits beside the stream


def test_kv_runs_out_and_nobody_is_lost(folder, ahead):
    made, runner = paced(folder, ahead=ahead, blocks=130)
    requests = load_of(5, 60, 40.0)
    serve(made, runner, requests)
    assert all(len(r.output_token_ids) == r.max_tokens for _, r in requests)
    assert sum(r.num_preemptions for _, r in requests) > 0
    assert made.kv_cache_manager.usage == 0


def test_aborted_requests_are_forgotten(folder, ahead):
    made, runner = paced(folder, ahead=ahead)
    rng = random.Random(6)
    for i in range(60):
        made.add_request(request(f"r{i}", range(100 * i, 100 * i + 80), 30))
        runner.step()
        if rng.random() < 0.5:
            made.finish_requests(f"r{rng.randint(0, i)}", RequestStatus.FINISHED_ABORTED)
    serve(made, runner, [])
    runner.step()
    assert not made.pacer._views
    assert made.kv_cache_manager.usage == 0


def test_a_request_that_waits_for_its_grammar_delays_nobody(folder):
    made, runner = paced(folder)
    slow = request("grammar", range(50), 3)
    slow.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    slow.structured_output_request = type("Pending", (), {"grammar": None, "reasoning_ended": None})()
    made.add_request(slow)
    made.add_request(request("plain", range(100, 150), 3))
    for _ in range(6):
        runner.step()
    assert len(runner.times["plain"]) == 3
    assert "grammar" not in runner.times
    assert made.requests["grammar"].status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR


def test_a_request_that_vllm_does_not_take_is_offered_again_later(folder, monkeypatch):
    made, runner = paced(folder)
    made.add_request(request("stream", range(40), 200))
    while not runner.times.get("stream"):
        runner.step()
    refuse = [True]
    real = made._handle_blocked_waiting_request
    monkeypatch.setattr(made, "_handle_blocked_waiting_request", lambda r: not (refuse[0] and r.request_id == "odd") and real(r))
    made.add_request(request("odd", range(100, 3000), 2))
    made.add_request(request("even", range(5000, 5100), 2))
    for _ in range(12):
        runner.step()
    assert "even" in runner.times
    refuse[0] = False
    for _ in range(60):
        runner.step()
    assert made.requests.get("odd") is None or made.requests["odd"].num_computed_tokens


def test_own_targets(folder, caplog):
    made, runner = paced(folder)
    good = {"words": "tbt=20ms", "mapping": {"ttft_ms": 500, "tbt_ms": 50}}
    bad = {
        "number": 7, "unit": "tbt=20", "name": {"tbb_ms": 5}, "text": {"tbt_ms": "x"}, "zero": {"tbt_ms": 0},
        "none": {"tbt_ms": None}, "nan": {"tbt_ms": float("nan")}, "both": {"tbt_ms": 5, "tpot_ms": 5}, "list": [1],
        "long": "tbt=20ms," * 100_000,
        "true": {"tbt_ms": True},
    }  # fmt: skip
    for name, slo in (good | bad).items():
        made.add_request(request(name, range(20), 2, slo=slo))
    runner.step()
    views = made.pacer._views
    assert {name for name in views if views[name].slo is not None} == set(good)
    assert views["mapping"].asked.tbt.seconds == 0.05
    assert 0.04 < views["mapping"].slo.tbt.seconds < 0.05  # some is left for the way to the client
    assert len([r for r in caplog.records if "ignored" in r.message]) == len(bad)
    serve(made, runner, [])


def test_the_records_explain_the_run(folder, tmp_path, monkeypatch, ahead):
    file = tmp_path / "run.jsonl"
    monkeypatch.setenv(pacer.RECORD, str(file))
    made, runner = paced(folder, ahead=ahead)
    requests = load_of(7, 30, 10.0)
    serve(made, runner, requests)
    made.shutdown()
    run, records = load(file)
    assert run.policy == "slo"
    tokens = sum(len(r.output_token_ids) for _, r in requests)
    assert sum(len(record.emitted) for record in records) == tokens
    assert sorted(a.id for record in records for a in record.arrived) == sorted(r.request_id for _, r in requests)
    assert {f.reason for record in records for f in record.finished} == {"length"}
    assert all(record.t_start <= record.t_end for record in records)


def test_what_cannot_be_served_so_is_refused_by_name(folder, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--pipeline-parallel-size 2"):
        scheduler(SloScheduler, folder, pipeline_parallel_size=2)
    monkeypatch.setenv(pacer.TARGETS, "tbt=100")
    with pytest.raises(ValueError, match="no unit"):
        scheduler(SloScheduler, folder)
    monkeypatch.setenv(pacer.TARGETS, "tbt=1us")
    with pytest.raises(ValueError, match="cannot be met: .* ask for at least about tbt="):
        scheduler(SloScheduler, folder)
    monkeypatch.setenv(pacer.TARGETS, "tbt=100ms")
    monkeypatch.setenv(pacer.RECORD, str(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(ValueError, match="cannot be written"):
        scheduler(SloScheduler, folder)


def test_no_target_of_a_request_ends_the_engine(folder, ahead):
    made, runner = paced(folder, ahead=ahead)
    words = ["tbt=0.01us", "tbt=1e-9us", "tbt=1e20s", "ttft=1e300s,tpot=1e-300s"]
    requests = [(0.0, request(f"r{i}", range(40 * i, 40 * i + 40), 6, slo=slo)) for i, slo in enumerate(words)]
    serve(made, runner, requests)
    assert all(len(r.output_token_ids) == 6 for _, r in requests)


def test_a_request_that_vllm_refused_once_is_not_lost_on_an_idle_engine(folder, monkeypatch):
    made, runner = paced(folder)
    refusals = [True]
    real = made._handle_blocked_waiting_request
    monkeypatch.setattr(made, "_handle_blocked_waiting_request", lambda r: not (refusals and refusals.pop()) and real(r))
    made.add_request(request("alone", range(50), 2))
    for _ in range(10):
        runner.step()
    assert len(runner.times["alone"]) == 2


def test_who_is_aborted_while_all_is_paused_is_forgotten(folder):
    made, runner = paced(folder)
    made.add_request(request("r", range(50), 50))
    runner.step()
    made.set_pause_state(PauseState.PAUSED_ALL)
    made.finish_requests("r", RequestStatus.FINISHED_ABORTED)
    made.schedule()
    made.set_pause_state(PauseState.UNPAUSED)
    assert not made.pacer._views


def test_waiting_requests_with_kv_and_without_a_share_stop_nobody(folder):
    made, runner = paced(folder)
    made.add_request(request("stream", range(40), 200))
    while not runner.times.get("stream"):
        runner.step()
    holder = request("holder", range(100, 4000), 2)
    made.add_request(holder)
    runner.step()
    made.running.remove(holder)
    holder.status = RequestStatus.PREEMPTED  # it waits, and has kept its KV
    made.kv_holding_waiting.add_request(holder)
    for i in range(4):
        made.add_request(request(f"w{i}", range(5000 + 100 * i, 5060 + 100 * i), 2))
    for _ in range(12):
        runner.step()
    assert all(f"w{i}" in runner.times for i in range(4))


@pytest.mark.parametrize(("option", "says"), [({"chunked": False}, "--no-enable-chunked-prefill")])
def test_prompts_that_must_stay_whole_are_refused(folder, option, says):
    with pytest.raises(ValueError, match=says):
        scheduler(SloScheduler, folder, tokens=LONGEST, **option)


def test_a_prompt_whose_kv_comes_from_elsewhere_delays_nobody(folder, ahead):
    made, runner = paced(folder, ahead=ahead, connector=True)
    made.add_request(request("stream", range(40), 400))
    while not runner.times.get("stream"):
        runner.step()
    made.add_request(request("remote", range(5000, 6000), 3))
    made.add_request(request("short", range(7000, 7060), 3))
    for _ in range(12):
        runner.step()
    assert len(runner.times["short"]) == 3
    assert "remote" not in runner.times
    computed = len(runner.shapes)
    runner.received.add("remote")
    serve(made, runner, [])
    assert len(runner.times["remote"]) == 3
    assert sum(shape.get("remote", 0) for shape in runner.shapes[:computed]) == 0
    assert sum(shape.get("remote", 0) for shape in runner.shapes) == 1000 - ELSEWHERE + 2
    assert (made.kv_cache_manager.usage, made.pacer._views) == (0, {})


def test_the_same_requests_can_be_simulated_with_another_target(folder, tmp_path, monkeypatch, ahead):
    file = tmp_path / "run.jsonl"
    monkeypatch.setenv(pacer.RECORD, str(file))
    made, runner = paced(folder, ahead=ahead, caching=True)
    shared = list(range(600))
    serve(made, runner, [(0.5 * i, request(f"r{i}", [*shared, *range(1000 * i, 1000 * i + 50)], 20)) for i in range(1, 6)])
    made.shutdown()
    run, records = load(file)
    simulated = what_if(run, records, Machine(records, overlap=ahead), "slo", Targets.parse("tbt=60ms"), {})
    for steps in (records, simulated):
        assert sum(len(step.emitted) for step in steps) == 100
        assert [tokens for step in steps for _, tokens in step.cached] == [0] + 4 * [600 // BLOCK * BLOCK]
