"""The engine for scripts, without a model: overlapping calls do not mix, and a refusal leaves nothing behind."""

import pytest

from stallfree import LLM
from stallfree.core.request import Refused


@pytest.fixture
def llm():
    with LLM(executor="simulated", max_model_len=64) as llm:
        yield llm


def test_streams_read_in_turn_get_each_their_own_text(llm):
    alone = ["".join(llm.stream(prompt, max_tokens=9)) for prompt in ("a", "bcd")]
    first, second = llm.stream("a", max_tokens=9), llm.stream("bcd", max_tokens=9)
    pairs = list(zip(first, second, strict=True))
    assert alone == ["".join(column) for column in zip(*pairs, strict=True)]


def test_a_completion_during_a_stream_disturbs_neither(llm):
    alone = "".join(llm.stream("a", max_tokens=9))
    stream = llm.stream("a", max_tokens=9)
    text = next(stream)
    assert 5 == len(llm.generate("bcd", max_tokens=5)[0].tokens)
    assert alone == text + "".join(stream)


def test_a_refused_prompt_takes_the_others_of_its_call_with_it_and_nothing_else(llm):
    with pytest.raises(Refused, match="prompt has 70 tokens"):
        llm.generate(["a", "b" * 70], max_tokens=5)
    assert not llm._engine.busy
    assert ["length"] == [done.finish_reason for done in llm.generate(["a"], max_tokens=5)]


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model with 160 embeddings and a tokenizer with more tokens."""
    from tests.engine.tokenizers import byte_level
    from tests.models import write_folder

    folder = tmp_path_factory.mktemp("padded")
    write_folder(folder, "llama")
    byte_level().save(str(folder / "tokenizer.json"))
    with LLM(str(folder), kv_memory=1 << 22) as llm:
        yield llm


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        ("!<think>", {}, "prompt"),
        ([1, 160], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"logit_bias": {160: 1.0}}, "logit_bias"),
        ([1], {"stop_ids": frozenset({200}), "min_tokens": 3}, "stop_ids"),
    ],
)
def test_tokens_that_the_model_lacks_are_refused(padded, prompt, sampling, field):
    with pytest.raises(Refused, match=f"{field}: .* outside the vocabulary") as caught:
        padded.generate([[1, 2, 3], prompt], max_tokens=2, **sampling)
    assert field == caught.value.field
    assert "length" == padded.generate([1, 2, 3], max_tokens=2, temperature=0)[0].finish_reason
