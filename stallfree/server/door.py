"""What every request passes before a route sees it: its id, the API key, and a body that is neither too large nor too slow.

Pure ASGI, around the app; it knows no route but those that need no key. Whatever escapes a route ends here as a 500.
"""

import asyncio
import hmac
import logging
import secrets

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stallfree.server.errors import ApiError

log = logging.getLogger(__name__)

BODY_TIMEOUT_S = 30.0
"""Seconds in which a body must have arrived."""


class Door:
    """Wraps `app`. With an `api_key`, requests need `Authorization: Bearer <key>`. Bodies hold at most `max_body_bytes`."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int):
        self._app = app
        self._authorization = None if api_key is None else b"Bearer " + api_key.encode()
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        id = request_id(dict(scope["headers"]).get(b"x-request-id", b""))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["X-Request-Id"] = id
            await send(message)

        try:
            self._check_key(scope)
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                body = await self._read(scope, receive)
                # Every body is JSON here, whatever its type says: curl says form unless told otherwise.
                MutableHeaders(scope=scope)["Content-Type"] = "application/json"
                receive = _again(body, receive)
            await self._app(scope, receive, send_with_id)
        except _Gone:
            pass
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        except asyncio.CancelledError:  # by the server that shuts down, which would log it with a traceback
            if not started:
                await ApiError(503, "the server is shutting down", code="unavailable").response()(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s: a bug in the server", id)
            if started:
                raise
            await ApiError(500, "the server has a bug; its log says more", code="internal_error").response()(
                scope, receive, send_with_id
            )

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if self._authorization is None or path in ("/", "/health") or path.startswith("/live/"):  # the page's files, not its data
            return
        given = dict(scope["headers"]).get(b"authorization")
        if given is None or not hmac.compare_digest(given, self._authorization):
            what = "missing: send `Authorization: Bearer <key>`" if given is None else "wrong"
            raise ApiError(401, f"the API key is {what}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body. Its length is believed if it is said to be too large, and counted as it arrives in any case."""
        said = dict(scope["headers"]).get(b"content-length", b"")
        body = bytearray()
        size = int(said) if said.isdigit() else 0
        more = True
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while more and size <= self._max_body_bytes:
                    part = await receive()
                    if part["type"] == "http.disconnect":
                        raise _Gone
                    body += part.get("body", b"")
                    size = max(size, len(body))
                    more = part.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="body_timeout", headers={"Connection": "close"}
            ) from None
        if size > self._max_body_bytes:
            # The connection stays open: what the client is still sending is dropped as it comes, so that it can read the answer.
            message = f"the body is larger than the {self._max_body_bytes} bytes that are accepted"
            raise ApiError(413, message, code="body_too_large")
        return bytes(body)


class _Gone(Exception):
    """The client went away before its request was whole."""


def request_id(given: bytes) -> str:
    """The client's own, without what is not printable ASCII and after 128 characters; a new one if nothing is left."""
    return "".join(chr(byte) for byte in given if 0x21 <= byte <= 0x7E)[:128] or secrets.token_hex(16)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body` first, and then what comes after it: the news that the client has gone."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
