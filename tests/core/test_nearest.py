"""An unknown name is taken to mean the most similar known one."""

import pytest

from stallfree.core.nearest import nearest
from stallfree.perf import hardware, links, shape
from stallfree.policies import names

DEVICES = [hardware.USUAL, *hardware.names()]


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("a100", DEVICES, "a100-80g"),
        ("A100", DEVICES, "a100-80g"),
        ("a100-80", DEVICES, "a100-80g"),
        ("a100-40", DEVICES, "a100-40g"),
        ("pcie", DEVICES, "a100-80g-pcie"),
        ("h10", DEVICES, "h100"),
        ("h100-80g", DEVICES, "h100"),
        ("h100-sxm", DEVICES, "h100"),
        ("l40", DEVICES, "l40s"),
        ("llama3", shape.names(), "llama3-8b"),
        ("yi", shape.names(), "yi-34b"),
        ("lama3-8b", shape.names(), "llama3-8b"),
        ("prefill", names(), "prefill-first"),
        ("saraty", names(), "sarathi"),
        ("eth-24g", links.names(), "eth-25g"),
    ],
)
def test_what_was_typed_is_found_in_a_known_name(name, known, expected):
    assert f" (did you mean {expected!r}?)" == nearest(name, known)


@pytest.mark.parametrize("name", ["", "x", "something else"])
def test_what_is_near_nothing_has_no_hint(name):
    assert "" == nearest(name, DEVICES)
