"""The paper's evaluation is set up as the paper and its artifact say. Its results are not tested: the command prints them."""

import pytest

from stallfree.papers import sarathi_serve as paper


def test_every_deployment_of_the_paper_fits_its_devices():
    capacities = paper.Capacities()
    assert 4 * 2 * 2 * 3 == len(capacities.simulators)
    assert {8192, 16384} == {simulator.instance.capacity.max_model_len for simulator in capacities.simulators.values()}
    orca = capacities.simulators["llama2-70b arxiv strict orca"]
    assert (8, 2) == (orca.limits.max_seqs, orca.instance.capacity.depth)
    assert 1536 == capacities.simulators["llama2-70b openchat relaxed sarathi"].deployment.token_budget


def test_chunks_cost_less_the_larger_they_are():
    """And less than a long prompt at once: attention of the time computed the masked half too, and chunks skip most of it."""
    rows = {(row["prompt tokens"], row["chunk"]): row["in chunks / whole"] for row in paper.chunking("eager-2024")}
    for tokens in paper.CHUNKING:
        small, middle, large = (rows[tokens, chunk] for chunk in paper.CHUNKS)
        assert small > middle > large
    assert rows[2047, 512] > 1 > rows[16383, 2048]
    assert rows[8191, 512] == pytest.approx(1.117, rel=0.25)


def test_each_technique_of_the_ablation_does_what_it_is_for():
    rows = {(row["dataset"], row["policy"]): row for row in paper.ablation()}
    for dataset in paper.LIMITS:
        hybrid, chunked, both = (rows[dataset, policy] for policy in ("hybrid-only", "chunked-only", "sarathi"))
        assert hybrid["TBT p99, s"] > 2 * both["TBT p99, s"]
        assert chunked["TTFT p50, s"] > both["TTFT p50, s"] > hybrid["TTFT p50, s"]
