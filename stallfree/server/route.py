"""A router. It passes each request on to the decode server that `choosing` puts first, and names the prefill engine that `prefills`
finds for it, and how much of the prompt this one computes.

It reads only the outline of a body, and whether a stream has its first token. All else passes unchanged, the API key too. It sends
nothing to a server that is down, until its /health answers 200.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from math import inf
from typing import Any

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
from stallfree.server.choosing import Outline, Prefixes, Server, earliest, least_outstanding, outline, uncached
from stallfree.server.door import Door
from stallfree.server.errors import ApiError
from stallfree.server.intake import CUT, PREFILL
from stallfree.server.keys import Keys
from stallfree.server.prefills import Pending, Prefills, ask
from stallfree.server.schema import Health

log = logging.getLogger(__name__)

HEALTH_S = 2.0
"""Seconds between two health checks of a server, and the longest that one may take."""
MOST_REFUSALS = 2
"""Servers that may refuse a request with status 429 before its client learns of it."""
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
POST_PATHS = (*GENERATING, "/v1/messages/count_tokens", "/tokenize", "/detokenize")
GET_PATHS = ("/v1/models", "/v1/models/{name:path}", "/version")
KEPT_BACK = {"host", "content-length", "connection", "transfer-encoding", "accept-encoding", "expect", PREFILL, CUT}
"""Request headers that the router does not pass on."""
PASSED = ("content-type", "cache-control", "retry-after", "www-authenticate")
"""Response headers that the router passes on."""

ENDING = ApiError(503, "the router is shutting down", code="unavailable")


def _ending(error: ApiError) -> bytes:
    """The last events of a stream that breaks off with `error`."""
    return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


class _Refusal(Exception):
    """A server's answer of status 429. `retry_after`: seconds; inf if it names none."""

    def __init__(self, answer: Response):
        super().__init__()
        self.answer = answer
        seconds = answer.headers.get("retry-after", "")
        self.retry_after = int(seconds) if seconds.isdecimal() else inf


class Router:
    """Passes requests on to `decodes` (URLs), and names one of `prefills` (host:port), if there are any. While each of these has
    more than `spill` prompt tokens to compute, the decode server computes the prompt. `share_prefixes`: the servers let keys find
    each other's cached prefixes.
    """

    def __init__(
        self, decodes: Sequence[str], prefills: Sequence[str] = (), spill: int | None = None, *, share_prefixes: bool = False
    ):
        self.servers = [Server(url) for url in decodes]
        self.prefixes = Prefixes()
        self.prefills = Prefills(prefills, inf if spill is None else spill)
        self.share_prefixes = share_prefixes
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
        """Send the answer of the first server in `_order` that gives one. Raises ApiError if none does, or if the router ends."""
        if self.draining:
            raise ENDING
        try:
            await self._pass_on(request, body, scope, receive, send)
        except asyncio.CancelledError:
            if self.ending.is_set():
                raise ENDING from None
            raise

    async def _pass_on(self, request: Request, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        path = request.url.path
        prompt = outline(path, body, {} if self.share_prefixes else request.headers) if path in GENERATING else None
        failures: list[str] = []
        refusals: list[_Refusal] = []
        for server in await self._order(prompt, request):
            try:
                await self._try(server, prompt, request, body, scope, receive, send)
                return
            except _Refusal as refusal:
                refusals.append(refusal)
                if len(refusals) == MOST_REFUSALS:
                    break
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning("decode server %s did not answer: %s", server.url, error or type(error).__name__)
                failures.append(f"{server.url} did not answer ({type(error).__name__})")
                await self._check_health(server)
        if refusals:
            await min(refusals, key=lambda refusal: refusal.retry_after).answer(scope, receive, send)
            return
        down = [f"{s.url} is down" for s in self.servers if not s.up and not any(s.url in failure for failure in failures)]
        raise ApiError(503, "no decode server answers: " + ", ".join(failures + down), code="unavailable")

    async def _order(self, prompt: Outline | None, request: Request) -> list[Server]:
        """The servers that are up, in the order in which they are to be tried."""
        if prompt is None or self.prefills.pending:  # what a server forecasts for itself says nothing of a prompt elsewhere
            return least_outstanding(self.servers)
        return await earliest(self.session, self.servers, prompt, self.prefixes, request.headers)

    async def _try(
        self, server: Server, prompt: Outline | None, request: Request, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Send the server's answer, and count its outcome. Raises _Refusal, and the errors of aiohttp, before anything is sent."""
        server.sent += 1
        server.outstanding += 1
        outcome = "left"
        try:
            with await self._prefill(server, prompt, request) as pending:
                if prompt is not None:
                    self.prefixes.remember(prompt.pieces, server)
                outcome = await self._through(server, pending, request, body, scope, receive, send)
        except _Refusal:
            outcome = "refused"
            raise
        except (aiohttp.ClientError, TimeoutError, OSError):
            outcome = "failed"
            raise
        finally:
            server.outstanding -= 1
            server.outcomes[outcome] += 1

    async def _prefill(self, server: Server, prompt: Outline | None, request: Request) -> Pending:
        """What a prefill engine computes of the prompt, for this server."""
        cached, here = 0, None
        if prompt is not None and self.prefills.asks:
            new = uncached(prompt, self.prefixes.find(prompt.pieces).get(server, 0))
            cached, here = max(0, prompt.tokens - new), await ask(self.session, server, new, prompt.model, request.headers)
        return self.prefills.give(prompt, cached, here)

    async def _through(
        self, server: Server, pending: Pending, request: Request, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> str:
        """Send the server's answer. Returns its outcome, one of `OUTCOMES`. Raises _Refusal for an answer of status 429."""
        headers = {name: value for name, value in request.headers.items() if name not in KEPT_BACK}
        if pending.named is not None:
            headers[PREFILL] = pending.named
        if pending.cut is not None:
            headers[CUT] = str(pending.cut)
        url = server.url + request.url.path
        async with self.session.request(request.method, url, data=body or None, headers=headers) as answer:
            if answer.status == 503:
                raise aiohttp.ClientError("status 503: it takes no requests")
            passed = {name: answer.headers[name] for name in PASSED if name in answer.headers}
            if answer.content_type != "text/event-stream":
                whole = Response(await answer.read(), answer.status, passed)
                if answer.status == 429:
                    raise _Refusal(whole)
                await whole(scope, receive, send)
                return "answered" if answer.status < 400 else "refused" if answer.status < 500 else "failed"
            start = {"type": "http.response.start", "status": answer.status}
            await send(start | {"headers": [(name.encode(), value.encode("latin-1")) for name, value in passed.items()]})
            try:
                async for events in answer.content.iter_any():
                    pending.receive(events)
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

    async def _watch(self, server: Server) -> None:
        while True:
            await asyncio.sleep(HEALTH_S)
            await self._check_health(server)

    async def _check_health(self, server: Server) -> None:
        up = False
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            timeout = aiohttp.ClientTimeout(total=HEALTH_S)
            async with self.session.get(f"{server.url}/health", timeout=timeout) as answer:
                up = answer.status == 200
        if up != server.up:
            log.warning("decode server %s is %s", server.url, "up" if up else "down")
        server.up = up


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
        for name, tokens in self._router.prefills.pending.items():
            pending.add_metric((name,), tokens)
        prompts = CounterMetricFamily("stallfree_router_prompts", "Prompts, by who computes them.", labels=("place",))
        for place, number in self._router.prefills.given.items():
            prompts.add_metric((place,), number)
        yield from (requests, outstanding, up, pending, prompts)
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
