"""A router. It passes each request on to the decode server with the fewest requests, and names the prefill engine with the fewest
prompt tokens to compute, as far as the router knows. It names none while all have too many.

It reads only the length of a prompt, and whether a stream has its first token. All else passes unchanged, the API key too. It sends
nothing to a server that is down, until its /health answers 200.
"""

import asyncio
import json
import logging
import operator
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from math import inf
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry
from starlette.types import Receive, Scope, Send

import stallfree
from stallfree.server import errors
from stallfree.server.app import MAX_BODY_BYTES
from stallfree.server.door import Door
from stallfree.server.errors import ApiError
from stallfree.server.intake import HERE, PREFILL
from stallfree.server.keys import Keys
from stallfree.server.schema import Health

log = logging.getLogger(__name__)

HEALTH_S = 2.0
"""Seconds between two health checks of a server, and the longest that one may take."""
CHARACTERS = 4
"""Characters per token, a rough guess. Its error is the same for all engines."""
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
POST_PATHS = (*GENERATING, "/v1/messages/count_tokens", "/tokenize", "/detokenize")
GET_PATHS = ("/v1/models", "/v1/models/{name:path}", "/version")
KEPT_BACK = {"host", "content-length", "connection", "transfer-encoding", "accept-encoding", "expect", PREFILL}
"""Request headers that the router does not pass on."""
PASSED = ("content-type", "cache-control", "retry-after", "www-authenticate")
"""Response headers that the router passes on."""

OUTCOMES = ("answered", "refused", "failed", "broken", "left")
"""How a request ends at a server. `answered`: in full. `refused`: with a status from 400 to 499. `failed`: without an answer, or
with a status from 500. `broken`: in the middle. `left`: its client went away, or the router shut down."""
ENDING = ApiError(503, "the router is shutting down", code="unavailable")


def _ending(error: ApiError) -> bytes:
    """The last events of a stream that breaks off with `error`."""
    return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


class _Server:
    """A decode server: whether it is `up`, how many `outstanding` requests of this router it has, and how the others ended."""

    def __init__(self, url: str):
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--decode {url!r} is not a server's URL; write http://127.0.0.1:8001, with commas between several")
        self.url = url.strip().rstrip("/").removesuffix("/v1")
        self.up = True
        self.outstanding = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)


class Router:
    """Passes requests on to `decodes` (URLs), and names one of `prefills` (host:port), if there are any. While each of these has
    more than `spill` prompt tokens to compute, it names none, and the decode server computes the prompt.
    """

    def __init__(self, decodes: Sequence[str], prefills: Sequence[str] = (), spill: int | None = None):
        self.servers = [_Server(url) for url in decodes]
        self.pending = dict.fromkeys(prefills, 0)
        self.spill = inf if spill is None else spill
        self.draining = False
        self.ending = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=HEALTH_S)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, auto_decompress=False)
        await asyncio.gather(*map(self._check_health, self.servers))
        self._watching = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def shut(self) -> None:
        for task in self._watching:
            task.cancel()
        await self.session.close()

    async def close(self, drain_timeout_s: float) -> None:
        """Take no new requests. Give the others `drain_timeout_s` to finish, then end them with an error."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                while self.unfinished:
                    await asyncio.sleep(0.05)
        self.ending.set()

    @property
    def unfinished(self) -> int:
        """How many requests have not ended."""
        return sum(server.outstanding for server in self.servers)

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the router has not been opened")
        return self._session

    async def pass_on(self, request: Request, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer of the server with the fewest requests; if it gives none, of the next. ApiError if no server answers."""
        if self.draining:
            raise ENDING
        failures = []
        for server in sorted((server for server in self.servers if server.up), key=lambda server: server.outstanding):
            prompt = _Prompt(self.pending, self.spill, request.url.path, body)
            server.outstanding += 1
            outcome = "left"
            try:
                outcome = await self._through(server, prompt, request, body, scope, receive, send)
                return
            except asyncio.CancelledError:
                if self.ending.is_set():
                    raise ENDING from None
                raise
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                outcome = "failed"
                log.warning("decode server %s did not answer: %s", server.url, error or type(error).__name__)
                failures.append(f"{server.url} did not answer ({type(error).__name__})")
                await self._check_health(server)
            finally:
                prompt.computed()
                server.outstanding -= 1
                server.outcomes[outcome] += 1
        down = [f"{s.url} is down" for s in self.servers if not s.up and not any(s.url in failure for failure in failures)]
        raise ApiError(503, "no decode server answers: " + ", ".join(failures + down), code="unavailable")

    async def _through(
        self, server: _Server, prompt: "_Prompt", request: Request, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> str:
        """Send the server's answer. Returns its outcome, one of `OUTCOMES`."""
        headers = {name: value for name, value in request.headers.items() if name not in KEPT_BACK}
        if prompt.named is not None:
            headers[PREFILL] = prompt.named
        url = server.url + request.url.path
        async with self.session.request(request.method, url, data=body or None, headers=headers) as answer:
            if answer.status == 503:
                raise aiohttp.ClientError("status 503: it takes no requests")
            passed = {name: answer.headers[name] for name in PASSED if name in answer.headers}
            if answer.content_type != "text/event-stream":
                await Response(await answer.read(), answer.status, passed)(scope, receive, send)
                return "answered" if answer.status < 400 else "refused" if answer.status < 500 else "failed"
            start = {"type": "http.response.start", "status": answer.status}
            await send(start | {"headers": [(name.encode(), value.encode("latin-1")) for name, value in passed.items()]})
            try:
                async for events in answer.content.iter_any():
                    prompt.receive(events)
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                outcome, last = "answered", b""
            except (aiohttp.ClientError, OSError) as error:  # too late for another server: the client has some of it
                log.warning("decode server %s broke off: %s", server.url, error)
                outcome = "broken"
                last = _ending(ApiError(502, "the decode server broke off in the middle of the answer", code="engine_error"))
            except asyncio.CancelledError:
                if not self.ending.is_set():
                    raise
                outcome, last = "left", _ending(ENDING)
            await send({"type": "http.response.body", "body": last, "more_body": False})
            return outcome

    async def _watch(self, server: _Server) -> None:
        while True:
            await asyncio.sleep(HEALTH_S)
            await self._check_health(server)

    async def _check_health(self, server: _Server) -> None:
        up = False
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            timeout = aiohttp.ClientTimeout(total=HEALTH_S)
            async with self.session.get(f"{server.url}/health", timeout=timeout) as answer:
                up = answer.status == 200
        if up != server.up:
            log.warning("decode server %s is %s", server.url, "up" if up else "down")
        server.up = up


class _Prompt:
    """A request's prompt. It is pending at the prefill engine `named` until its first token passes, or the request ends."""

    def __init__(self, pending: dict[str, int], spill: float, path: str, body: bytes):
        self._pending = pending
        self._tokens, self._openings = _size(path, body) if path in GENERATING else (0, 0)
        self.named = min(pending, key=lambda name: pending[name]) if pending and path in GENERATING else None
        self._is_pending = False
        if self.named is not None and pending[self.named] > spill:
            self.named = HERE
        elif self.named is not None:
            self._is_pending = True
            pending[self.named] += self._tokens

    def receive(self, events: bytes) -> None:
        """Count `events` of the stream. The first ones may be openings, without a token."""
        if self._is_pending:
            self._openings -= events.count(b"data: ")
            if self._openings < 0:
                self.computed()

    def computed(self) -> None:
        if self._is_pending and self.named is not None:
            self._pending[self.named] -= self._tokens
            self._is_pending = False


def _size(path: str, body: bytes) -> tuple[int, int]:
    """About how many tokens a body's prompts have, and how many events of its stream come before the first token."""
    with suppress(ValueError, TypeError, AttributeError, LookupError, RecursionError):  # the server refuses a malformed body
        fields: dict[str, Any] = json.loads(body)
        n = operator.index(fields.get("n") or 1)
        if path == "/v1/chat/completions":
            return sum(len(json.dumps(message.get("content"))) for message in fields["messages"]) // CHARACTERS, n
        if path in ("/v1/responses", "/v1/messages"):  # two events tell of the answer before its first token
            return len(json.dumps([fields.get("input"), fields.get("system"), fields.get("messages")])) // CHARACTERS, 2
        field = fields.get("prompt") or ""
        prompts = [field] if isinstance(field, str) or isinstance(field[0], int) else field
        tokens = sum(len(prompt) // CHARACTERS if isinstance(prompt, str) else len(prompt) for prompt in prompts)
        return tokens, len(prompts) * n if fields.get("echo") else 0
    return 0, 0


class _PassedOn(Response):
    """The answer to `request`, of the first server that gives one. It is given up when the client disconnects."""

    def __init__(self, router: Router, request: Request, body: bytes):
        super().__init__()
        self._router, self._request, self._body = router, request, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        passing = asyncio.create_task(self._router.pass_on(self._request, self._body, scope, receive, send))
        leaving = asyncio.create_task(gone())
        ending = asyncio.create_task(self._router.ending.wait())
        try:
            await asyncio.wait({passing, leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done() and not passing.done():
                passing.cancel()  # it still sends the reason
                await asyncio.wait({passing})
            if passing.done():
                await passing
        finally:
            for task in (passing, leaving, ending):
                task.cancel()
            await asyncio.gather(passing, leaving, ending, return_exceptions=True)


class _Metrics(Collector):
    """A router's state as Prometheus metrics."""

    def __init__(self, router: Router):
        self._router = router

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "stallfree_router_requests", "Requests that have ended, by server and outcome.", labels=("server", "outcome")
        )
        outstanding = GaugeMetricFamily("stallfree_router_outstanding_requests", "Requests at a server now.", labels=("server",))
        up = GaugeMetricFamily("stallfree_router_server_up", "1 for a server that answers, else 0.", labels=("server",))
        for server in self._router.servers:
            for outcome, number in server.outcomes.items():
                requests.add_metric((server.url, outcome), number)
            outstanding.add_metric((server.url,), server.outstanding)
            up.add_metric((server.url,), server.up)
        pending = GaugeMetricFamily(
            "stallfree_router_pending_prompt_tokens", "Prompt tokens to compute, as far as the router knows.", labels=("prefill",)
        )
        for name, tokens in self._router.pending.items():
            pending.add_metric((name,), tokens)
        yield from (requests, outstanding, up, pending)
        yield GaugeMetricFamily("stallfree_router_draining", "1 while no new requests are taken.", self._router.draining)


def create_router(router: Router, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The app that serves `router`. It opens and closes the router with itself."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        await router.open()
        yield {}
        await router.shut()

    app = FastAPI(
        title="stallfree router",
        version=stallfree.__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    app.add_middleware(Door, keys=Keys(), max_body_bytes=max_body_bytes)

    registry = CollectorRegistry()
    registry.register(_Metrics(router))

    async def pass_on(request: Request) -> Response:
        return _PassedOn(router, request, await request.body())

    for path in POST_PATHS:
        app.add_api_route(path, pass_on, methods=["POST"], response_model=None)
    for path in GET_PATHS:
        app.add_api_route(path, pass_on, methods=["GET"], response_model=None)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> Health:
        """200 while at least one decode server is up; else 503."""
        if router.draining or not any(server.up for server in router.servers):
            raise ApiError(503, "no decode server is up", code="unavailable")
        return Health()

    return app
