"""A router: passes each request on to the server with the fewest of them, and names the prefill engine with the fewest prompt
tokens still to compute, as far as the router knows, or none while all have too many.

It reads of a body only how long its prompt is, and of a stream only whether its first token has come; all else goes through as it
is, the API key too. A server that is down is left out until its /health says otherwise.
"""

import asyncio
import json
import logging
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
from stallfree.server.schema import Health

log = logging.getLogger(__name__)

HEALTH_S = 2.0
"""Seconds between two looks at a server's health, and for its answer."""
CHARACTERS = 4
"""Of a text make a token, about; both candidates are guessed alike."""
GENERATING = ("/v1/completions", "/v1/chat/completions")
ASKING = (*GENERATING, "/tokenize", "/detokenize")
READING = ("/v1/models", "/v1/models/{name:path}", "/version")
KEPT_BACK = {"host", "content-length", "connection", "transfer-encoding", "accept-encoding", "expect", PREFILL}
"""Headers of a request that are not passed on."""
PASSED = ("content-type", "cache-control", "retry-after", "www-authenticate")
"""Headers of an answer that are."""


OUTCOMES = ("answered", "refused", "failed", "broken", "left")
"""What becomes of a request at a server: an answer; one with a status from 400 to 499; none, or one with a status from 500 on; one
that broke off; or its client went away, or the router shut down, before the end."""
ENDING = ApiError(503, "the router is shutting down", code="unavailable")


def _last(error: ApiError) -> bytes:
    """The end of a stream that breaks off."""
    return b"data: " + error.body() + b"\n\ndata: [DONE]\n\n"


class _Server:
    """A decode server: whether it is `up`, how many requests it has from here, and what became of the others, by `OUTCOMES`."""

    def __init__(self, url: str):
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--decode {url!r} is not a server's URL; write http://127.0.0.1:8001, several with commas between")
        self.url = url.strip().rstrip("/").removesuffix("/v1")
        self.up = True
        self.outstanding = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)


class Router:
    """Passes on to `decodes` (URLs), and names one of `prefills` (host:port), if there are any; or nobody, while each of these has
    more than `spill` tokens of prompts to compute: the decode server computes the prompt then.
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
        await asyncio.gather(*map(self._look, self.servers))
        self._watching = [asyncio.create_task(self._watch(server)) for server in self.servers]

    async def shut(self) -> None:
        for task in self._watching:
            task.cancel()
        await self.session.close()

    async def close(self, drain_timeout_s: float) -> None:
        """Take no more requests, and let those there are finish for a while; then end the others in an error."""
        self.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                while self.unfinished:
                    await asyncio.sleep(0.05)
        self.ending.set()

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return sum(server.outstanding for server in self.servers)

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the router has not been opened")
        return self._session

    async def pass_on(self, request: Request, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer of the server with the fewest requests, or of the next one if it gives none. ApiError if nobody does."""
        if self.draining:
            raise ENDING
        failures = []
        for server in sorted((one for one in self.servers if one.up), key=lambda one: one.outstanding):
            server.outstanding += 1
            outcome = "left"
            prompt = _Prompt(self.pending, self.spill, request.url.path, body)
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
                await self._look(server)
            finally:
                prompt.computed()
                server.outstanding -= 1
                server.outcomes[outcome] += 1
        down = [f"{one.url} is down" for one in self.servers if not one.up and not any(one.url in said for said in failures)]
        raise ApiError(503, "no decode server answers: " + ", ".join(failures + down), code="unavailable")

    async def _through(
        self, server: _Server, prompt: "_Prompt", request: Request, body: bytes, scope: Scope, receive: Receive, send: Send
    ) -> str:
        """Send the server's answer; which of `OUTCOMES` it is."""
        headers = {name: value for name, value in request.headers.items() if name not in KEPT_BACK}
        if prompt.named is not None:
            headers[PREFILL] = prompt.named
        url = server.url + request.url.path
        async with self.session.request(request.method, url, data=body or None, headers=headers) as answer:
            if answer.status == 503:
                raise aiohttp.ClientError("it takes no requests")
            passed = {name: answer.headers[name] for name in PASSED if name in answer.headers}
            if answer.content_type != "text/event-stream":
                await Response(await answer.read(), answer.status, passed)(scope, receive, send)
                return "answered" if answer.status < 400 else "refused" if answer.status < 500 else "failed"
            start = {"type": "http.response.start", "status": answer.status}
            await send(start | {"headers": [(name.encode(), value.encode("latin-1")) for name, value in passed.items()]})
            try:
                async for events in answer.content.iter_any():
                    prompt.saw(events)
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                outcome, last = "answered", b""
            except (aiohttp.ClientError, OSError) as error:  # too late for another server: some of it is with the client
                log.warning("decode server %s broke off: %s", server.url, error)
                outcome = "broken"
                last = _last(ApiError(502, "the decode server broke off in the middle of the answer", code="engine_error"))
            except asyncio.CancelledError:
                if not self.ending.is_set():
                    raise
                outcome, last = "left", _last(ENDING)
            await send({"type": "http.response.body", "body": last, "more_body": False})
            return outcome

    async def _watch(self, server: _Server) -> None:
        while True:
            await asyncio.sleep(HEALTH_S)
            await self._look(server)

    async def _look(self, server: _Server) -> None:
        up = False
        with suppress(aiohttp.ClientError, TimeoutError, OSError):
            timeout = aiohttp.ClientTimeout(total=HEALTH_S)
            async with self.session.get(f"{server.url}/health", timeout=timeout) as answer:
                up = answer.status == 200
        if up != server.up:
            log.warning("decode server %s is %s", server.url, "up" if up else "down")
        server.up = up


class _Prompt:
    """A request's prompt, pending at the prefill engine `named` until its first token is seen, or it ends."""

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

    def saw(self, events: bytes) -> None:
        """Some of the answer's stream. Its first events may be openings, without a token."""
        if self._is_pending:
            self._openings -= events.count(b"data: ")
            if self._openings < 0:
                self.computed()

    def computed(self) -> None:
        if self._is_pending and self.named is not None:
            self._pending[self.named] -= self._tokens
            self._is_pending = False


def _size(path: str, body: bytes) -> tuple[int, int]:
    """About how many tokens a body's prompt has, and how many events of its stream come before the first token."""
    with suppress(ValueError, TypeError, AttributeError):  # what is malformed is for the server to refuse
        given: dict[str, Any] = json.loads(body)
        if path == "/v1/chat/completions":
            return sum(len(json.dumps(message.get("content"))) for message in given["messages"]) // CHARACTERS, given.get("n") or 1
        prompt = given.get("prompt") or ""
        several = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        tokens = sum(len(one) // CHARACTERS if isinstance(one, str) else len(one) for one in several)
        return tokens, len(several) * (given.get("n") or 1) if given.get("echo") else 0
    return 0, 0


class _PassedOn(Response):
    """The answer to `request`, by whichever server gives one; given up when the client goes."""

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
                passing.cancel()  # it still says why
                await asyncio.wait({passing})
            if passing.done():
                await passing
        finally:
            for task in (passing, leaving, ending):
                task.cancel()
            await asyncio.gather(passing, leaving, ending, return_exceptions=True)


class _Metrics(Collector):
    """What a router knows, for Prometheus."""

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
    """An app that is `router`, opened with it."""

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
    app.add_middleware(Door, api_key=None, max_body_bytes=max_body_bytes)

    registry = CollectorRegistry()
    registry.register(_Metrics(router))

    async def pass_on(request: Request) -> Response:
        return _PassedOn(router, request, await request.body())

    for path in ASKING:
        app.add_api_route(path, pass_on, methods=["POST"], response_model=None)
    for path in READING:
        app.add_api_route(path, pass_on, methods=["GET"], response_model=None)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health")
    async def health() -> Health:
        """200 while some decode server is up; 503 otherwise."""
        if router.draining or not any(server.up for server in router.servers):
            raise ApiError(503, "no decode server is up", code="unavailable")
        return Health()

    return app
