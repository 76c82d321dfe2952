"""From a checked body to the engine's requests: prompts become token ids, and fields left out get their defaults.

What depends on the model (vocabulary, context, chat template) is checked here or by the scheduler; what does not, in `schema`.
"""

import asyncio
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.datastructures import Headers

from stallfree.core.request import Refused, Request
from stallfree.core.slo import Slo, Target
from stallfree.engine.engine import Engine
from stallfree.engine.text import Text, TextError
from stallfree.server.errors import ApiError, path, shown
from stallfree.server.schema import LEAST_TARGET_MS, MOST_TARGET_MS, ChatRequest, CompletionRequest, Generation, Message

T = TypeVar("T")

COMPLETION_TOKENS = 16
"""OpenAI's default `max_tokens` for completions; a chat's is all that fits."""

TARGET_HEADERS = ("x-slo", "x-llm-d-slo")
"""Beginnings of the headers with a request's latency targets: this server's, and those of llm-d's gateway."""

LONG_TEXT = 10_000
"""Characters from which prompts are tokenised in a thread: it takes milliseconds, in which no stream could move."""


async def encode(text: Text, string: str, *, special: bool = True, control: bool = True) -> list[int]:
    return await _run(len(string), partial(text.encode, string, special=special, control=control))


async def conversation(
    text: Text, messages: Sequence[Message], *, generation_prompt: bool = True, control: bool = True
) -> list[int]:
    """Token ids of `messages` through the model's template; without `control` only its own control tokens are any. TextError if it
    refuses them, ApiError for content that is no text, and for tokens that the model does not have.
    """
    plain = [_plain(i, message) for i, message in enumerate(messages)]
    length = sum(len(message["content"]) for message in plain)
    ids = await _run(length, partial(text.chat, plain, generation_prompt=generation_prompt, control=control))
    check_ids(ids, text, "messages", given=False)
    return ids


async def prompts(text: Text, body: CompletionRequest, most: int, *, control: bool = True) -> list[tuple[list[int], str]]:
    """The token ids of each prompt, in which control tokens are recognised if `control`, and its text if it is to be echoed.

    ApiError for token ids, given or of a text, that the model does not have, and for prompts that make more than `most` choices.
    """
    given: Any = body.prompt
    several: list[Any] = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given
    if len(several) * (body.n or 1) > most:
        message = f"{len(several)} prompts and n = {body.n or 1} make more choices than the queue holds ({most})"
        raise ApiError(400, message, param="prompt" if len(several) > most else "n")

    def encoded() -> list[tuple[list[int], str]]:
        names = ["prompt"] if several is not given else [path("prompt", at) for at in range(len(several))]
        return [_prompt(text, one, bool(body.echo), control, name) for name, one in zip(names, several, strict=True)]

    return await _run(sum(map(len, several)), encoded)


async def _run(length: int, work: Callable[[], T]) -> T:
    return work() if length < LONG_TEXT else await asyncio.to_thread(work)


def _prompt(text: Text, given: str | list[int], echo: bool, control: bool, name: str) -> tuple[list[int], str]:
    try:
        ids = text.encode(given, control=control) if isinstance(given, str) else given
    except TextError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None
    check_ids(ids, text, name, given=not isinstance(given, str))
    return ids, (given if isinstance(given, str) else text.decode(given)) if echo else ""


def _plain(index: int, message: Message) -> dict[str, str]:
    content = message.content
    if content is None:
        if message.role != "assistant":
            where = path("messages", index, "content")
            raise ApiError(400, f"{where} is missing; only an assistant's may be null", param=where)
        content = ""
    elif not isinstance(content, str):
        for at, part in enumerate(content):
            where = path("messages", index, "content", at)
            if part.type != "text":
                why = f"{where}.type is {shown(part.type)}; this server takes text only"
                raise ApiError(400, why, param=f"{where}.type")
            if part.text is None:
                raise ApiError(400, f"{where}.text is missing", param=f"{where}.text")
        content = "\n".join(str(part.text) for part in content)
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    return plain if message.name is None else plain | {"name": message.name}


def check_ids(ids: Sequence[int], text: Text, field: str, *, given: bool = True) -> None:
    """ApiError for an id that the model does not have, though its tokenizer may. `given`: by the client, not made of a text."""
    if (wrong := text.lacks(ids)) is not None:
        where = path(field, str(wrong) if field == "logit_bias" else ids.index(wrong)) if given else field
        name = f" ({shown(token)})" if (token := text.pieces.token(wrong)) else ""
        message = f"{where}: token id {shown(wrong)}{name} is outside the vocabulary (0 to {text.vocab_size - 1})"
        raise ApiError(400, message, param=where)


def targets(body: Generation, headers: Headers, default: Slo) -> Slo | None:
    """The latency targets of this request alone, from `slo` and from headers; None without any. They are held to the percentiles
    of `default`. ApiError, naming the place, for what is no time, and for two that contradict each other.
    """
    given: dict[str, tuple[float, str]] = {}
    for name in ("ttft", "tbt", "tpot"):
        own = None if body.slo is None else getattr(body.slo, f"{name}_ms")
        found = [] if own is None else [(float(own), f"slo.{name}_ms")]
        for header in (f"{prefix}-{name}-ms" for prefix in TARGET_HEADERS):
            found += [(_milliseconds(value, header), header) for value in headers.getlist(header)]
        for value, place in found:
            first, where = given.setdefault(name, (value, place))
            if value != first:
                raise ApiError(
                    400, f"{place} asks for {name} {value:g} ms, {where} for {first:g} ms; give one of them", param=place
                )
    if not given:
        return None
    if "tbt" in given and "tpot" in given:
        message = "tbt_ms and tpot_ms both say when the next token is due; give one of them"
        raise ApiError(400, message, param=given["tpot"][1])
    usual = {"ttft": default.ttft or Target(1, 90), "tbt": default.tbt or default.tpot or Target(1, 99)}
    usual["tpot"] = usual["tbt"]
    return Slo(**{name: Target(value / 1000, usual[name].percentile) for name, (value, _) in given.items()})


def _milliseconds(text: str, header: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text) or not LEAST_TARGET_MS <= float(text) <= MOST_TARGET_MS:
        limits = f"from {LEAST_TARGET_MS:g} to {MOST_TARGET_MS:,}"
        message = f"{header}: {shown(text)} is no number of milliseconds {limits}; write {header}: 100"
        raise ApiError(400, message, param=header)
    return float(text)


def requests(engine: Engine, body: Generation, prompts: Sequence[Sequence[int]], slo: Slo | None) -> list[Request]:
    """`n` requests for each of `prompts`, with targets `slo`; choice k of a prompt samples with `seed` + k. What the body leaves
    open of sampling is the engine's. ApiError for fields at odds.
    """
    n = 1 if body.n is None else body.n
    if body.best_of is not None and body.best_of != n:
        raise ApiError(400, f"best_of is {body.best_of}; it is supported only as equal to n ({n})", param="best_of")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is for streams only; set stream to true", param="stream_options")
    max_tokens, field = _max_tokens(body)
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise ApiError(400, f"min_tokens ({min_tokens}) is more than {field} ({max_tokens})", param="min_tokens")
    check_ids(body.stop_token_ids or [], engine.text, "stop_token_ids")
    stop_ids = frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else engine.text.eos_ids)
    given = {
        name: value
        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    given |= {"logit_bias": _logit_bias(body.logit_bias or {}, engine.text), "logprobs": _logprobs(body)}
    given |= {"min_tokens": min_tokens, "stop_ids": stop_ids} | ({} if body.top_k is None else {"top_k": max(0, body.top_k)})
    seed = secrets.randbits(48) if body.seed is None else body.seed
    samplings = [replace(engine.sampling, seed=seed + k, **given) for k in range(n)]
    arrival = engine.clock()
    made = []
    for prompt in prompts:
        room = max(1, engine.scheduler.max_len - len(prompt))
        default = min(COMPLETION_TOKENS, room) if isinstance(body, CompletionRequest) else room
        for sampling in samplings:
            made.append(
                Request(
                    secrets.token_hex(12),
                    prompt,
                    max_tokens or default,
                    stop_ids=stop_ids,
                    min_tokens=min_tokens,
                    arrival=arrival,
                    priority=body.priority or 0,
                    tenant=body.user or "",
                    slo=slo,
                    sampling=sampling,
                )
            )
    return made


def stops(body: Generation) -> tuple[str, ...]:
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())


def refused(refusal: Refused, body: Generation, prompts: Sequence[Sequence[int]]) -> ApiError:
    """The scheduler's refusal in the words of the body, which may say `messages` where the scheduler says `prompt`."""
    code = "context_length_exceeded" if refusal.field == "prompt" and all(prompts) else None
    field = refusal.field
    if isinstance(body, ChatRequest):
        field = {"prompt": "messages", "max_tokens": _max_tokens(body)[1]}.get(field, field)
    return ApiError(400, str(refusal), param=field, code=code)


def _max_tokens(body: Generation) -> tuple[int | None, str]:
    """The limit, and the name of the field that set it."""
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
        return body.max_completion_tokens, "max_completion_tokens"
    return body.max_tokens, "max_tokens"


def _logprobs(body: Generation) -> int | None:
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return (body.top_logprobs or 0) if body.logprobs else None
    if isinstance(body, CompletionRequest):
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "logprobs with echo is not supported: a prompt has no log-probabilities here", param="logprobs")
        return body.logprobs
    return None


def _logit_bias(given: Mapping[str, float], text: Text) -> dict[int, float]:
    for key in given:
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise ApiError(400, f"logit_bias: {shown(key)} is not a token id", param=path("logit_bias", key))
    bias = {int(key): value for key, value in given.items()}
    check_ids(list(bias), text, "logit_bias")
    return bias
