"""A client of one OpenAI-compatible server: sends a completion and notes when its tokens come. What to ask, and when, is others'.

Written for little work per token, for what the client takes of a shared machine the server lacks: bytes are read as they come, and
a token costs one `json.loads`.
"""

import asyncio
import json
import os
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from stallfree.bench.events import Events, said

KEEP_ALIVE_S = 2.0
"""A connection that idles for longer is not used again. Servers close theirs after 5 s or more, and a request sent at that moment
would be lost."""


class Failed(Exception):
    """A request that got no whole answer. `kind` is one of few: timeout, connection, HTTP 429, cut short, ..."""

    def __init__(self, kind: str, message: str, status: int | None = None):
        super().__init__(f"{kind}: {message}")
        self.kind, self.status = kind, status


class Client:
    """For use with `async with`. `url` with or without /v1; `timeout_s` for each request, from its sending to its last token."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0):
        if not _is_url(url):
            raise ValueError(f"{url!r} is not a server's URL; write http://127.0.0.1:8000")
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"a timeout of {timeout_s:g} s cannot be; give seconds above 0")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def stream(self, body: bytes, times: list[float]) -> Events:
        """Send a completion that `body` says to stream; append the loop's time at which each token came. Raises Failed."""
        events, now = Events(), asyncio.get_running_loop().time
        try:
            async with self._session.post(f"{self.url}/v1/completions", data=body) as response:
                await _check(response)
                while data := await response.content.readany():
                    if count := events.feed(data):
                        times += [now()] * count
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise _failed(error, bool(times), self._timeout_s) from error
        if events.error is not None:
            raise Failed("server error", events.error)
        if not events.finished:
            raise Failed("cut short", f"the stream ended after {events.tokens} tokens with neither finish_reason nor [DONE]")
        return events

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What is at `path`, or what is answered to `body`. Raises Failed."""
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        try:
            async with self._session.request(method, f"{self.url}/v1/{path}", data=data) as response:
                await _check(response)
                return json.loads(await response.read())
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise _failed(error, False, self._timeout_s) from error


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in text
    except ValueError:  # such as a port that cannot be
        return False


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = (await response.read()).decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):  # not OpenAI's error object: what came will do
        text = said(json.loads(text)["error"])
    raise Failed(f"HTTP {response.status}", " ".join(text.split())[:500], response.status)


def _failed(error: Exception, begun: bool, timeout_s: float) -> Failed:
    match error:
        case TimeoutError():
            return Failed("timeout", f"no end within {timeout_s:g} s")
        case aiohttp.ClientPayloadError():
            return Failed("cut short", "the connection ended in the middle of the answer")
        case aiohttp.ClientConnectorError(errno=int(number)) if number > 0:
            return Failed("connection", os.strerror(number))
        case aiohttp.ClientError() | OSError():
            return Failed("cut short" if begun else "connection", str(error) or type(error).__name__)
        case _:
            return Failed("malformed", str(error))
