"""Clients in a closed loop keep their number of requests under way, and send the next when the last has ended."""

import pytest

from stallfree.sim.closed import closed_loop
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Simulator

DEPLOYMENT = Deployment("llama3-8b", "h100", policy="vllm-v1", max_model_len=4096)


def test_each_client_sends_its_next_request_when_the_last_has_ended():
    lines = closed_loop(Simulator(DEPLOYMENT), [(100, 20)] * 12, 3)
    assert 12 == len(lines)
    assert [20] * 12 == [len(line.tokens) for line in lines]
    ends = [line.tokens[-1] for line in lines]
    assert [0.0] * 3 + sorted(ends)[:9] == sorted(line.arrival for line in lines)


def test_no_more_than_the_clients_requests_run_at_once():
    lines = closed_loop(Simulator(DEPLOYMENT), [(50 + 40 * k, 5 + 7 * (k % 4)) for k in range(40)], 4)
    moments = sorted([(line.arrival, 1) for line in lines] + [(line.tokens[-1], -1) for line in lines])
    under_way, most = 0, 0
    for _, change in moments:
        under_way += change
        most = max(most, under_way)
    assert 4 == most


def test_a_lone_client_waits_for_the_front_end_and_its_prompt():
    simulator = Simulator(DEPLOYMENT)
    (line,) = closed_loop(simulator, [(512, 2)], 1)
    cost = simulator.instance.cost
    assert simulator.instance.front_s + cost.seconds([(0, 512)]) == pytest.approx(line.ttft)
    assert cost.seconds([(512, 1)]) == pytest.approx(line.gaps[0])


def test_a_request_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="can never be served"):
        closed_loop(Simulator(DEPLOYMENT), [(5000, 2)], 1)


def test_many_clients_that_end_at_the_same_moment_go_on():
    lines = closed_loop(Simulator(DEPLOYMENT), [(32, 2)] * 500, 128)
    assert 500 == len(lines)
    assert sorted(line.arrival for line in lines)[:128] == [0.0] * 128
