"""OpenAI's responses, stateless: a body becomes a chat, and the answer is a list of items: reasoning, a message, and function
calls.

The events of a stream and the whole answer come from the same items. It keeps no response: `previous_response_id` is refused.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from stallfree.engine.streams import Output
from stallfree.executors.sampling import TokenLogprob
from stallfree.parsers.pieces import CallArguments, CallStart, Content, Piece
from stallfree.server.dialects.call import LEAST, Call, Choice, event
from stallfree.server.dialects.parts import named_tool, text_of, tool
from stallfree.server.errors import ApiError, path, shown
from stallfree.server.schema import (
    MAX_TOOLS,
    AllowedChoice,
    AllowedTools,
    Body,
    ChatRequest,
    ClassName,
    FunctionCall,
    JsonSchema,
    LatencyTargets,
    Message,
    NamedTool,
    Part,
    ResponseFormat,
    Salt,
    Text,
    ToolCall,
)

SAME = (
    "model", "temperature", "top_p", "top_k", "min_p", "seed", "priority", "slo", "service_tier", "top_logprobs",
    "parallel_tool_calls", "chat_template_kwargs", "stream", "user", "safety_identifier", "cache_salt",
)  # fmt: skip
"""Fields that are those of a chat."""
TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
"""Types of content parts that are text."""


class FunctionTool(Body):
    """A function that the model may call. `strict` changes nothing: see `schema.Function`."""

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: Text


class AllowedFunctions(Body):
    """The functions that may be called. See `schema.AllowedTools`."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class FormatOfText(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """`verbosity` has no effect."""

    format: FormatOfText | None = None


class ReasoningOptions(Body):
    """`summary` has no effect: the whole reasoning is in the answer."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponsesRequest(Body):
    """`input`: a text, or items: messages, function calls and their outputs, and reasoning. `store` has no effect: nothing is kept.
    `truncation` may only be "disabled". `top_k`, `min_p`, `seed`, `priority`, `slo` and `service_tier` are as in a
    chat."""

    model: str | None = None
    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    slo: LatencyTargets | None = None
    service_tier: ClassName | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    metadata: dict[str, Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Salt | None = None
    user: Text | None = Field(None, max_length=512)
    safety_identifier: Text | None = Field(None, max_length=512)

    def chat(self) -> ChatRequest:
        """The same request as a chat. Raises ApiError for items that are not served."""
        format = None if self.text is None else self.text.format
        wants_logprobs = self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())
        fields: dict[str, Any] = {name: getattr(self, name) for name in SAME} | {
            "messages": _messages(self),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": wants_logprobs,
            "tools": [tool(t.name, t.description, t.parameters, t.strict) for t in self.tools or ()],
            "tool_choice": _choice(self.tool_choice),
            "response_format": None if format is None else _format(format),
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
        }
        return ChatRequest(**fields)

    def echo(self) -> dict[str, Any]:
        """The members of the answer that repeat the request."""
        effort = None if self.reasoning is None else self.reasoning.effort
        format = None if self.text is None or self.text.format is None else self.text.format
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": self.tool_choice.model_dump() if isinstance(self.tool_choice, Body) else self.tool_choice or "auto",
            "tools": [{"strict": None, "parameters": None, **tool.model_dump(exclude_none=True)} for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


def _choice(choice: str | FunctionChoice | AllowedFunctions | None) -> str | NamedTool | AllowedChoice | None:
    if isinstance(choice, FunctionChoice):
        return named_tool(choice.name)
    if isinstance(choice, AllowedFunctions):
        tools = [named_tool(function.name) for function in choice.tools]
        return AllowedChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=choice.mode, tools=tools))
    return choice


def _format(format: FormatOfText) -> ResponseFormat:
    schema = None
    if format.type == "json_schema":
        if format.schema_ is None:
            raise ApiError(400, "text.format.schema is missing; give the schema of the answer", param="text.format.schema")
        schema = JsonSchema(name=format.name, description=format.description, schema=format.schema_, strict=format.strict)
    return ResponseFormat(type=format.type, json_schema=schema)


def _messages(body: ResponsesRequest) -> list[Message]:
    messages = [] if body.instructions is None else [Message(role="system", content=body.instructions)]
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    for index, item in enumerate(body.input):
        _add(messages, path("input", index), item)
    if not messages:
        raise ApiError(400, "input has no message, call or result; give what the model should answer", param="input")
    return messages


def _add(messages: list[Message], where: str, item: dict[str, Any]) -> None:
    """Add an item of the input. Reasoning and calls belong to the assistant's message, which may be spread over several items."""
    kind = item.get("type", "message")
    match kind:
        case "message":
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise ApiError(
                    400, f"{where}.role is {shown(role)}; it is user, assistant, system or developer", param=f"{where}.role"
                )
            last = messages[-1] if messages else None
            content = _content(where, item.get("content"))
            if role == "assistant" and last is not None and last.role == "assistant" and last.content is None:
                last.content = content
            else:
                messages.append(Message(role=role, content=content))
        case "function_call":
            call = ToolCall(
                id=text_of(where, item, "call_id"),
                function=FunctionCall(name=text_of(where, item, "name"), arguments=text_of(where, item, "arguments")),
            )
            message = _assistant(messages)
            message.tool_calls = [*(message.tool_calls or ()), call]
        case "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _content(f"{where}.output", output)
            messages.append(Message(role="tool", content=content, tool_call_id=text_of(where, item, "call_id")))
        case "reasoning":
            parts = item.get("content") or item.get("summary") or []
            if not isinstance(parts, list):
                raise ApiError(400, f"{where}.content is {shown(parts)}; it must be a list of parts", param=f"{where}.content")
            text = "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
            if text:
                _assistant(messages).reasoning_content = text
        case _:
            known = "message, function_call, function_call_output and reasoning"
            raise ApiError(400, f"{where}.type is {shown(kind)}; this server takes {known}", param=f"{where}.type")


def _assistant(messages: list[Message]) -> Message:
    """The assistant's message that is being built, or a new one."""
    if not messages or messages[-1].role != "assistant":
        messages.append(Message(role="assistant"))
    return messages[-1]


def _content(where: str, content: Any) -> str | list[Part]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content is {shown(content)}; it must be a text or a list of parts", param=f"{where}.content")
    parts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if not isinstance(part, dict) or kind not in TEXT_PARTS:
            place = f"{where}.content[{at}].type"
            raise ApiError(400, f"{place} is {shown(kind)}; this server takes text only (input_text, output_text)", param=place)
        name = "refusal" if kind == "refusal" else "text"
        parts.append(Part(type="text", text=text_of(f"{where}.content[{at}]", part, name)))
    return parts


PREFIXES = {"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}
DELTAS = {
    "reasoning": "response.reasoning_text.delta",
    "message": "response.output_text.delta",
    "function_call": "response.function_call_arguments.delta",
}


class _Item:
    """An item of the answer, while it is written. `kind`: reasoning, message or function_call."""

    def __init__(self, kind: str, index: int, id: str, call: tuple[str, str] = ("", "")):
        self.kind, self.index, self.id, self.call = kind, index, id, call
        self.texts: list[str] = []
        self.logprobs: list[str] = []

    def values(self, status: str) -> dict[str, Any]:
        text = "".join(self.texts)
        base = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return base | {"call_id": self.call[0], "name": self.call[1], "arguments": text}
        content = [self.part()] if status != "in_progress" else []
        return base | ({"role": "assistant", "content": content} if self.kind == "message" else {"summary": [], "content": content})

    def part(self, *, empty: bool = False) -> dict[str, Any]:
        text = "" if empty else "".join(self.texts)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class Responses(Call):
    """`echo`: the members of the answer that repeat the request."""

    prefix, operation = "resp_", "responses"
    fields: ClassVar[Mapping[str, str]] = {"messages": "input", "max_completion_tokens": "max_output_tokens"}

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.echo: dict[str, Any] = {}
        self._items: list[_Item] = []
        self._number = 0
        self._finish: str | None = None
        self._reasoning_tokens = 0
        self._entries: list[str] = []
        self._silent = False

    def take(self, choice: Choice, output: Output) -> None:
        self._silent = True
        self.events(choice, output)

    async def joined(self) -> bytes:
        return self._written(self._response(self._status())).encode()

    def opening(self) -> str:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event("response.in_progress", response=response)

    def events(self, choice: Choice, output: Output) -> str:
        if output.details is not None:
            self._entries.append(json.dumps(self._entry(output)))
        events = ""
        for piece in choice.pieces(output):
            events += self._add(choice, piece)
        if self._items and self._items[-1].kind == "reasoning":
            self._reasoning_tokens += len(output.tokens)
        if output.finish_reason is not None:
            self._finish = output.finish_reason
            events += self._close()
        return events

    def ending(self) -> str:
        status = self._status()
        last = {"type": f"response.{status}", "sequence_number": self._number, "response": self._response(status)}
        return event(self._written(last), f"response.{status}")

    def failure(self, error: ApiError) -> str:
        response = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=response)

    def _add(self, choice: Choice, piece: Piece) -> str:
        kind = {Content: "message", CallStart: "function_call", CallArguments: "function_call"}.get(type(piece), "reasoning")
        events = ""
        if not self._items or self._items[-1].kind != kind or isinstance(piece, CallStart):
            call = (choice.call_ids[piece.index], piece.name) if isinstance(piece, CallStart) else ("", "")
            events = self._close() + self._open(kind, call)
        if isinstance(piece, CallStart):
            return events
        item = self._items[-1]
        item.texts.append(piece.text)
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index, "delta": piece.text}
        if kind != "function_call":
            place["content_index"] = 0
        if kind != "message":
            self._entries.clear()  # only a message has log-probabilities
            return events + self._event(DELTAS[kind], **place)
        entries, self._entries = self._entries, []
        item.logprobs += entries
        return events + self._event(DELTAS[kind], **place, logprobs=[json.loads(entry) for entry in entries])

    def _open(self, kind: str, call: tuple[str, str]) -> str:
        index = len(self._items)
        item = _Item(kind, index, f"{PREFIXES[kind]}{self.id.removeprefix(self.prefix)}{index}", call)
        self._items.append(item)
        events = self._event("response.output_item.added", output_index=index, item=item.values("in_progress"))
        if kind != "function_call":
            place = {"item_id": item.id, "output_index": index, "content_index": 0}
            events += self._event("response.content_part.added", **place, part=item.part(empty=True))
        return events

    def _close(self) -> str:
        """The events that end the last item."""
        if not self._items:
            return ""
        item = self._items[-1]
        text = "".join(item.texts)
        place: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        if item.kind == "function_call":
            events = self._event("response.function_call_arguments.done", **place, name=item.call[1], arguments=text)
        else:
            place["content_index"] = 0
            if item.kind == "message":
                item.logprobs += self._entries
                events = self._event("response.output_text.done", **place, text=text, logprobs=[])
            else:
                events = self._event("response.reasoning_text.done", **place, text=text)
            events += self._event("response.content_part.done", **place, part=item.part())
        return events + self._event("response.output_item.done", output_index=item.index, item=item.values(self._item_status(item)))

    def _item_status(self, item: _Item) -> str:
        return "incomplete" if self._finish == "length" and item is self._items[-1] else "completed"

    def _status(self) -> str:
        return "incomplete" if self._finish == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        ended = status != "in_progress"
        usage = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [item.values(self._item_status(item)) for item in self._items] if ended else [],
            "usage": usage if ended else None,
            **({} if self.service_tier is None else {"service_tier": self.service_tier}),
            **self.echo,
        }

    def _entry(self, output: Output) -> dict[str, Any]:
        details = cast(TokenLogprob, output.details)
        entries = []
        for id, logprob in [(output.tokens[0], details.logprob), *details.top]:
            piece = self._text.pieces[id]
            entries.append({"token": piece.decode(errors="replace"), "logprob": max(logprob, LEAST), "bytes": list(piece)})
        return entries[0] | {"top_logprobs": entries[1:]}

    def _written(self, values: dict[str, Any]) -> str:
        """The JSON of the last event or of the whole answer, with the log-probabilities, which are JSON already."""
        text = json.dumps(values)
        for item in self._items:
            if item.logprobs:
                head, mark, tail = text.partition('"logprobs": []')
                text = f'{head}"logprobs": [{", ".join(item.logprobs)}]{tail}' if mark else text
        return text

    def _event(self, kind: str, **values: Any) -> str:
        if self._silent:
            return ""
        self._number += 1
        return event({"type": kind, "sequence_number": self._number - 1, **values}, kind)
