"""A client of one OpenAI-compatible server: it sends completions and notes when tokens come. It chooses neither what nor when.

It does little work per token, because on a shared machine it takes time from the server: it reads bytes as they come, and a token
costs one `json.loads`.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from stallfree.bench.events import Events, message

KEEP_ALIVE_S = 2.0
"""Seconds of idling after which a connection is not used again. Servers close theirs after 5 s or more; a request that is sent at
that moment must be sent again."""


class Failed(Exception):
    """A request got no whole answer. `kind` is one of a few words: timeout, connection, HTTP 429, cut short, ..."""

    def __init__(self, kind: str, message: str, status: int | None = None):
        super().__init__(f"{kind}: {message}")
        self.kind, self.status = kind, status


class Client:
    """A client for use with `async with`. `url`: with or without /v1. `timeout_s`: for a request, from sending to its last token.

    If a connection ends before the first byte of an answer, the request is sent once more on a new one, because some servers close
    connections that they promised to keep. After that byte it is never sent again, so that no server answers a request twice.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 600.0):
        if not _is_url(url):
            raise ValueError(f"{url!r} is not a server's URL; write http://127.0.0.1:8000")
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"a timeout of {timeout_s:g} s is invalid; give seconds above 0")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> Self:
        self._kept = self._session(keepalive_timeout=KEEP_ALIVE_S)
        self._new = self._session(force_close=True)
        return self

    def _session(self, **connections: Any) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, **connections)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(), headers=self._headers)

    async def __aexit__(self, *_: object) -> None:
        await self._kept.close()
        await self._new.close()

    async def stream(self, body: bytes, most: int, times: list[float]) -> Events:
        """Send `body`, a streamed completion of at most `most` tokens. Fills `times` with the loop's times of the tokens that came,
        also if it fails. Raises Failed.
        """
        events, now = Events(most), asyncio.get_running_loop().time
        try:
            async with self._answer("POST", "completions", body) as response:
                while data := await response.content.readany():
                    events.feed(data, now())
                events.end(now())
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise _failed(error, bool(events.times()), self._timeout_s) from error
        finally:
            times[:] = events.times()
        if events.error is not None:
            raise Failed("server error", events.error)
        if not events.finished:
            raise Failed("cut short", f"the stream ended after {len(times)} tokens with neither finish_reason nor [DONE]")
        return events

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON at `path`; with a `body`, the answer to it. Raises Failed."""
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
        try:
            async with self._answer(method, path, data) as response:
                return json.loads(await response.read())
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
            raise _failed(error, False, self._timeout_s) from error

    @asynccontextmanager
    async def _answer(self, method: str, path: str, data: str | bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200, after its head has come. Raises Failed for another status."""
        request = method, f"{self.url}/v1/{path}"
        async with asyncio.timeout(self._timeout_s):
            try:
                response = await self._kept.request(*request, data=data)
            except aiohttp.ClientConnectionError as error:
                if isinstance(error, aiohttp.ClientConnectorError):  # no server listens
                    raise
                response = await self._new.request(*request, data=data)
            async with response:
                await _check(response)
                yield response


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in text
    except ValueError:  # such as an invalid port
        return False


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status == 200:
        return
    text = (await response.read()).decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):  # not OpenAI's error object: keep the text
        text = message(json.loads(text)["error"])
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
