"""Bytes on shared ports: none is lost, no port exceeds its bandwidth, and a single flow is as fast as arithmetic says."""

from math import inf

import hypothesis.strategies as st
import pytest
from hypothesis import given

from stallfree.perf import links, shape
from stallfree.sim.fabric import Fabric, Port


def run(fabric: Fabric) -> None:
    while fabric.due < inf:
        fabric.run()


def test_4096_tokens_of_llama2_70b_over_200_gbit_s():
    model = shape.Sharded(shape.load("llama2-70b"), 1, 1, "fp16", "fp16")
    assert 0.328e6 == pytest.approx(model.kv_bytes_per_token, rel=0.01)
    ended = []
    fabric = Fabric()
    fabric.send(4096 * model.kv_bytes_per_token, (Port(links.load("ib-200g").bandwidth),), 0.0, ended.append)
    run(fabric)
    assert [0.0537] == pytest.approx(ended, rel=0.01)


def test_two_at_a_time_share_and_the_rest_of_the_longer_one_is_alone():
    ended = {}
    fabric, port = Fabric(), Port(100.0)
    fabric.send(100, (port,), 0.0, lambda now: ended.setdefault("short", now))
    fabric.send(300, (port,), 0.0, lambda now: ended.setdefault("long", now))
    run(fabric)
    assert {"short": 2.0, "long": 4.0} == pytest.approx(ended)


def test_a_flow_is_as_fast_as_its_fullest_port():
    ended = []
    fabric, wide, narrow = Fabric(), Port(100.0), Port(10.0)
    fabric.send(100, (wide, narrow), 1.0, ended.append)
    run(fabric)
    assert [11.0] == pytest.approx(ended)


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0, 1000), st.integers(0, 2), st.integers(0, 2)),
        min_size=1,
        max_size=25,
    )
)
def test_contention_conserves_bytes(flows):
    out, into = [Port(10.0), Port(20.0), Port(5.0)], [Port(8.0), Port(40.0), Port(15.0)]
    fabric = Fabric()
    ends = []
    for begin, size, a, b in flows:
        fabric.send(size, (out[a], into[b]), begin, lambda now, begin=begin, size=size: ends.append((begin, size, now)))
    run(fabric)
    assert len(flows) == len(ends)
    assert sorted((begin, size) for begin, size, _, _ in flows) == sorted((begin, size) for begin, size, _ in ends)
    total = sum(size for _, size, _, _ in flows)
    for ports in (out, into):
        assert total == pytest.approx(sum(port.moved for port in ports), abs=1e-6)
    for number, port in enumerate(out):
        own = [(begin, size) for begin, size, a, _ in flows if a == number]
        assert sum(size for _, size in own) == pytest.approx(port.moved, abs=1e-6)
    last, first = max(now for _, _, now in ends), min(begin for begin, _, _ in ends)
    assert all(port.moved <= port.bandwidth * (last - first) + 1e-6 for port in (*out, *into))
    assert all(port.flows == 0 for port in (*out, *into))
