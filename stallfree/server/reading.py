"""Reads raw bodies into checked queries with token ids. Small bodies are read at once, large ones in separate processes: parsing,
rendering and tokenising a long text must hold neither the event loop nor the interpreter's lock.

It knows the shapes of bodies and the model's text, and nothing of the engine.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from stallfree.engine.text import Text, TextError
from stallfree.executors.sampling import Bias
from stallfree.grammar.sources import Grammar
from stallfree.processes import Helpers, step_back
from stallfree.server.conversation import Conversation, Form, plain, structured
from stallfree.server.dialects.messages import CountRequest, Messages, MessagesRequest
from stallfree.server.dialects.responses import Responses, ResponsesRequest
from stallfree.server.errors import ApiError, of_validation, path, shown
from stallfree.server.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    Prompt,
    TokenizeRequest,
    Tokens,
)

AnyBody = ChatRequest | CompletionRequest | ResponsesRequest | MessagesRequest | CountRequest | TokenizeRequest | DetokenizeRequest
"""The bodies that are read."""

Checked = TypeVar("Checked", bound=BaseModel)

LARGE = 8192
"""Bytes from which a process reads a body. Reading a smaller one takes at most 2 ms; going through a process takes 1 ms."""

PROCESSES = 2
"""Processes that read large bodies: two, so that one long text does not delay the next."""

MOST_DEPTH = 200
"""Levels of lists and objects in a body. Libraries that walk through values give up at 255 and more."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""The escape of half a surrogate pair, the only way for one into JSON."""


class BodyLimits(NamedTuple):
    """Limits of bodies: at most `max_len` - 1 tokens a prompt, and `max_choices` choices. `sanitized`: whether control tokens that
    a client writes are read as text, unless its request says otherwise. `tool_format`: the name of the format of tool calls; None:
    the one that the template suits."""

    max_len: int
    max_choices: int
    sanitized: bool
    tool_format: str | None = None


LARGE_FIELDS: dict[str, None] = dict.fromkeys(
    ("logit_bias", "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
)
"""Fields that a query has in another form."""


class Query(NamedTuple):
    """A body that asks for tokens: the `body` without what may be large in it; each prompt's token ids, with its text if the answer
    echoes it; what is added to logits; the grammar that holds the answer; how its text is read; and what of the request the answer
    repeats."""

    body: Generation
    prompts: list[tuple[list[int], str]]
    bias: Bias
    grammar: Grammar | None = None
    form: Form = Form()
    echo: Mapping[str, Any] | None = None


class Reader:
    """Reads bodies for a model with `text`, within `limits`. `check`: raises ApiError for the name of a model that is not served;
    None stands for a body that names none."""

    def __init__(self, text: Text, limits: BodyLimits, check: Callable[[str | None], None]):
        self._text, self._limits, self._check = text, limits, check
        self._pool: Helpers | None = None

    def start(self) -> None:
        """Start the processes, which takes a second. Without this call, the first large body waits for them."""
        for _ in range(PROCESSES):
            self._processes().submit(os.getpid)

    async def read(self, kind: type[AnyBody], raw: bytes) -> Any:
        """As the function `read`, without the name. Also raises ApiError for a model that is not served, and if the process that
        read a large body has died."""
        if len(raw) < LARGE:
            model, answer = read(self._text, self._limits, kind, raw)
        else:
            try:
                model, answer = await asyncio.get_running_loop().run_in_executor(self._processes(), _read, kind, raw)
            except BrokenProcessPool:
                self.close()
                raise ApiError(500, "the process that read this body has died; try again, or with a smaller one") from None
        self._check(model)
        return answer

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _processes(self) -> Helpers:
        if self._pool is None:
            self._pool = Helpers(PROCESSES, _settle, self._text, self._limits)
        return self._pool


_settled: list[tuple[Text, BodyLimits]] = []
"""In a process that reads: the text and limits that it reads with."""


def _settle(text: Text, limits: BodyLimits) -> None:
    step_back()
    _settled.append((text, limits))


def _read(kind: type[AnyBody], raw: bytes) -> tuple[str | None, Any]:
    text, limits = _settled[0]
    return read(text, limits, kind, raw)


def read(text: Text, limits: BodyLimits, kind: type[AnyBody], raw: bytes) -> tuple[str | None, Any]:
    """Read a `raw` body of that `kind`. Returns the model that it names, and a `Query`, or the answer (JSON) to a question about
    text alone.

    Raises ApiError for another kind of body, for content that is no text, for token ids that the model does not have, and for
    prompts that are certain to be too long; TextError if the chat template refuses the messages.
    """
    body = checked(kind, raw)
    return body.model, _answered(text, body, limits)


def _answered(text: Text, body: AnyBody, limits: BodyLimits) -> Any:
    match body:
        case ChatRequest():
            return _chat(text, body, limits)
        case CompletionRequest():
            prompts, grammar = _prompts(text, body, limits), structured(body)
            return Query(body.model_copy(update={"prompt": "", **LARGE_FIELDS}), prompts, _bias(body, text), grammar)
        case ResponsesRequest():
            return _translated(text, body, limits, Responses.fields)._replace(echo=body.echo())
        case MessagesRequest():
            return _translated(text, body, limits, Messages.fields)
        case CountRequest():
            query = _translated(text, body, limits, Messages.fields)
            return json.dumps({"input_tokens": len(query.prompts[0][0])}).encode()
        case TokenizeRequest():
            ids = _tokens(text, body, limits)
            return Tokens(count=len(ids), max_model_len=limits.max_len, tokens=ids).model_dump_json().encode()
        case DetokenizeRequest():
            check_ids(body.tokens, text, "tokens")
            return Prompt(prompt=text.decode(body.tokens, skip_special=False)).model_dump_json().encode()


def _translated(text: Text, body: ResponsesRequest | CountRequest, limits: BodyLimits, fields: Mapping[str, str]) -> Query:
    """The query of a body that is translated into a chat. Errors have the body's own names of `fields`."""
    chat = body.chat()
    try:
        return _chat(text, chat, limits)
    except ApiError as error:
        raise error.renamed(fields) from None


def _chat(text: Text, body: ChatRequest, limits: BodyLimits) -> Query:
    control = _recognised(body.sanitize_control_tokens, limits)
    conversation = Conversation(text, body, limits.tool_format)
    rendered = conversation.render(control=control)
    _check_length(text, rendered, "messages", limits)
    ids = text.encode_rendered(rendered, control=control)
    check_ids(ids, text, "messages", from_text=True)
    form = conversation.form(rendered)
    large: dict[str, Any] = {"messages": [], "tools": None, "documents": None, "chat_template_kwargs": None, **LARGE_FIELDS}
    return Query(body.model_copy(update=large), [(ids, "")], _bias(body, text), conversation.grammar(form), form)


def checked(kind: type[Checked], raw: bytes) -> Checked:
    """A body of that `kind` from its bytes. Raises ApiError for anything else."""
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
    if raw.count(b"[") + raw.count(b"{") > MOST_DEPTH and _depth(values) > MOST_DEPTH:
        raise ApiError(400, f"the body is nested more than {MOST_DEPTH} levels deep", code="invalid_json")
    try:
        body = kind.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=True)
        raise of_validation([{**each, "loc": ("body", *each["loc"])} for each in errors], values) from None
    if SURROGATE.search(raw) and (place := _broken(values)) is not None:
        raise ApiError(400, f"{place}: text may not hold half a surrogate pair", param=place)
    return body


def _depth(values: Any) -> int:
    """How many levels of lists and objects are in one another, counted up to one more than `MOST_DEPTH`."""
    level, depth = [values], 0
    while level and depth <= MOST_DEPTH:
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [item for value in inner for item in (value.values() if isinstance(value, dict) else value)]
        depth += bool(inner)
    return depth


def _broken(values: Any) -> str | None:
    """The place of a text with half a surrogate pair; None if there is none."""
    waiting: list[tuple[Any, tuple[str | int, ...]]] = [(values, ())]
    while waiting:
        value, place = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                return path(*place)
        elif isinstance(value, dict):
            waiting += [(key, (*place, "a name")) for key in value]
            waiting += [(item, (*place, key)) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(item, (*place, at)) for at, item in enumerate(value)]
    return None


def _recognised(sanitized: bool | None, limits: BodyLimits) -> bool:
    """Whether control tokens that the client writes count as such, not as text."""
    return not (limits.sanitized if sanitized is None else sanitized)


def _prompts(text: Text, body: CompletionRequest, limits: BodyLimits) -> list[tuple[list[int], str]]:
    field: Any = body.prompt
    prompts: list[Any] = [field] if isinstance(field, str) or not field or isinstance(field[0], int) else field
    if len(prompts) * (body.n or 1) > limits.max_choices:
        message = f"{len(prompts)} prompts and n = {body.n or 1} make more choices than the queue holds ({limits.max_choices})"
        raise ApiError(400, message, param="prompt" if len(prompts) > limits.max_choices else "n")
    names = ["prompt"] if prompts is not field else [path("prompt", at) for at in range(len(prompts))]
    control = _recognised(body.sanitize_control_tokens, limits)
    return [_prompt(text, prompt, bool(body.echo), control, name, limits) for name, prompt in zip(names, prompts, strict=True)]


def _prompt(text: Text, prompt: str | list[int], echo: bool, control: bool, name: str, limits: BodyLimits) -> tuple[list[int], str]:
    _check_length(text, prompt, name, limits)
    try:
        ids = text.encode(prompt, control=control) if isinstance(prompt, str) else prompt
    except TextError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from None
    check_ids(ids, text, name, from_text=isinstance(prompt, str))
    return ids, (prompt if isinstance(prompt, str) else text.decode(prompt)) if echo else ""


def _tokens(text: Text, body: TokenizeRequest, limits: BodyLimits) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt")
    control = _recognised(body.sanitize_control_tokens, limits)
    if body.prompt is not None:
        return text.encode(body.prompt, special=body.add_special_tokens is not False, control=control)
    rendered = text.render(plain(body.messages or ()), generation_prompt=body.add_generation_prompt is not False, control=control)
    ids = text.encode_rendered(rendered, control=control)
    check_ids(ids, text, "messages", from_text=True)
    return ids


def _check_length(text: Text, prompt: str | Sequence[int], field: str, limits: BodyLimits) -> None:
    """Refuses a prompt that is certain to be too long, before time is spent on it. Others are checked once they are tokens."""
    if len(prompt) < limits.max_len:
        return
    least = text.least_tokens(prompt) if isinstance(prompt, str) else len(prompt)
    if least >= limits.max_len:
        number = f"at least {least}" if isinstance(prompt, str) else f"{least}"
        message = f"the prompt has {number} tokens; with room for one more, at most {limits.max_len - 1} fit"
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def _bias(body: Generation, text: Text) -> Bias:
    biases: Mapping[str, float] = body.logit_bias or {}
    for key in biases:
        if not re.fullmatch(r"[0-9]{1,10}", key):
            raise ApiError(400, f"logit_bias: {shown(key)} is not a token id", param=path("logit_bias", key))
    bias = Bias({int(key): value for key, value in biases.items()})
    check_ids(list(bias), text, "logit_bias")
    return bias


def check_ids(ids: Sequence[int], text: Text, field: str, *, from_text: bool = False) -> None:
    """Raises ApiError for an id that the model does not have, though its tokenizer may. `from_text`: not the client's own ids."""
    if (wrong := text.lacks(ids)) is not None:
        where = path(field, str(wrong) if field == "logit_bias" else ids.index(wrong)) if not from_text else field
        name = f" ({shown(token)})" if (token := text.pieces.token(wrong)) else ""
        message = f"{where}: token id {shown(wrong)}{name} is outside the vocabulary (0 to {text.vocab_size - 1})"
        raise ApiError(400, message, param=where)
