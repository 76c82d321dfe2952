"""Checks every request before a route sees it: its id, the API key, and a body that is neither too large nor too slow.

Pure ASGI, around the app. It knows only the routes that need no key. An exception that no route handles becomes a 500 here. It
begins the request's entry in the log.
"""

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stallfree.server.errors import ApiError, shown
from stallfree.server.keys import Keys
from stallfree.server.request_log import Entry

log = logging.getLogger(__name__)

BODY_TIMEOUT_S = 30.0
"""Seconds within which a whole body must arrive."""
MOST_ARRIVING = 64
"""Bodies of the largest size that may be arriving at once: with 4 MiB each, 256 MiB of memory."""
SMALL = 64 << 10
"""Bytes of a body that is taken even then: large bodies must not keep out what most clients send."""
KEYLESS = ("/", "/health", "/health/live", "/health/ready")
"""Routes that need no key, besides the page's files under /live/: they tell nothing about the model or its users."""


ADAPTERS = ("/v1/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Routes of adapters. To change them takes the admin key, if there is one; it may also look."""


class Opens(Protocol):
    """What knows the keys: `Keys`, or `Tenants`, whose keys may change."""

    def check(self, scope: Scope) -> str | None:
        """The name of a request's key; None if no key is needed. Raises ApiError if it has no key, or a wrong one."""


class Door:
    """Wraps `app`. If there are `keys`, requests need one of them; those that change adapters need the `admin` key if there is one.
    Bodies hold at most `max_body_bytes`. Pages of other sites than `origins` (`*`: all) may send none: a browser would let them,
    though not read the answer.
    """

    def __init__(self, app: ASGIApp, *, keys: Opens, max_body_bytes: int, admin: Keys | None = None, origins: Sequence[str] = ()):
        self._app = app
        self._keys, self._admin = keys, admin
        self._origins = {origin.encode() for origin in origins}
        self._max_body_bytes = max_body_bytes
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = request_id(dict(scope["headers"]).get(b"x-request-id", b""))
        entry = Entry.begin(scope, id)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        try:
            if not (scope["path"] in KEYLESS or scope["path"].startswith("/live/")):  # the page's files, not its data
                entry.key = self._key(scope)
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                self._check_site(dict(scope["headers"]))
                body = await self._read(scope, receive)
                # Every body is read as JSON, whatever its Content-Type: curl sends that of a form by default.
                MutableHeaders(scope=scope)["Content-Type"] = "application/json"
                receive = _again(body, receive)
            await self._app(scope, receive, send_with_id)
        except _Gone:
            pass
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server shuts down; uvicorn would log this with a traceback
            if not started:
                await ApiError(503, "the server is shutting down", code="unavailable").response(scope["path"])(
                    scope, receive, send_with_id
                )
        except Exception:
            log.exception("request %s: a bug in the server", id)
            if started:
                raise
            await ApiError(500, "the server has a bug; its log says more", code="internal_error").response(scope["path"])(
                scope, receive, send_with_id
            )

    def _key(self, scope: Scope) -> str | None:
        """The name of a request's key. Raises ApiError if it has no key that opens its route."""
        if not (self._admin and _is_of_adapters(scope)):
            return self._keys.check(scope)
        try:
            return self._admin.check(scope)
        except ApiError as error:
            if scope["method"] not in ("POST", "DELETE"):
                return self._keys.check(scope)
            message = "changing adapters needs the admin key: send `Authorization: Bearer <admin key>`"
            raise ApiError(401, message, code="invalid_api_key", headers=error.headers) from None

    def _check_site(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises ApiError for what a page of another site sends, as its browser says (Fetch Metadata)."""
        origin = headers.get(b"origin", b"")
        if headers.get(b"sec-fetch-site") == b"cross-site" and not self._origins & {b"*", origin}:
            message = (
                f"pages of {shown(origin.decode(errors='replace'))} may not call this server; start it with --allow-origin ORIGIN"
            )
            raise ApiError(403, message, code="origin_not_allowed")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Too large is one whose Content-Length says so, or that grows too large as it arrives."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        body = bytearray()
        size = int(length) if length.isdigit() else 0
        more = True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more and size <= self._max_body_bytes:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise _Gone
                    part = event.get("body", b"")
                    body += part
                    self._arriving += len(part)
                    if len(body) > SMALL and self._arriving > MOST_ARRIVING * self._max_body_bytes:
                        busy = "too many large bodies are arriving at once; try again later"
                        raise ApiError(503, busy, code="busy", headers={"Retry-After": "1", "Connection": "close"})
                    size = max(size, len(body))
                    more = event.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="body_timeout", headers={"Connection": "close"}
            ) from None
        finally:
            self._arriving -= len(body)
        if size > self._max_body_bytes:
            # The connection stays open, so that the client can read the answer; the rest of its body is dropped as it arrives.
            message = f"the body is larger than the {self._max_body_bytes} bytes that are accepted"
            raise ApiError(413, message, code="body_too_large")
        return bytes(body)


def _is_of_adapters(scope: Scope) -> bool:
    path: str = scope["path"]
    return path in ADAPTERS or path.startswith("/v1/adapters/")


class _Gone(Exception):
    """The client disconnected before its whole request arrived."""


def request_id(header: bytes) -> str:
    """The client's id: the first 128 printable ASCII characters of the `header`. A new id if it has none."""
    return "".join(chr(byte) for byte in header if 0x21 <= byte <= 0x7E)[:128] or secrets.token_hex(16)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns `body` first, then the messages after it: that the client has disconnected."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
