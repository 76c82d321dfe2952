"""From texts and log-probabilities to the answers of OpenAI's API, chat and completions, whole and in chunks.

A `Call` is one HTTP request (not a tool's call) whose prompts the engine has taken. It describes outputs; it does not know how they
are sent. JSON is written piece by piece as tokens come, and joined at the end, so that a long answer delays no other.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from stallfree.core.request import Request
from stallfree.engine.detokenizer import KNOWN, Detokenizer, Pieces
from stallfree.engine.streams import Output
from stallfree.engine.text import Text
from stallfree.engine.thread import Outputs
from stallfree.executors.sampling import TokenLogprob
from stallfree.server.errors import ApiError

LEAST = -9999.0
"""Written for the logarithm of 0, which JSON cannot express."""

Columns = tuple[str, ...]
"""JSON of an output's log-probabilities: an entry for each of a dialect's lists."""


class Choice:
    """One request of a call: how many tokens it has, and at which character of its text the next token begins."""

    __slots__ = ("_detokenizer", "_offset", "echo", "index", "num_tokens", "request")

    def __init__(self, index: int, request: Request, echo: str = ""):
        self.index = index
        self.request = request
        self.echo = echo
        self.num_tokens = 0
        self._offset = len(echo)
        self._detokenizer: Detokenizer | None = None

    def offset(self, text: Text, token: int) -> int:
        """Characters before `token`, the next one. A token that continues a character begins where that character does."""
        if self._detokenizer is None:
            self._detokenizer = Detokenizer(text.pieces, self.request.prompt)
        first = text.pieces[token][:1]
        if first and not (b"\x80" <= first < b"\xc0" or text.pieces.special(token)):
            self._offset += len(self._detokenizer.flush())  # it does not continue the character before it
        offset, self._offset = self._offset, self._offset + len(self._detokenizer.push(token))
        return offset


class Call:
    """An HTTP request in the engine: its `choices` by request id, and their `outputs`. `n` choices share a prompt."""

    prefix: str
    object: str
    chunk_object: str
    operation: str
    lists: tuple[str, ...]
    constants: tuple[str, ...] = ()

    def __init__(self, model: str, text: Text, outputs: Outputs, choices: Sequence[Choice], n: int):
        self.id = f"{self.prefix}-{choices[0].request.id}"
        self.created = int(time.time())
        self.model = model
        self.outputs = outputs
        self.choices = {choice.request.id: choice for choice in choices}
        self._text = text
        self._prompts = [choice.request for choice in choices[::n]]

    def count(self, output: Output) -> Choice:
        """Count the output's tokens, and return its choice. Raises ApiError if the choice ended in an error."""
        if output.error is not None:
            shutting_down = output.finish_reason == "abort"
            raise ApiError(503 if shutting_down else 500, output.error, code="unavailable" if shutting_down else "engine_error")
        choice = self.choices[output.id]
        choice.num_tokens += len(output.tokens)
        return choice

    def usage(self) -> dict[str, Any]:
        prompt = sum(len(request.prompt) for request in self._prompts)
        completion = sum(choice.num_tokens for choice in self.choices.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(request.num_cached for request in self._prompts)},
        }

    async def whole(self) -> bytes:
        """The answer as JSON, after all choices have ended. Raises ApiError if one failed, or if the outputs were closed before."""
        texts = {id: [choice.echo] for id, choice in self.choices.items()}
        logprobs: dict[str, list[Columns]] = {id: [] for id in self.choices}
        last: dict[str, Output] = {}
        async for batch in self.outputs:
            for output in batch:
                choice = self.count(output)
                texts[output.id].append(output.text)
                if output.details is not None:
                    logprobs[output.id].append(self.logprobs(choice, output))
                if output.finish_reason is not None:
                    last[output.id] = output
        if len(last) < len(self.choices):
            raise ApiError(499, "the client has gone")
        choices = []
        for id, choice in self.choices.items():
            end = last[id]
            text, columns = self.text("".join(texts[id])), self.joined(logprobs[id])
            ending = f'"finish_reason": "{end.finish_reason}", "stop_reason": {json.dumps(end.stop_reason)}'
            choices.append(f'{{"index": {choice.index}, {text}, "logprobs": {columns}, {ending}}}')
            await asyncio.sleep(0)
        head = json.dumps(self._envelope(self.object))[:-1]
        return f'{head}, "choices": [{", ".join(choices)}], "usage": {json.dumps(self.usage())}}}'.encode()

    def chunk_head(self) -> str:
        """The JSON that begins every chunk of this call, up to the list of choices."""
        return json.dumps(self._envelope(self.chunk_object))[:-1] + ', "choices": ['

    def _envelope(self, object: str) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}

    def text(self, text: str) -> str:
        """A choice's text in a whole answer, as JSON members of the choice."""
        raise NotImplementedError

    def opening(self, choice: Choice) -> str | None:
        """JSON members of a choice in the first chunk; None if it needs no first chunk."""
        raise NotImplementedError

    def delta(self, text: str) -> str:
        """New text, as JSON members of a choice."""
        raise NotImplementedError

    def closing(self) -> str:
        """JSON members of a choice in the last chunk, next to the finish reason."""
        raise NotImplementedError

    def logprobs(self, choice: Choice, output: Output) -> Columns:
        """The log-probabilities of an output's token, an entry for each of `lists`."""
        raise NotImplementedError

    def joined(self, parts: Sequence[Columns]) -> str:
        """The log-probabilities of several outputs as one JSON value; null if none were requested."""
        if not parts:
            return "null"
        lists = (f'"{name}": [{", ".join(column)}]' for name, column in zip(self.lists, zip(*parts, strict=True), strict=True))
        return "{" + ", ".join([*lists, *self.constants]) + "}"


class Chat(Call):
    prefix, object, chunk_object, operation = "chatcmpl", "chat.completion", "chat.completion.chunk", "chat"
    lists, constants = ("content",), ('"refusal": null',)

    def text(self, text: str) -> str:
        return f'"message": {{"role": "assistant", "content": {json.dumps(text)}, "refusal": null}}'

    def opening(self, choice: Choice) -> str | None:
        return '"delta": {"role": "assistant", "content": ""}'

    def delta(self, text: str) -> str:
        return '"delta": {"content": ' + json.dumps(text) + "}"

    def closing(self) -> str:
        return '"delta": {}'

    def logprobs(self, choice: Choice, output: Output) -> Columns:
        details = cast(TokenLogprob, output.details)
        top = ", ".join([f"{{{self._entry(id, logprob)}}}" for id, logprob in details.top])
        return (f'{{{self._entry(output.tokens[0], details.logprob)}, "top_logprobs": [{top}]}}',)

    def _entry(self, id: int, logprob: float) -> str:
        token, raw = spelt(self._text.pieces, id)
        return f'"token": {token}, "logprob": {max(logprob, LEAST)!r}, "bytes": {raw}'


class Completions(Call):
    prefix, object, chunk_object, operation = "cmpl", "text_completion", "text_completion", "text_completion"
    lists = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def text(self, text: str) -> str:
        return self.delta(text)

    def opening(self, choice: Choice) -> str | None:
        return self.delta(choice.echo) if choice.echo else None

    def delta(self, text: str) -> str:
        return '"text": ' + json.dumps(text)

    def closing(self) -> str:
        return '"text": ""'

    def logprobs(self, choice: Choice, output: Output) -> Columns:
        details = cast(TokenLogprob, output.details)
        token = output.tokens[0]
        top: dict[str, float] = {}
        for id, logprob in details.top:
            top.setdefault(
                spelt(self._text.pieces, id)[0], max(logprob, LEAST)
            )  # several halves of characters have the same text: the first, the likeliest, stays
        return (
            spelt(self._text.pieces, token)[0],
            repr(max(details.logprob, LEAST)),
            "{" + ", ".join([f"{piece}: {logprob!r}" for piece, logprob in top.items()]) + "}",
            str(choice.offset(self._text, token)),
        )


@lru_cache(KNOWN)
def spelt(pieces: Pieces, id: int) -> tuple[str, str]:
    """A token's text and its bytes, both as JSON. Half a character is U+FFFD in the text."""
    return json.dumps(pieces[id].decode(errors="replace")), json.dumps(list(pieces[id]))
