"""Turns the bytes of a streamed completion into the times of its tokens. It knows neither clock nor connection.

Servers differ in what an event is. If it has the usage so far, it brings the tokens since the last usage. Without usage it counts
as many tokens as it has `token_ids`; without these, one, unless it only closes the stream. A usage at the end alone is shared among
all events: events without text get tokens only if some are left, and more than one token an event goes to the longest. An event
without text before the first text, such as one that only names the role, is no token unless the usage says so.
"""

import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

TEXTS = ("text", "content", "reasoning_content", "reasoning")
"""Names of the fields with text, in a choice or in its delta."""


class _Event(NamedTuple):
    """An event: when it came; its number of characters, or of token ids if that is larger; its token ids' number, if it has any."""

    at: float
    size: int
    ids: int | None


class Events:
    """One stream, of a request for at most `most` tokens. `prompt_tokens`: if the server reported them. `finished`: the stream
    ended properly. `error`: the server's message, if it sent an error.
    """

    __slots__ = ("_bare", "_most", "_rest", "_times", "_uncounted", "_usage", "error", "finished", "prompt_tokens")

    def __init__(self, most: int) -> None:
        self.prompt_tokens: int | None = None
        self.finished = False
        self.error: str | None = None
        self._most = most
        self._rest = b""
        self._times: list[float] = []  # of the tokens that a usage has counted
        self._usage = 0  # the last usage, in tokens
        self._uncounted: list[_Event] = []  # events since then
        self._bare = False  # an event had text and no usage

    @property
    def usage(self) -> str:
        """Whether the usage came in "every" event with text, at the "end", or not at all ("")."""
        return "" if not self._usage else "end" if self._bare else "every"

    def times(self) -> list[float]:
        """The times of the tokens so far."""
        first = next((i for i, event in enumerate(self._uncounted) if event.size), len(self._uncounted))
        events = self._uncounted[first:]
        if self._usage + len(events) > self._most:
            events = [event for event in events if event.size]
        return self._times + [event.at for event in events for _ in range(1 if event.ids is None else event.ids)]

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that came at `now`. Raises ValueError for an event that is no completion's."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (event := line[5:].strip()):
                self._event(event, now)

    def end(self, now: float) -> None:
        """Take the end of the connection, perhaps within a line."""
        self.feed(b"\n", now)

    def _event(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            event = json.loads(data)
            if error := event.get("error"):
                self.error = message(error)
                return
            usage = event.get("usage")
            choices = (event.get("choices") or ()) if usage else event["choices"]
            self._uncounted += (new for choice in choices if (new := self._choice(choice, now)) is not None)
            if usage:
                self.prompt_tokens = usage["prompt_tokens"]
                self._count(usage["completion_tokens"], len(choices), now)
            else:
                self._bare |= any(event.size for event in self._uncounted[-1:])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"an event is not a completion's: {data[:200].decode(errors='replace')}") from None

    def _choice(self, choice: dict[str, Any], now: float) -> _Event | None:
        ending = choice.get("finish_reason") is not None
        self.finished |= ending
        fields = choice if "delta" not in choice else choice["delta"] or {}
        ids = choice.get("token_ids")
        size = max(sum(len(fields.get(name) or "") for name in TEXTS), len(ids or ()))
        if not size and ending:
            return None
        if "delta" not in choice and not any(name in choice for name in TEXTS):
            raise LookupError("text")
        return _Event(now, size, None if ids is None else len(ids))

    def _count(self, tokens: int, choices: int, now: float) -> None:
        """Count the tokens of a usage: `tokens` so far, at `now`, in an event with `choices` choices."""
        number, events = tokens - self._usage, self._uncounted
        if number > 0:
            self._times += [now] * number if len(events) <= choices else _shared(events, number)
        self.finished |= not choices and tokens > 0
        self._usage = max(tokens, self._usage)
        # A usage of 0 tells nothing about texts: some servers send it first, and the true one last.
        self._uncounted = [] if self._usage else [event for event in events if event.size]


def _shared(events: Sequence[_Event], number: int) -> list[float]:
    """The times of `number` tokens, shared among the `events` that brought them."""
    ids = [event.ids for event in events]
    if number == sum(count or 0 for count in ids):
        return [event.at for event, count in zip(events, ids, strict=True) for _ in range(count or 0)]
    sized = [i for i, event in enumerate(events) if event.size]
    if sized:
        empty = [i for i, event in enumerate(events) if not event.size and i > sized[0]]
        chosen = sorted(sized + empty[: max(0, number - len(sized))])
    else:
        chosen = list(range(len(events)))[-number:]
    if number < len(chosen):  # evenly, from the first on
        return [events[chosen[i * len(chosen) // number]].at for i in range(number)]
    weights = [events[i].size if sized else 1 for i in chosen]
    ends = [round((number - len(chosen)) * upto / sum(weights)) for upto in accumulate(weights)]
    return [events[i].at for i, begin, end in zip(chosen, [0, *ends], ends, strict=False) for _ in range(1 + end - begin)]


def message(error: Any) -> str:
    """The message in an `error` field, in the form of OpenAI or of others."""
    return str(error.get("message", error) if isinstance(error, dict) else error)
