"""A chat as the model's template and its grammar want it: messages, tools, the tool format, and what the answer is held to.

It knows the bodies of chats and the model's text. It does not know how they are read, or what the engine does.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stallfree.engine.text import Text, TextError
from stallfree.grammar import sources
from stallfree.grammar.sources import Grammar
from stallfree.parsers import channels, formats, reasoning
from stallfree.parsers.channels import ChannelsParser
from stallfree.parsers.pieces import Parser, Tool, Verbatim
from stallfree.parsers.reasoning import ReasoningParser
from stallfree.server.errors import ApiError, path, shown
from stallfree.server.schema import AllowedChoice, ChatRequest, Generation, Message, NamedTool, StructuredOutputs

TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
"""OpenAI's names of functions, and dots, which MCP servers use."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Values of a template that `chat_template_kwargs` may not replace: they have fields of their own."""

HINT = """You may call these functions:
{tools}
To call one, answer with nothing but a JSON object: {{"name": the function's name, "arguments": an object with its arguments}}"""
"""The system message for templates that do not show tools. The format `plain` reads what it asks for."""


class Form(NamedTuple):
    """How to read an answer. `tools`: the format of its calls, and the names that may be called; None: none are read. `section`:
    the marks of its reasoning, and whether the prompt already ends within it; None: it has none. `hides_reasoning`: the client does
    not want its text. `visible`: ids of special tokens that belong to the text. `parallel`: more than one call counts. `channels`:
    it comes in channels (`parsers/channels.py`)."""

    tools: tuple[str, frozenset[str]] | None = None
    section: tuple[str, str, bool] | None = None
    hides_reasoning: bool = False
    visible: frozenset[int] = frozenset()
    parallel: bool = True
    channels: bool = False

    def parser(self) -> Parser | None:
        """A new parser of one answer; None if all of it is content."""
        if self.tools is None and self.section is None and not self.channels:
            return None
        inner = Verbatim() if self.tools is None else formats.named(self.tools[0]).parser(self.tools[1])
        if self.channels:
            return ChannelsParser(inner, self.tools[1] if self.tools else ())
        return inner if self.section is None else ReasoningParser(inner, *self.section)


class Conversation:
    """The chat of `body` for the model with `text`. `tool_format`: the name of one, or None: the one that the template suits.
    Raises ApiError for messages and tools that do not fit together."""

    def __init__(self, text: Text, body: ChatRequest, tool_format: str | None):
        self._text, self._body = text, body
        self.tools = _tools(body)
        self._callable, self._forced = _chosen(body, self.tools)
        source = text.template_source(bool(self.tools))
        self._format = formats.choose(source) if tool_format is None else formats.named(tool_format)
        self._marks = reasoning.marks(source)
        self._channels = channels.suits(source)
        self._hinted = bool(self.tools) and not re.search(r"\btools\b", source)

    def render(self, *, control: bool) -> str:
        """The prompt. See `Text.render`."""
        body = self._body
        values = dict(body.chat_template_kwargs or {})
        for name in values.keys() & RESERVED:
            where = path("chat_template_kwargs", name)
            raise ApiError(400, f"{where} cannot be set there; use the field {name} of the request", param=where)
        if body.reasoning_effort is not None:
            values = {"reasoning_effort": body.reasoning_effort, "enable_thinking": body.reasoning_effort != "none"} | values
        messages = plain(body.messages)
        if self._channels:
            messages = [_with_thinking(message) for message in messages]
        if self._hinted:
            messages = _with_hint(messages, self.tools)
        tools = [t.model_dump(exclude_none=True) for t in body.tools or ()] if self.tools and not self._hinted else None
        try:
            return self._text.render(messages, control=control, tools=tools, documents=body.documents, extra=values)
        except TextError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    def form(self, rendered: str) -> Form:
        """How the answer to the prompt `rendered` is to be read."""
        section = None if self._marks is None else (*self._marks, rendered.rstrip().endswith(self._marks[0]))
        tools = (self._format.name, frozenset(tool.name for tool in self._callable)) if self.tools else None
        marks = ([] if self._marks is None else list(self._marks)) + (list(self._format.marks) if self.tools else [])
        marks += channels.MARKS if self._channels else ()
        visible = frozenset(self._text.own_tokens(marks).values())
        parallel = self._body.parallel_tool_calls is not False
        return Form(tools, section, self._body.include_reasoning is False, visible, parallel, self._channels)

    def grammar(self, form: Form) -> Grammar | None:
        """What the answer is held to; None if to nothing. As in OpenAI's API, `response_format` holds the content of the message,
        and calls that are forced leave none."""
        answer = structured(self._body)
        calls = Grammar(self._lark(), "tools") if self._forced else None
        if calls is not None and answer is not None and not answer.field.startswith("response_format"):
            message = f"{answer.field} and tool_choice contradict each other: the answer cannot be both; leave one of them out"
            raise ApiError(400, message, param="tool_choice")
        if answer is not None and calls is None and self.tools:
            answer = answer._replace(source=sources.either(self._lark(), answer.source))
        answer = calls or answer
        return answer if form.section is None else self._with_section(answer, *form.section)

    def _with_section(self, answer: Grammar | None, open: str, close: str, inside: bool) -> Grammar | None:
        """What the answer is held to, with a reasoning section before it."""
        most = self._body.max_reasoning_tokens
        ids = self._text.own_tokens([open, close])
        opening, closing = sources.Mark(open, ids.get(open)), sources.Mark(close, ids.get(close))
        if most is not None and None in (closing.token, opening.token):
            message = f"max_reasoning_tokens: this model writes {close!r} as several tokens, so its reasoning has no limit here"
            raise ApiError(400, message, param="max_reasoning_tokens")
        if answer is not None:
            source = sources.after_reasoning(answer.source, None if inside else opening, closing, most)
            return answer._replace(source=source)
        if most is None:
            return None
        after = None if inside else opening.token
        return Grammar(sources.reasoning(closing.token or 0, most), "max_reasoning_tokens", opens=True, after=after)

    def _lark(self) -> str:
        """A grammar of the calls that may be made."""
        parallel = self._body.parallel_tool_calls is not False and not isinstance(self._body.tool_choice, NamedTool)
        special = self._text.own_tokens(self._format.marks)
        size = sum(len(json.dumps(tool.parameters)) for tool in self._callable)
        if size > sources.MOST_CHARS:
            message = f"tools: their parameters have {size:,} characters; calls are held to at most {sources.MOST_CHARS:,}"
            raise ApiError(400, message, param="tools")
        try:
            return sources.of_lark(self._format.grammar(self._callable, parallel=parallel, special=special))
        except ValueError as error:
            raise ApiError(400, f"tools: {error}", param="tools") from None


def structured(body: Generation) -> Grammar | None:
    """The structured output that a body asks for. Raises ApiError if it asks for several, or for something that is none."""
    wishes: list[tuple[str, Callable[[Any], str], Any]] = []
    format = body.response_format
    if format is not None and format.type == "json_object":
        wishes.append(("response_format", sources.of_schema, {"type": "object"}))
    elif format is not None and format.type == "json_schema":
        if format.json_schema is None or format.json_schema.schema_ is None:
            missing = "response_format.json_schema" + ("" if format.json_schema is None else ".schema")
            raise ApiError(400, f"{missing} is missing; give the schema of the answer", param=missing)
        wishes.append(("response_format.json_schema.schema", sources.of_schema, format.json_schema.schema_))
    outputs = body.structured_outputs or StructuredOutputs.model_construct()
    wishes += [
        ("structured_outputs.json", sources.of_schema, _schema(outputs)),
        ("structured_outputs.regex", sources.of_regex, outputs.regex),
        ("structured_outputs.choice", sources.of_choice, outputs.choice),
        ("structured_outputs.grammar", sources.of_grammar, outputs.grammar),
        ("guided_json", sources.of_schema, body.guided_json),
        ("guided_regex", sources.of_regex, body.guided_regex),
        ("guided_choice", sources.of_choice, body.guided_choice),
        ("guided_grammar", sources.of_grammar, body.guided_grammar),
    ]
    wanted = [(field, write, value) for field, write, value in wishes if value is not None]
    if len(wanted) > 1:
        raise ApiError(400, f"{wanted[0][0]} and {wanted[1][0]} both hold the answer; give one of them", param=wanted[1][0])
    for field, write, value in wanted:
        try:
            return Grammar(write(value), field)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{field}: {str(error).splitlines()[0][:300]}", param=field) from None
    return None


def _schema(outputs: StructuredOutputs) -> object:
    """The schema that `json` or `json_object` asks for; None if neither does."""
    return {"type": "object"} if outputs.json_ is None and outputs.json_object else outputs.json_


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates read them. Raises ApiError for a content that is no text, and for tool results without their call."""
    open_calls: set[str] = set()
    values = []
    for index, message in enumerate(messages):
        values.append(_plain_one(index, message))
        if message.role == "tool":
            _check_result(path("messages", index), message, open_calls)
        for call in message.tool_calls or ():
            open_calls.add(call.id or "")
    return values


def _check_result(where: str, message: Message, open_calls: set[str]) -> None:
    """A tool's result needs a call before it. Without ids on either side, the order is what connects them."""
    if not open_calls:
        raise ApiError(400, f"{where} is a tool's result, but no message before it has tool_calls", param=where)
    if message.tool_call_id is not None and "" not in open_calls and message.tool_call_id not in open_calls:
        id = shown(message.tool_call_id)
        raise ApiError(400, f"{where}.tool_call_id is {id}, which no call before it has", param=f"{where}.tool_call_id")


def _plain_one(index: int, message: Message) -> dict[str, Any]:
    where = path("messages", index)
    content = message.content
    if content is None:
        if message.role != "assistant":
            raise ApiError(400, f"{where}.content is missing; only an assistant's may be null", param=f"{where}.content")
        content = ""
    elif not isinstance(content, str):
        for at, part in enumerate(content):
            part_where = path("messages", index, "content", at)
            if part.type != "text":
                why = f"{part_where}.type is {shown(part.type)}; this server takes text only"
                raise ApiError(400, why, param=f"{part_where}.type")
            if part.text is None:
                raise ApiError(400, f"{part_where}.text is missing", param=f"{part_where}.text")
        content = "\n".join(str(part.text) for part in content)
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content}
    plain |= {
        name: value for name in ("name", "tool_call_id", "reasoning_content") if (value := getattr(message, name)) is not None
    }
    if message.tool_calls:
        if message.role != "assistant":
            raise ApiError(400, f"{where}.tool_calls: only an assistant makes calls", param=f"{where}.tool_calls")
        plain["tool_calls"] = [_call(f"{where}.tool_calls[{at}]", call) for at, call in enumerate(message.tool_calls)]
    return plain


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """For templates with channels, which call an earlier analysis so, and refuse it beside content."""
    analysis = None if message["content"] else message.get("reasoning_content")
    return message if analysis is None else message | {"thinking": analysis}


def _call(where: str, call: Any) -> dict[str, Any]:
    """An earlier call for a template, which wants its arguments as values."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        field = f"{where}.function.arguments"
        raise ApiError(400, f"{field} is {shown(call.function.arguments)}, which is not a JSON object", param=field)
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _tools(body: ChatRequest) -> list[Tool]:
    """The tools that may be called. Raises ApiError for names that are used twice or cannot be served."""
    if body.tool_choice == "none":
        return []
    tools: list[Tool] = []
    for index, definition in enumerate(body.tools or ()):
        function, where = definition.function, path("tools", index, "function", "name")
        if not TOOL_NAME.fullmatch(function.name):
            message = f"{where} is {shown(function.name)}; a name has 1 to 64 letters, digits, and _ - ."
            raise ApiError(400, message, param=where)
        if any(tool.name == function.name for tool in tools):
            raise ApiError(400, f"{where}: another tool has the name {function.name!r}; give each its own", param=where)
        kind = (function.parameters or {}).get("type", "object")
        if kind != "object":
            where = path("tools", index, "function", "parameters", "type")
            raise ApiError(400, f"{where} is {shown(kind)}; the arguments of a function are an object", param=where)
        tools.append(Tool(function.name, function.description or "", function.parameters or {}))
    return tools


def _chosen(body: ChatRequest, tools: list[Tool]) -> tuple[list[Tool], bool]:
    """The tools that `tool_choice` lets the model call, and whether it must call one. Raises ApiError if they are not among
    `tools`."""
    choice = body.tool_choice
    named, forced = [], choice == "required"
    if isinstance(choice, NamedTool):
        named, forced = [choice], True
    elif isinstance(choice, AllowedChoice):
        named, forced = choice.allowed_tools.tools, choice.allowed_tools.mode == "required"
    by_name = {tool.name: tool for tool in tools}
    for each in named:
        if each.function.name not in by_name:
            known = ", ".join(by_name) or "there are none"
            message = f"tool_choice names {shown(each.function.name)}, which is not in tools ({known})"
            raise ApiError(400, message, param="tool_choice")
    if forced and not tools:
        raise ApiError(400, "tool_choice is required, but there are no tools; give some, or leave it out", param="tool_choice")
    names = {each.function.name for each in named}
    return [tool for tool in tools if not names or tool.name in names], forced


def _with_hint(messages: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The messages for a template that shows no tools: the system message tells of them, and calls are written out as the answers
    that they were."""
    shown_tools = "\n".join(
        json.dumps({"name": tool.name, "description": tool.description, "parameters": tool.parameters}) for tool in tools
    )
    written = []
    for message in messages:
        calls = message.get("tool_calls")
        if calls:
            texts = [json.dumps(call["function"]) for call in calls]
            message = {"role": "assistant", "content": "\n".join(filter(None, [message["content"], *texts]))}
        written.append(message)
    hint = HINT.format(tools=shown_tools)
    if written[0]["role"] == "system":
        return [written[0] | {"content": f"{written[0]['content']}\n\n{hint}"}, *written[1:]]
    return [{"role": "system", "content": hint}, *written]
