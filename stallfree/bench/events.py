"""A streamed completion's bytes, as they come, into the number of tokens they bring. It knows neither clock nor connection.

Servers differ in what an event is. If it tells the usage so far, that is the count; else the length of its `token_ids`, if it has
them; else it is one token, unless it only closes the stream. A last event that tells the whole usage brings what was not counted.
"""

import json
from typing import Any


class Events:
    """One stream. `tokens` so far; `prompt_tokens`, if told; `finished`: it was ended as streams should be; `error`: the server's
    message, if it sent one instead.
    """

    __slots__ = ("_rest", "error", "finished", "prompt_tokens", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        self.prompt_tokens: int | None = None
        self.finished = False
        self.error: str | None = None
        self._rest = b""

    def feed(self, data: bytes) -> int:
        """The number of tokens that came with `data`. Raises ValueError for an event that is no completion's."""
        before = self.tokens
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip())
        return self.tokens - before

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            self.finished = True
            return
        try:
            event = json.loads(data)
            if error := event.get("error"):
                self.error = said(error)
                return
            usage = event.get("usage")
            for choice in event["choices"]:
                self._choice(choice, bool(usage))
            if usage:
                self.prompt_tokens = usage["prompt_tokens"]
                self.tokens = max(self.tokens, usage["completion_tokens"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"an event is not a completion's: {data[:200].decode(errors='replace')}") from None

    def _choice(self, choice: dict[str, Any], counted: bool) -> None:
        ending = choice.get("finish_reason") is not None
        self.finished |= ending
        if counted:
            return
        if (ids := choice.get("token_ids")) is not None:
            self.tokens += len(ids)
        elif choice["text"] or not ending:
            self.tokens += 1


def said(error: Any) -> str:
    """The message of an `error` as OpenAI and others put it."""
    return str(error.get("message", error) if isinstance(error, dict) else error)
