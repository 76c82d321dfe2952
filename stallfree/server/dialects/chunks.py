"""OpenAI's two older APIs, chat and completions: an answer has choices, and a stream has a chunk of JSON for each output.

The constant beginning of a chunk is made once per stream, so that a token costs one `json.dumps` of its text.
"""

import json
from collections.abc import Sequence
from typing import Any, cast

from stallfree.engine.streams import Output
from stallfree.executors.sampling import Score
from stallfree.server.dialects.call import LEAST, Call, Choice, breathe, event, spelt
from stallfree.server.errors import ApiError

SOME = 256
"""Tokens of a prompt whose log-probabilities are written at once, in about 2 ms."""
DONE = event("[DONE]")

Columns = tuple[str, ...]
"""JSON of an output's log-probabilities: an entry for each of a dialect's lists."""


class Chunked(Call):
    """A call whose stream is chunks. The usage is in an extra last chunk (`include_usage`), or in every chunk (`continuous_usage`
    too). `object`, `chunk_object`: names of a whole answer and of a chunk. `lists`, `constants`: of log-probabilities.
    `prompt_in_choice`: where vLLM has those of the prompt, in each choice or once."""

    object: str
    chunk_object: str
    lists: tuple[str, ...]
    constants: tuple[str, ...] = ()
    prompt_in_choice = True
    include_usage = False
    continuous_usage = False

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._head = "data: " + self._envelope(self.chunk_object)[:-1] + ', "choices": ['
        self._logprobs: dict[str, list[Columns]] = {id: [] for id in self.choices}
        self._last: dict[str, Output] = {}

    def usage(self) -> str:
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        return json.dumps(usage)

    def take(self, choice: Choice, output: Output) -> None:
        self.add(choice, output)
        if output.details is not None and not choice.is_echo:
            self._logprobs[output.id].append(self.logprobs(choice, output))
        if output.finish_reason is not None:
            self._last[output.id] = output

    async def joined(self) -> bytes:
        choices, prompt = [], ""
        for id, choice in self.choices.items():
            last = self._last[id]
            members = self.members(choice)
            logprobs = self._columns([*await self.of_prompt(choice), *self._logprobs[id]])
            ending = f'"finish_reason": "{choice.finish_reason(last)}", "stop_reason": {json.dumps(last.stop_reason)}'
            prompt = await self._prompt_logprobs(choice) if choice.shows_scores else ""
            own = prompt if self.prompt_in_choice else ""
            choices.append(f'{{"index": {choice.index}, {members}, "logprobs": {logprobs}, {ending}{own}}}')
            await breathe()
        top = f'{self._envelope(self.object)[:-1]}, "choices": [{", ".join(choices)}], "usage": {self.usage()}'
        return f"{top}{'' if self.prompt_in_choice else prompt}}}".encode()

    def opening(self) -> str:
        openings = ((choice, self.first(choice)) for choice in self.choices.values())
        return "".join(self._chunk(choice, members) for choice, members in openings if members is not None)

    def events(self, choice: Choice, output: Output) -> str:
        deltas = self.deltas(choice, output)
        logprobs = "null"
        if output.details is not None and not choice.is_echo:
            logprobs = self._columns([self.logprobs(choice, output)])
            deltas = deltas or [self.nothing]
        events = "".join(self._chunk(choice, members, "null" if at else logprobs) for at, members in enumerate(deltas))
        if output.finish_reason is not None:
            reason = f'"{choice.finish_reason(output)}", "stop_reason": {json.dumps(output.stop_reason)}'
            events += self._chunk(choice, self.last, "null", reason)
        return events

    def ending(self) -> str:
        return (f'{self._head}], "usage": {self.usage()}}}\n\n' if self.include_usage else "") + DONE

    def failure(self, error: ApiError) -> str:
        return event(error.body().decode()) + DONE

    async def of_prompt(self, choice: Choice) -> list[Columns]:
        """The log-probabilities of an echoed prompt, as `logprobs` has those of an answer."""
        return []

    def add(self, choice: Choice, output: Output) -> None:
        """Add an output's text to the whole answer."""
        raise NotImplementedError

    def members(self, choice: Choice) -> str:
        """A choice's text in a whole answer, as JSON members of the choice."""
        raise NotImplementedError

    def first(self, choice: Choice) -> str | None:
        """JSON members of a choice in the first chunk; None if it needs no first chunk."""
        raise NotImplementedError

    def deltas(self, choice: Choice, output: Output) -> list[str]:
        """What is new in an output: JSON members of the choice, for a chunk each."""
        raise NotImplementedError

    nothing: str
    """JSON members of a choice in a chunk that has log-probabilities, but no text yet."""
    last: str
    """JSON members of a choice in the last chunk, next to the finish reason."""

    def logprobs(self, choice: Choice, output: Output) -> Columns:
        """The log-probabilities of an output's token, an entry for each of `lists`."""
        raise NotImplementedError

    async def _prompt_logprobs(self, choice: Choice) -> str:
        """A member of the choice: for each token of the prompt its log-probability and the most probable ones, by id, as vLLM has
        them; null for the first token."""
        entries, pieces = ["null"], self._text.pieces
        for token, score in zip(choice.request.prompt[1:], cast(Sequence[Score], choice.scores), strict=True):
            ranked = {id: (logprob, rank) for rank, (id, logprob) in enumerate(score.top, 1)}
            ranked[token] = (score.logprob, score.rank)
            members = [
                f'"{id}": {{"logprob": {max(logprob, LEAST)!r}, "rank": {rank}, "decoded_token": {spelt(pieces, id)[0]}}}'
                for id, (logprob, rank) in ranked.items()
            ]
            entries.append("{" + ", ".join(members) + "}")
            if len(entries) % SOME == 0:
                await breathe()
        return f', "prompt_logprobs": [{", ".join(entries)}]'

    def _columns(self, parts: Sequence[Columns]) -> str:
        """The log-probabilities of several outputs as one JSON value; null if none were requested."""
        if not parts:
            return "null"
        lists = (f'"{name}": [{", ".join(column)}]' for name, column in zip(self.lists, zip(*parts, strict=True), strict=True))
        return "{" + ", ".join([*lists, *self.constants]) + "}"

    def _envelope(self, object: str) -> str:
        values = {"id": self.id, "object": object, "created": self.created, "model": self.model}
        return json.dumps(values if self.service_tier is None else values | {"service_tier": self.service_tier})

    def _chunk(self, choice: Choice, members: str, logprobs: str = "null", finish_reason: str = "null") -> str:
        usage = ""
        if self.include_usage:
            usage = f', "usage": {self.usage() if self.continuous_usage else "null"}'
        ending = f', "logprobs": {logprobs}, "finish_reason": {finish_reason}}}]{usage}}}\n\n'
        return f'{self._head}{{"index": {choice.index}, {members}{ending}'
