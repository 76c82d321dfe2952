"""Raw bodies into checked requests with token ids. Small bodies are read at once; large ones in processes of their own, so that
neither the event loop nor the interpreter's lock is held while somebody's long text is parsed, rendered and tokenised.

It knows the shapes of bodies and the model's text, and nothing of the engine.
"""

import asyncio
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, NamedTuple

from pydantic import ValidationError

from stallfree.engine.text import Text, TextError
from stallfree.executors.sampling import Bias
from stallfree.processes import follow_parent
from stallfree.server.errors import ApiError, of_validation, path, shown
from stallfree.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    Message,
    Prompt,
    TokenizeRequest,
    Tokens,
)

AnyBody = ChatRequest | CompletionRequest | TokenizeRequest | DetokenizeRequest
"""The bodies that are read."""

LARGE = 8192
"""Bytes of body from which a process reads it. Below, reading takes at most 2 ms; the way to the process and back takes 1 ms."""

PROCESSES = 2
"""So that one long text does not hold up the next."""

NICE = 10
"""Steps of priority below the model's threads: on a machine that is busy a long text gets a tenth of a core, not half of one."""


class Terms(NamedTuple):
    """What bodies are read by: the name of the `model` that is served; prompts of at most `max_len` - 1 tokens, at most
    `max_choices` choices; `sanitized`: whether control tokens that a client writes are text where its request does not say."""

    model: str
    max_len: int
    max_choices: int
    sanitized: bool


class Asked(NamedTuple):
    """A request for tokens: its `body` without prompts and biases; each prompt's token ids, with its text if that is to be echoed;
    and what is added to logits."""

    body: Generation
    prompts: list[tuple[list[int], str]]
    bias: Bias


class Reader:
    """Reads bodies for a model with `text`."""

    def __init__(self, text: Text, terms: Terms):
        self._text, self._terms = text, terms
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> None:
        """Begin to make the processes, which takes a second; without it, the first large body waits for that."""
        for _ in range(PROCESSES):
            self._processes().submit(os.getpid)

    async def read(self, kind: type[AnyBody], raw: bytes) -> Any:
        """As `read` does. ApiError, too, if the process that read a large body has died."""
        if len(raw) < LARGE:
            return read(self._text, self._terms, kind, raw)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._processes(), _read, kind, raw)
        except BrokenProcessPool:
            self.close()
            raise ApiError(500, "the process that read this body has died; try again, or with a smaller one") from None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that the engine's threads hold
            self._pool = ProcessPoolExecutor(PROCESSES, spawn, _settle, (self._text, self._terms))
        return self._pool


_settled: list[tuple[Text, Terms]] = []
"""In a process that reads: what it reads with."""


def _settle(text: Text, terms: Terms) -> None:
    follow_parent()
    with suppress(OSError):
        os.nice(NICE)
    _settled.append((text, terms))


def _read(kind: type[AnyBody], raw: bytes) -> Any:
    text, terms = _settled[0]
    return read(text, terms, kind, raw)


def read(text: Text, terms: Terms, kind: type[AnyBody], raw: bytes) -> Any:
    """What a `raw` body of that `kind` asks for: an `Asked`, or the answer, JSON, to a question about the text alone.

    Raises ApiError for what is no such body, for content that is no text, for token ids that the model does not have, and for
    prompts that are certain to be too long; TextError if the chat template refuses the messages.
    """
    body = _checked(kind, raw)
    check_model(body.model, terms.model)
    match body:
        case ChatRequest():
            control = _recognised(body.sanitize_control_tokens, terms)
            rendered = text.render(_plain(body.messages), control=control)
            _check_length(text, rendered, "messages", terms)
            ids = text.encode_rendered(rendered, control=control)
            check_ids(ids, text, "messages", given=False)
            return Asked(body.model_copy(update={"messages": [], "logit_bias": None}), [(ids, "")], _bias(body, text))
        case CompletionRequest():
            prompts = _prompts(text, body, terms)
            return Asked(body.model_copy(update={"prompt": "", "logit_bias": None}), prompts, _bias(body, text))
        case TokenizeRequest():
            ids = _tokens(text, body, terms)
            return Tokens(count=len(ids), max_model_len=terms.max_len, tokens=ids).model_dump_json().encode()
        case DetokenizeRequest():
            check_ids(body.tokens, text, "tokens")
            return Prompt(prompt=text.decode(body.tokens, skip_special=False)).model_dump_json().encode()


def _checked(kind: type[AnyBody], raw: bytes) -> AnyBody:
    try:
        values = json.loads(raw)
    except json.JSONDecodeError as error:
        if not raw.strip():
            raise ApiError(400, "the body is empty or not a JSON object", code="invalid_json") from None
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise ApiError(400, f"the body has a number of more than {most:,} digits", code="invalid_json") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=True)
        raise of_validation([{**each, "loc": ("body", *each["loc"])} for each in found], values) from None


def check_model(name: str | None, served: str) -> None:
    """ApiError for another model than the one that is `served`."""
    if name not in (None, served):
        raise ApiError(404, f"the model {shown(name)} is not served here; {served!r} is", param="model", code="model_not_found")


def _recognised(sanitized: bool | None, terms: Terms) -> bool:
    """Whether control tokens that the client has written are control tokens."""
    return not (terms.sanitized if sanitized is None else sanitized)


def _prompts(text: Text, body: CompletionRequest, terms: Terms) -> list[tuple[list[int], str]]:
    given: Any = body.prompt
    several: list[Any] = [given] if isinstance(given, str) or not given or isinstance(given[0], int) else given
    if len(several) * (body.n or 1) > terms.max_choices:
        message = f"{len(several)} prompts and n = {body.n or 1} make more choices than the queue holds ({terms.max_choices})"
        raise ApiError(400, message, param="prompt" if len(several) > terms.max_choices else "n")
    names = ["prompt"] if several is not given else [path("prompt", at) for at in range(len(several))]
    control = _recognised(body.sanitize_control_tokens, terms)
    return [_prompt(text, one, bool(body.echo), control, name, terms) for name, one in zip(names, several, strict=True)]


def _prompt(text: Text, given: str | list[int], echo: bool, control: bool, name: str, terms: Terms) -> tuple[list[int], str]:
    _check_length(text, given, name, terms)
    try:
        ids = text.encode(given, control=control) if isinstance(given, str) else given
    except TextError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None
    check_ids(ids, text, name, given=not isinstance(given, str))
    return ids, (given if isinstance(given, str) else text.decode(given)) if echo else ""


def _tokens(text: Text, body: TokenizeRequest, terms: Terms) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    control = _recognised(body.sanitize_control_tokens, terms)
    if body.prompt is not None:
        return text.encode(body.prompt, special=body.add_special_tokens is not False, control=control)
    rendered = text.render(_plain(body.messages or ()), generation_prompt=body.add_generation_prompt is not False, control=control)
    ids = text.encode_rendered(rendered, control=control)
    check_ids(ids, text, "messages", given=False)
    return ids


def _check_length(text: Text, given: str | Sequence[int], field: str, terms: Terms) -> None:
    """Refuses what is certain to be too long before time is spent on it; what only may be is found out when it is tokens."""
    if len(given) < terms.max_len:
        return
    least = text.least_tokens(given) if isinstance(given, str) else len(given)
    if least >= terms.max_len:
        number = f"at least {least}" if isinstance(given, str) else f"{least}"
        message = f"the prompt has {number} tokens; with room for one more, at most {terms.max_len - 1} fit"
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [_plain_one(index, message) for index, message in enumerate(messages)]


def _plain_one(index: int, message: Message) -> dict[str, str]:
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


def _bias(body: Generation, text: Text) -> Bias:
    given: Mapping[str, float] = body.logit_bias or {}
    for key in given:
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise ApiError(400, f"logit_bias: {shown(key)} is not a token id", param=path("logit_bias", key))
    bias = Bias({int(key): value for key, value in given.items()})
    check_ids(list(bias), text, "logit_bias")
    return bias


def check_ids(ids: Sequence[int], text: Text, field: str, *, given: bool = True) -> None:
    """ApiError for an id that the model does not have, though its tokenizer may. `given`: by the client, not made of a text."""
    if (wrong := text.lacks(ids)) is not None:
        where = path(field, str(wrong) if field == "logit_bias" else ids.index(wrong)) if given else field
        name = f" ({shown(token)})" if (token := text.pieces.token(wrong)) else ""
        message = f"{where}: token id {shown(wrong)}{name} is outside the vocabulary (0 to {text.vocab_size - 1})"
        raise ApiError(400, message, param=where)
