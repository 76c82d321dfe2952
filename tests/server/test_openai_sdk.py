"""The OpenAI Python SDK against a live server: its requests are accepted, and it can read the answers."""

import asyncio

import openai
import pytest


@pytest.fixture(scope="module")
def sdk(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


HELLO = [{"role": "user", "content": "hello"}]


def test_a_chat_is_answered(sdk):
    answer = sdk.chat.completions.create(model="toy", messages=HELLO, max_completion_tokens=4)
    assert "length" == answer.choices[0].finish_reason
    assert 4 == len(answer.choices[0].message.content)
    assert (12, 4, 16) == (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)


def test_a_streamed_chat_says_the_same_as_a_whole_one(sdk):
    whole = sdk.chat.completions.create(model="toy", messages=HELLO, max_tokens=30)
    chunks = list(sdk.chat.completions.create(model="toy", messages=HELLO, max_tokens=30, stream=True))
    assert whole.choices[0].message.content == "".join(c.choices[0].delta.content or "" for c in chunks)
    assert "assistant" == chunks[0].choices[0].delta.role
    assert [None] * (len(chunks) - 1) + ["length"] == [c.choices[0].finish_reason for c in chunks]


def test_the_usage_comes_in_a_last_chunk_of_its_own(sdk):
    chunks = list(
        sdk.chat.completions.create(model="toy", messages=HELLO, max_tokens=5, stream=True, stream_options={"include_usage": True})
    )
    assert ([], 5) == (chunks[-1].choices, chunks[-1].usage.completion_tokens)
    assert {None} == {c.usage for c in chunks[:-1]}


def test_continuous_usage_counts_up(sdk):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(sdk.chat.completions.create(model="toy", messages=HELLO, max_tokens=3, stream=True, stream_options=options))
    assert [0, 1, 2, 3, 3, 3] == [c.usage.completion_tokens for c in chunks]


def test_many_prompts_and_n_make_choices_in_order(sdk):
    answer = sdk.completions.create(model="toy", prompt=["abc", "mnop"], n=2, max_tokens=2, echo=True)
    assert ["abcde", "abcde", "mnopef", "mnopef"] == [c.text for c in answer.choices]
    assert [0, 1, 2, 3] == [c.index for c in answer.choices]
    assert (7, 8) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)


def test_a_prompt_may_be_token_ids(sdk, server):
    ids = server.engine.text.encode("abc")
    texts = [sdk.completions.create(model="toy", prompt=p, max_tokens=3).choices[0].text for p in ("abc", ids, [ids])]
    assert 1 == len(set(texts))


def test_streamed_choices_carry_their_index(sdk):
    texts = {0: "", 1: ""}
    for chunk in sdk.completions.create(model="toy", prompt=["ab", "xyz"], max_tokens=4, stream=True, echo=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert {0: "abcdef", 1: "xyzdefg"} == texts


def test_completions_end_after_16_tokens_unless_told_otherwise(sdk):
    assert 16 == sdk.completions.create(model="toy", prompt="a").usage.completion_tokens


def test_chats_go_on_to_the_end_of_the_context(sdk):
    assert 2048 == sdk.chat.completions.create(model="toy", messages=HELLO).usage.total_tokens


def test_a_stop_string_ends_the_text_before_it(sdk):
    choice = sdk.completions.create(model="toy", prompt="a", stop=["ef", "zz"]).choices[0]
    assert ("bcd", "stop", "ef") == (choice.text, choice.finish_reason, choice.stop_reason)


def test_a_stop_string_may_be_included(sdk):
    body = {"include_stop_str_in_output": True}
    assert "bcdef" == sdk.completions.create(model="toy", prompt="a", stop="ef", extra_body=body).choices[0].text


def test_a_stop_token_ends_the_text_but_not_before_min_tokens(sdk, server):
    (stop,) = server.engine.text.encode("d")
    early = sdk.completions.create(model="toy", prompt="a", extra_body={"stop_token_ids": [stop]})
    late = sdk.completions.create(model="toy", prompt="a", max_tokens=40, extra_body={"stop_token_ids": [stop], "min_tokens": 10})
    assert ("bc", 3) == (early.choices[0].text, early.usage.completion_tokens)
    assert 30 == late.usage.completion_tokens


def test_chat_logprobs_have_pieces_bytes_and_alternatives(sdk):
    answer = sdk.chat.completions.create(model="toy", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert answer.choices[0].message.content == "".join(row.token for row in content)
    assert [[-0.5, -1.5]] * 3 == [[top.logprob for top in row.top_logprobs] for row in content]
    assert content[0].token.encode() == bytes(content[0].bytes)


def test_completion_logprobs_have_offsets_into_the_text(sdk):
    choice = sdk.completions.create(model="toy", prompt="a", max_tokens=3, logprobs=1).choices[0]
    assert (["b", "c", "d"], [0, 1, 2], [-0.5] * 3) == (
        choice.logprobs.tokens,
        choice.logprobs.text_offset,
        choice.logprobs.token_logprobs,
    )
    assert {"b": -0.5} == choice.logprobs.top_logprobs[0]


def test_streamed_logprobs_are_those_of_the_whole(sdk):
    whole = sdk.completions.create(model="toy", prompt="a", max_tokens=6, logprobs=2).choices[0].logprobs
    chunks = sdk.completions.create(model="toy", prompt="a", max_tokens=6, logprobs=2, stream=True)
    parts = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert whole.text_offset == [offset for part in parts for offset in part.text_offset]
    assert whole.tokens == [token for part in parts for token in part.tokens]


def test_content_may_come_in_parts_of_text(sdk):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    usages = [
        sdk.chat.completions.create(model="toy", messages=[{"role": "user", "content": content}], max_tokens=1).usage
        for content in (parts, "one\ntwo")
    ]
    assert usages[0].prompt_tokens == usages[1].prompt_tokens


def test_the_served_model_is_listed(sdk):
    assert ["toy"] == [model.id for model in sdk.models.list()]
    assert 2048 == sdk.models.retrieve("toy").max_model_len


def test_errors_arrive_as_the_exceptions_they_are(sdk):
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(model="other", messages=HELLO)
    assert ("model_not_found", "model") == (unknown.value.code, unknown.value.param)
    with pytest.raises(openai.BadRequestError, match="functions is not supported"):
        sdk.chat.completions.create(model="toy", messages=HELLO, functions=[{"name": "f"}])


def test_the_asynchronous_client_streams(server):
    async def streamed() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(model="toy", messages=HELLO, max_tokens=7, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert 7 == len(asyncio.run(streamed()))
