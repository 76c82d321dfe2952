"""A mix says whose requests are, and changes nothing else of them."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from stallfree.workload.mix import Mix, Part
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Workload

WORDS = "acme: 75% class=interactive; crawler: 20% class=batch priority=1"


def test_words_become_parts():
    parts = (Part("acme", 0.75, "interactive"), Part("crawler", 0.2, "batch", 1))
    assert parts == Mix.parse(WORDS).parts


def test_each_part_gets_its_share_and_nobody_the_rest():
    drawn = Workload.parse("poisson", "8/8", mix=WORDS).draw(1, 0, requests=4000)
    owners = Counter((a.tenant, a.service_class, a.priority) for a in drawn)
    assert {("acme", "interactive", 0), ("crawler", "batch", 1), ("", "", 0)} == owners.keys()
    assert pytest.approx([3000, 800, 200], rel=0.15) == [count for _, count in owners.most_common()]


def test_shares_that_were_rounded_leave_nobody_over():
    drawn = Workload.parse("poisson", "8/8", mix="a: 33.3%; b: 33.3%; c: 33.3%").draw(1, 0, requests=4000)
    assert {"a", "b", "c"} == {a.tenant for a in drawn}


def test_a_tenant_may_have_several_classes():
    workload = Workload.parse("poisson", "8/8", mix="acme: 50% class=interactive; acme: 50% class=batch")
    assert {"interactive", "batch"} == workload.classes
    assert {("acme", "interactive"), ("acme", "batch")} == {(a.tenant, a.service_class) for a in workload.draw(1, 0, requests=50)}


def test_arrivals_and_lengths_are_those_without_a_mix():
    plain = Traffic(lengths="median=100,p90=300/9 + 10%:900/9", rate=2, requests=50)
    mixed = replace(plain, mix=WORDS).draw()
    assert plain.draw() == [replace(a, tenant="", service_class="", priority=0) for a in mixed]


def test_a_trace_says_whose_its_requests_are(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens,tenant,class,priority\n5,6,acme,batch,1\n7,8,,,\n")
    workload = Workload.parse("poisson", str(path))
    drawn = workload.draw(1, 0, requests=20)
    assert {(5, "acme", "batch", 1), (7, "", "", 0)} == {(a.prompt_tokens, a.tenant, a.service_class, a.priority) for a in drawn}
    assert {"batch"} == workload.classes


def test_a_trace_that_says_it_takes_no_mix(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens,tenant\n5,6,acme\n")
    with pytest.raises(ValueError, match=r"x\.csv says itself whose its requests are"):
        Workload.parse("poisson", str(path), mix=WORDS)


def test_a_priority_in_a_trace_that_is_no_number_is_named_with_its_line(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("prompt_tokens,output_tokens,priority\n5,6,high\n")
    with pytest.raises(ValueError, match="line 2: priority is 'high'"):
        Workload.parse("poisson", str(path))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "the mix is empty"),
        ("acme", "'acme' is no part of a mix"),
        ("acme: 75", "'acme: 75' is no part"),
        (": 75%", "no part"),
        ("acme: 0%", "is 0 times the requests"),
        ("acme: 120%", "is 1.2 times the requests"),
        ("acme: 75%; b: 75%", "1.5 times the requests; make them 100 % or less"),
        ("acme: 75% klass=batch", "'klass=batch' in 'acme: 75% klass=batch' is not understood"),
        ("acme: 75% class=", "'class=' in"),
        ("acme: 75% class=a class=b", "'class=b' in"),
        ("acme: 75% priority=high", "priority 'high' in"),
    ],
)
def test_words_that_are_no_mix_are_named(words, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Mix.parse(words)
