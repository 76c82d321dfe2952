"""OpenAI's chat: the answer is the next message of a conversation, with its reasoning and its tool calls."""

import json
from typing import Any, cast

from stallfree.engine.streams import Output
from stallfree.executors.sampling import TokenLogprob
from stallfree.parsers.pieces import CallArguments, CallStart, Content, Piece
from stallfree.server.dialects.call import LEAST, Choice, spelt
from stallfree.server.dialects.chunks import Chunked, Columns


class Chat(Chunked):
    prefix, object, chunk_object, operation = "chatcmpl-", "chat.completion", "chat.completion.chunk", "chat"
    lists, constants = ("content",), ('"refusal": null',)
    prompt_in_choice = False
    nothing, last = '"delta": {"content": ""}', '"delta": {}'

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._parts = {id: _Parts() for id in self.choices}

    def add(self, choice: Choice, output: Output) -> None:
        parts = self._parts[output.id]
        for piece in choice.pieces(output):
            parts.add(piece)

    def members(self, choice: Choice) -> str:
        parts = self._parts[choice.request.id]
        # As in OpenAI's answers, a message of calls alone has no content.
        content = json.dumps("".join(parts.content)) if parts.content or not parts.calls else "null"
        message = f'"role": "assistant", "content": {content}, "refusal": null'
        if parts.reasoning:
            message += f', "reasoning_content": {json.dumps("".join(parts.reasoning))}'
        if parts.calls:
            calls = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
                for id, (name, arguments) in zip(choice.call_ids, parts.calls, strict=True)
            ]
            message += f', "tool_calls": {json.dumps(calls)}'
        return f'"message": {{{message}}}'

    def first(self, choice: Choice) -> str | None:
        return '"delta": {"role": "assistant", "content": ""}'

    def deltas(self, choice: Choice, output: Output) -> list[str]:
        return ['"delta": ' + _delta(choice, piece) for piece in choice.pieces(output)]

    def logprobs(self, choice: Choice, output: Output) -> Columns:
        details = cast(TokenLogprob, output.details)
        top = ", ".join([f"{{{self._entry(id, logprob)}}}" for id, logprob in details.top])
        return (f'{{{self._entry(output.tokens[0], details.logprob)}, "top_logprobs": [{top}]}}',)

    def _entry(self, id: int, logprob: float) -> str:
        token, raw = spelt(self._text.pieces, id)
        return f'"token": {token}, "logprob": {max(logprob, LEAST)!r}, "bytes": {raw}'


def _delta(choice: Choice, piece: Piece) -> str:
    match piece:
        case Content():
            return '{"content": ' + json.dumps(piece.text) + "}"
        case CallStart():
            function = {"name": piece.name, "arguments": ""}
            call: dict[str, Any] = {"index": piece.index, "id": choice.call_ids[piece.index], "type": "function"}
            return json.dumps({"tool_calls": [call | {"function": function}]})
        case CallArguments():
            return json.dumps({"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]})
        case _:
            return '{"reasoning_content": ' + json.dumps(piece.text) + "}"


class _Parts:
    """A whole answer's parts, as its pieces come: texts of reasoning and content, and calls with their arguments."""

    def __init__(self) -> None:
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[tuple[str, list[str]]] = []

    def add(self, piece: Piece) -> None:
        match piece:
            case CallStart():
                self.calls.append((piece.name, []))
            case CallArguments():
                self.calls[piece.index][1].append(piece.text)
            case Content():
                self.content.append(piece.text)
            case _:
                self.reasoning.append(piece.text)
