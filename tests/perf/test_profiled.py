"""DistServe's formulas, from a file as it writes them."""

import json

import pytest

from stallfree.perf.profiled import Profiled

TOLD = {
    "prefill": [10.0, 0.1, 1e-5],
    "decoding_smallbs": [20.0, 0.001, 0.05],
    "decoding_largebs": [8.0, 0.001, 0.2],
    "decoding_large_small_bs_threshold": 95,
}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "engine.json").write_text(json.dumps({"facebook/opt-13b": {"1": TOLD}}))
    return tmp_path / "engine.json"


def test_prompts_and_decodes_take_what_the_formulas_say(file):
    engine = Profiled(file, "opt-13b", 1)
    assert 0.070 == pytest.approx(engine.seconds([(0, 300), (0, 200)]) + 0.010 - 1e-5 * (300**2 + 200**2) / 1000)
    assert (20 + 0.001 * 5000 + 0.05 * 10) / 1000 == pytest.approx(engine.seconds([(500, 1)] * 10))
    assert (8 + 0.001 * 100 * 100 + 0.2 * 100) / 1000 == pytest.approx(engine.seconds([(100, 1)] * 100))


def test_chunks_of_a_prompt_add_up_to_it_but_for_what_each_iteration_takes(file):
    engine = Profiled(file, "opt-13b", 1)
    chunks = sum(engine.seconds([(start, 500)]) for start in (0, 500, 1000))
    assert engine.seconds([(0, 1500)]) + 2 * 0.010 == pytest.approx(chunks)


def test_both_together_take_the_larger_constant_once(file):
    engine = Profiled(file, "opt-13b", 1)
    both = engine.seconds([(500, 1)] * 10 + [(0, 500)])
    assert engine.seconds([(500, 1)] * 10) + engine.seconds([(0, 500)]) - 0.010 == pytest.approx(both)


@pytest.mark.parametrize(
    ("model", "tp", "says"),
    [
        ("opt-66b", 1, "it has no opt-66b .did you mean 'opt-13b'"),
        ("opt-13b", 8, "it has opt-13b at TP 1, not at 8"),
    ],
)
def test_what_is_not_in_the_file_is_said(file, model, tp, says):
    with pytest.raises(ValueError, match=says):
        Profiled(file, model, tp)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("[]", "no DistServe profile"),
        (json.dumps({"a/opt-13b": {"1": {}}}), "no DistServe profile: KeyError"),
        (json.dumps({"a/opt-13b": {"1": TOLD | {"prefill": [1, 2]}}}), "three coefficients"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_none_is_said(tmp_path, text, says):
    file = tmp_path / "engine.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=says):
        Profiled(file, "opt-13b", 1)
