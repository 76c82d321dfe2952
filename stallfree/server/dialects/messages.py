"""Anthropic's messages: a body becomes a chat, and the answer is a list of blocks: thinking, text, and uses of tools.

The events of a stream and the whole answer come from the same blocks. Errors have Anthropic's form. It keeps nothing between
requests.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stallfree.engine.streams import Output
from stallfree.parsers.pieces import CallArguments, CallStart, Content, Piece
from stallfree.server.dialects.call import Call, Choice, event
from stallfree.server.dialects.parts import named_tool, text_of, tool
from stallfree.server.errors import ApiError, path, shown
from stallfree.server.schema import (
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOOLS,
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

Blocks = Text | list[dict[str, Any]]


class NoThreads(ApiError):
    """The refusal of `thread`. Anthropic's SDK (2.14, `lib/threads`) knows it by its details, and then sends the whole
    conversation, as its tool runner needs."""

    def __init__(self) -> None:
        message = "thread is not supported by this server: it keeps no conversation; leave it out, and send all messages"
        super().__init__(400, message, param="thread")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def body(self, *, anthropic: bool = False) -> bytes:
        values = json.loads(super().body(anthropic=anthropic))
        values["error"]["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        return json.dumps(values).encode()


class Turn(Body):
    role: Literal["user", "assistant"]
    content: Blocks


class CacheControl(Body):
    type: Literal["ephemeral"]
    ttl: Text | None = None


class ToolOfMessages(Body):
    """A tool that the client runs. `cache_control` has no effect: prefixes are always cached."""

    name: Text
    description: Text | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """`budget_tokens`: after so many tokens of thinking the answer begins. `display` "omitted" leaves the thinking out."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class FormatOfOutput(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """`effort` is handed to the model's template."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: FormatOfOutput | None = None


class Metadata(Body):
    user_id: Text | None = None


class ThinkingEdit(Body):
    """`keep`: how many turns keep their thinking in the prompt. It has no effect: the model's template decides that."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class ContextManagement(Body):
    edits: list[ThinkingEdit] | None = None


class CountRequest(Body):
    """The fields of a message that decide about its prompt."""

    model: str | None = None
    messages: list[Turn] = Field(min_length=1)
    system: Blocks | None = None
    tools: Annotated[list[ToolOfMessages], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    cache_control: CacheControl | None = None

    def chat(self) -> ChatRequest:
        """The same request as a chat. Raises ApiError for blocks that are not served."""
        return ChatRequest(**self._fields())

    def _fields(self) -> dict[str, Any]:
        choice, thinking, output = self.tool_choice, self.thinking, self.output_config or OutputConfig()
        thinks = thinking is not None and thinking.type != "disabled"  # as in Anthropic's API, a request has to ask for it
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(self),
            "tools": [tool(t.name, t.description, t.input_schema, t.strict) for t in self.tools or ()],
            "chat_template_kwargs": {"enable_thinking": thinks},
            "include_reasoning": thinks and thinking is not None and thinking.display != "omitted",
            "reasoning_effort": {"max": "xhigh"}.get(output.effort or "", output.effort),
            "max_reasoning_tokens": None if thinking is None else thinking.budget_tokens,
        }
        if output.format is not None:
            fields["response_format"] = ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=output.format.schema_))
        if choice is not None:
            fields["tool_choice"] = _choice(choice)
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return fields


class MessagesRequest(CountRequest):
    """`top_k`, `service_tier`, and `priority`, `slo` and `cache_salt` of this server, are as in a chat. `thread` asks the server to
    keep the conversation, and is refused."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[Annotated[Text, Field(max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: Metadata | None = None
    stream: bool | None = None
    thread: dict[str, Any] | None = None
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    slo: LatencyTargets | None = None
    service_tier: ClassName | None = None
    cache_salt: Salt | None = None

    def _fields(self) -> dict[str, Any]:
        if self.thread is not None:
            raise NoThreads
        return super()._fields() | {
            "max_tokens": self.max_tokens,
            "stop": [stop for stop in self.stop_sequences or () if stop] or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stream": self.stream,
            "priority": self.priority,
            "slo": self.slo,
            "service_tier": self.service_tier,
            "cache_salt": self.cache_salt,
            "user": None if self.metadata is None or self.metadata.user_id is None else self.metadata.user_id[:512],
        }


def _choice(choice: ToolChoice) -> str | NamedTool:
    if choice.type == "tool":
        if choice.name is None:
            raise ApiError(400, "tool_choice.name is missing; name the tool", param="tool_choice.name")
        return named_tool(choice.name)
    return {"any": "required"}.get(choice.type, choice.type)


def _messages(body: CountRequest) -> list[Message]:
    messages = [] if body.system is None else [Message(role="system", content=_texts("system", body.system))]
    for index, turn in enumerate(body.messages):
        where = path("messages", index, "content")
        if isinstance(turn.content, str):
            messages.append(Message(role=turn.role, content=turn.content))
        elif turn.role == "user":
            messages += _user(where, turn.content)
        else:
            messages.append(_assistant(where, turn.content))
    return messages


def _user(where: str, blocks: list[dict[str, Any]]) -> list[Message]:
    """A user's turn: the results of tools, which are messages of their own, and then the text."""
    messages, parts = [], []
    for at, block in enumerate(blocks):
        place = f"{where}[{at}]"
        if block.get("type") == "tool_result":
            content = block.get("content")
            text = _texts(f"{place}.content", [] if content is None else content)
            messages.append(Message(role="tool", content=text, tool_call_id=text_of(place, block, "tool_use_id")))
        else:
            parts.append(_part(place, block))
    return [*messages, Message(role="user", content=parts)] if parts or not messages else messages


def _assistant(where: str, blocks: list[dict[str, Any]]) -> Message:
    message = Message(role="assistant")
    parts, calls = [], []
    for at, block in enumerate(blocks):
        place = f"{where}[{at}]"
        match block.get("type"):
            case "tool_use":
                arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
                function = FunctionCall(name=text_of(place, block, "name"), arguments=arguments)
                calls.append(ToolCall(id=text_of(place, block, "id"), function=function))
            case "thinking":
                thought = text_of(place, block, "thinking")
                message.reasoning_content = "\n".join(filter(None, [message.reasoning_content, thought]))
            case "redacted_thinking":
                pass
            case _:
                parts.append(_part(place, block))
    message.content, message.tool_calls = parts or None, calls or None
    return message


def _texts(where: str, content: Any) -> list[Part]:
    if isinstance(content, str):
        return [Part(type="text", text=content)]
    if not isinstance(content, list):
        raise ApiError(400, f"{where} is {shown(content)}; it must be a text or a list of blocks", param=where)
    return [_part(f"{where}[{at}]", block) for at, block in enumerate(content)]


def _part(where: str, block: Any) -> Part:
    kind = block.get("type") if isinstance(block, dict) else block
    if not isinstance(block, dict) or kind != "text":
        raise ApiError(400, f"{where}.type is {shown(kind)}; this server takes text only", param=f"{where}.type")
    return Part(type="text", text=text_of(where, block, "text"))


class Messages(Call):
    prefix, operation = "msg_", "messages"
    fields: ClassVar[Mapping[str, str]] = {
        "messages": "messages",
        "response_format": "output_config.format",
        "max_reasoning_tokens": "thinking.budget_tokens",
    }

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._blocks: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._silent = False
        self._last: tuple[str, str | None] | None = None

    def take(self, choice: Choice, output: Output) -> None:
        self._silent = True
        self.events(choice, output)

    async def joined(self) -> bytes:
        return json.dumps(self._message() | {"content": self._blocks}).encode()

    def opening(self) -> str:
        return self._event("message_start", message=self._message()) + self._event("ping")

    def events(self, choice: Choice, output: Output) -> str:
        events = "".join(self._add(choice, piece) for piece in choice.pieces(output))
        if output.finish_reason is not None:
            events += self._close()
            self._last = self._reason(choice, output)
        return events

    def ending(self) -> str:
        message = self._message()
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
        return self._event("message_delta", delta=delta, usage=message["usage"]) + self._event("message_stop")

    def failure(self, error: ApiError) -> str:
        return event(error.body(anthropic=True).decode(), "error")

    def _add(self, choice: Choice, piece: Piece) -> str:
        kind = {Content: "text", CallStart: "tool_use", CallArguments: "tool_use"}.get(type(piece), "thinking")
        events = ""
        if not self._blocks or self._blocks[-1]["type"] != kind or isinstance(piece, CallStart):
            events = self._close() + self._open(choice, kind, piece)
        if isinstance(piece, CallStart):
            return events
        self._texts.append(piece.text)
        delta = {
            "text": {"type": "text_delta", "text": piece.text},
            "tool_use": {"type": "input_json_delta", "partial_json": piece.text},
            "thinking": {"type": "thinking_delta", "thinking": piece.text},
        }[kind]
        return events + self._event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _open(self, choice: Choice, kind: str, piece: Piece) -> str:
        block: dict[str, Any] = {"type": kind}
        if isinstance(piece, CallStart):
            block |= {"id": choice.call_ids[piece.index].replace("call_", "toolu_"), "name": piece.name, "input": {}}
        else:
            block |= {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
        self._blocks.append(block)
        return self._event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _close(self) -> str:
        """The events that end the last block."""
        if not self._blocks:
            return ""
        block, text = self._blocks[-1], "".join(self._texts)
        self._texts = []
        index, kind = len(self._blocks) - 1, block["type"]
        events = ""
        if kind == "tool_use":
            block["input"] = _values(text)
        else:
            block[kind] = text
        if kind == "thinking":
            events = self._event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
        return events + self._event("content_block_stop", index=index)

    def _reason(self, choice: Choice, output: Output) -> tuple[str, str | None]:
        """Why the answer ended, and the stop sequence that ended it."""
        if output.finish_reason == "length":
            return "max_tokens", None
        if isinstance(output.stop_reason, str):
            return "stop_sequence", output.stop_reason
        return "tool_use" if choice.call_ids else "end_turn", None

    def _message(self) -> dict[str, Any]:
        reason, sequence = (None, None) if self._last is None else self._last
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": {
                "input_tokens": self.prompt_tokens - self.cached_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": self.cached_tokens,
                "output_tokens": self.completion_tokens,
                **({} if self.service_tier is None else {"service_tier": self.service_tier}),
            },
        }

    def _event(self, name: str, **values: Any) -> str:
        return "" if self._silent else event({"type": name, **values}, name)


def _values(text: str) -> Any:
    """A call's arguments as values. Those of an answer that was cut off are no JSON: then they are in `partial`, as written."""
    try:
        values = json.loads(text or "{}")
        json.dumps(values, allow_nan=False)  # NaN and 1e999 are no JSON
    except (ValueError, RecursionError):
        return {"partial": text}
    return values
