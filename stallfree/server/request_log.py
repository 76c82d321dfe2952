"""One line in the log for each HTTP request, when it ends: which route, whose key, how it went. Never content, never a key.

Pure ASGI, around the door. The door puts an `Entry` into the request's scope, a route fills it in, and the log reads it at the end.
It knows nothing of what the routes do.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

LONGEST_PATH = 200
"""Characters of a path in the log. A client chooses the path, and a head may have 64 KiB."""
LEFT = 499
"""The status in the log of a request whose client left before an answer began, as nginx writes it. No client receives it."""


@dataclass
class Entry:
    """What the log tells about one request. `id`: the X-Request-Id of its answer. `key`: the name of its API key. A route fills in
    the rest: tokens, seconds from the request's head to its first token, and why each choice ended. None: not known.
    """

    id: str
    key: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter, init=False, repr=False)

    @classmethod
    def begin(cls, scope: Scope, id: str) -> Self:
        """A new entry for the request of `scope`, which keeps it."""
        entry = cls(id)
        scope.setdefault("state", {})["entry"] = entry
        return entry

    @classmethod
    def of(cls, scope: Scope) -> Self:
        """The entry of the request of `scope`, as the door has made it."""
        entry: Self = scope["state"]["entry"]
        return entry

    def first_token(self) -> None:
        """A token of the answer is there. Only the first call counts."""
        if self.ttft_s is None:
            self.ttft_s = time.perf_counter() - self._began

    def count(self, prompt_tokens: int, completion_tokens: int, finish_reasons: Iterable[str] = ()) -> None:
        """Set the tokens so far, over all choices. `finish_reasons`: of the choices that have ended since the last call."""
        self.prompt_tokens, self.completion_tokens = prompt_tokens, completion_tokens
        self.finish_reasons += finish_reasons


class RequestLog:
    """Wraps `app`, and logs each request in one line at level info, whatever the level of other loggers."""

    def __init__(self, app: ASGIApp):
        self._app = app
        log.setLevel(logging.INFO)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status: int | None = None
        whole = False

        async def watch(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            log.info("request", extra={"fields": _fields(scope, LEFT if status is None else status, whole, began)})


def _fields(scope: Scope, status: int, whole: bool, began: float) -> dict[str, Any]:
    """The line of a request that began at `began` (s). `whole`: its answer was sent to the end."""
    entry = scope.get("state", {}).get("entry") or Entry("-")
    ends = entry.finish_reasons if whole and status != LEFT else [*entry.finish_reasons, "abort"]
    path = scope.get("raw_path") or quote(scope["path"]).encode()  # raw: a line feed in it is still %0A
    return {
        "id": entry.id,
        "key": entry.key,
        "method": scope["method"],
        "path": path.decode("ascii", "backslashreplace")[:LONGEST_PATH],
        "status": status,
        "prompt_tokens": entry.prompt_tokens,
        "completion_tokens": entry.completion_tokens,
        "ttft_ms": None if entry.ttft_s is None else round(1e3 * entry.ttft_s, 1),
        "total_ms": round(1e3 * (time.perf_counter() - began), 1),
        "finish_reason": ",".join(dict.fromkeys(ends)) or None,
    }
