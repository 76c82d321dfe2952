"""One HTTP request whose prompts the engine has taken: a `Call` (not a tool's call), with the choices of its answer.

A dialect says how an answer is written, whole and as events. A call describes outputs; it does not know how they are sent. JSON is
written piece by piece as tokens come, and joined at the end, so that a long answer delays no other.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from stallfree.core.request import Request
from stallfree.engine.detokenizer import KNOWN, Detokenizer, Pieces
from stallfree.engine.streams import Output
from stallfree.engine.text import Text
from stallfree.engine.thread import Outputs
from stallfree.parsers.pieces import CallArguments, CallStart, Content, Parser, Piece, Reasoning
from stallfree.server.errors import ApiError
from stallfree.server.request_log import Entry

LEAST = -9999.0
"""Written for the logarithm of 0, which JSON cannot express."""

CALL_ID_BYTES = 12


class Offsets:
    """At which character of a text each token begins. The text has `start` characters, and continues that of the tokens
    `before`."""

    def __init__(self, pieces: Pieces, before: Sequence[int] = (), start: int = 0):
        self._pieces = pieces
        self._offset = start
        self._detokenizer = Detokenizer(pieces, before)

    def next(self, token: int) -> int:
        """Characters before `token`, the next one. A token that continues a character begins where that character does."""
        first = self._pieces[token][:1]
        if first and not (b"\x80" <= first < b"\xc0" or self._pieces.special(token)):
            self._offset += len(self._detokenizer.flush())  # it does not continue the character before it
        offset, self._offset = self._offset, self._offset + len(self._detokenizer.push(token))
        return offset


class Choice:
    """One request of a call. `parser`: finds the parts of its text; None: all of it is content. `call_ids`: of the tool calls that
    it has made. `scores`: of the prompt's tokens but the first, if they are wanted. `echoes_scores`, `shows_scores`: whether they
    come with the echoed prompt, and in a list of their own. `is_echo`: the answer is the prompt alone, though the engine samples a
    token. `hides_reasoning`: the client does not want it. `parallel`: more than one call counts."""

    __slots__ = (
        "call_ids", "echo", "echoes_scores", "hides_reasoning", "index", "is_echo", "offsets", "parallel", "parser", "request",
        "scores", "shows_scores",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        request: Request,
        echo: str,
        parser: Parser | None,
        *,
        hides_reasoning: bool,
        parallel: bool,
        is_echo: bool,
        echoes_scores: bool,
        shows_scores: bool,
    ):
        self.index = index
        self.request = request
        self.echo = echo
        self.parser = parser
        self.hides_reasoning, self.parallel = hides_reasoning, parallel
        self.is_echo, self.echoes_scores, self.shows_scores = is_echo, echoes_scores, shows_scores
        self.call_ids: list[str] = []
        self.scores: Sequence[object] = ()
        self.offsets: Offsets | None = None

    def pieces(self, output: Output) -> list[Piece]:
        """The parts of the answer that are certain after `output`."""
        if self.parser is None:
            return [Content(output.text)] if output.text else []
        pieces = self.parser.push(output.text) if output.text else []
        if output.finish_reason is not None:
            pieces += self.parser.end()
        if not self.parallel:
            pieces = [piece for piece in pieces if not isinstance(piece, CallStart | CallArguments) or piece.index == 0]
        self.call_ids += [f"call_{secrets.token_hex(CALL_ID_BYTES)}" for piece in pieces if isinstance(piece, CallStart)]
        if self.hides_reasoning:
            pieces = [piece for piece in pieces if not isinstance(piece, Reasoning)]
        return pieces

    def finish_reason(self, output: Output) -> str:
        """Why the answer ended, as OpenAI names it."""
        if self.is_echo:
            return "length"
        return "tool_calls" if self.call_ids and output.finish_reason == "stop" else str(output.finish_reason)


class Call:
    """An HTTP request in the engine: its `choices` by request id, and their `outputs`. `n` choices share a prompt. `entry`: what
    the log tells about it. `service_tier`: the class that the answer names, if it names one. `ended` is called once nothing more
    is sent. A dialect's class writes the answer."""

    prefix: str
    operation: str
    """The operation's name in traces (OpenTelemetry's conventions for generative AI)."""
    fields: ClassVar[Mapping[str, str]] = {}
    """The API's own names of a chat's fields, where they differ."""

    def __init__(
        self,
        model: str,
        text: Text,
        outputs: Outputs,
        choices: Sequence[Choice],
        n: int,
        entry: Entry,
        *,
        service_tier: str | None = None,
    ):
        self.id = f"{self.prefix}{choices[0].request.id}"
        self.created = int(time.time())
        self.model = model
        self.service_tier = service_tier
        self.ended: Callable[[], None] = lambda: None
        self.outputs = outputs
        self.choices = {choice.request.id: choice for choice in choices}
        self._text = text
        self._log_entry = entry
        self._prompts = [choice.request for choice in choices[::n]]
        self.prompt_tokens = sum(len(request.prompt) for request in self._prompts)
        self.completion_tokens = 0

    def count(self, output: Output) -> Choice:
        """Count the output's tokens, and return its choice. Raises ApiError if the choice ended in an error."""
        if output.error is not None:
            shutting_down = output.finish_reason == "abort"
            raise ApiError(503 if shutting_down else 500, output.error, code="unavailable" if shutting_down else "engine_error")
        choice = self.choices[output.id]
        if not choice.scores:
            choice.scores = output.scores
        if output.tokens:
            self._log_entry.first_token()
        self.completion_tokens += 0 if choice.is_echo else len(output.tokens)
        ends = () if output.finish_reason is None else (output.finish_reason,)
        self._log_entry.count(self.prompt_tokens, self.completion_tokens, ends)
        return choice

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return sum(request.num_cached for request in self._prompts)

    async def whole(self) -> bytes:
        """The answer as JSON, after all choices have ended. Raises ApiError if one failed, or if the outputs were closed before."""
        unfinished = len(self.choices)
        async for batch in self.outputs:
            for output in batch:
                self.take(self.count(output), output)
                unfinished -= output.finish_reason is not None
        if unfinished:
            raise ApiError(499, "the client has gone")
        return await self.joined()

    def take(self, choice: Choice, output: Output) -> None:
        """Add an output of `choice` to the whole answer."""
        raise NotImplementedError

    async def joined(self) -> bytes:
        """The whole answer as JSON, once all choices have ended."""
        raise NotImplementedError

    def opening(self) -> str:
        """The events with which a stream begins."""
        raise NotImplementedError

    def events(self, choice: Choice, output: Output) -> str:
        """The events for an output of `choice`."""
        raise NotImplementedError

    def ending(self) -> str:
        """The events with which a stream ends, once all choices have ended."""
        raise NotImplementedError

    def failure(self, error: ApiError) -> str:
        """The events with which a stream ends that has failed."""
        raise NotImplementedError


@lru_cache(KNOWN)
def spelt(pieces: Pieces, id: int) -> tuple[str, str]:
    """A token's text and its bytes, both as JSON. Half a character is U+FFFD in the text."""
    return json.dumps(pieces[id].decode(errors="replace")), json.dumps(list(pieces[id]))


async def breathe() -> None:
    """Let other tasks run between two parts of a long answer."""
    await asyncio.sleep(0)


def event(data: dict[str, Any] | str, name: str = "") -> str:
    """A server-sent event, with `data` as JSON."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"
