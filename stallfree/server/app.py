"""The routes. Each says what it takes and gives; checking, translating, answering and failing are done elsewhere."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, get_args

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse

import stallfree
from stallfree.core.request import Refused
from stallfree.engine.prefetch import Fetch
from stallfree.engine.thread import EngineThread
from stallfree.handoff.asking import Asking
from stallfree.handoff.serving import Serving
from stallfree.server import errors, intake, schema
from stallfree.server.answers import Call, Chat, Choice, Completions
from stallfree.server.door import Door
from stallfree.server.errors import ApiError
from stallfree.server.files import Files
from stallfree.server.live import Live
from stallfree.server.metrics import Metrics
from stallfree.server.reading import AnyBody, Asked, Reader, Terms, check_model
from stallfree.server.sse import EventStream, watching
from stallfree.server.traces import Traces

MAX_BODY_BYTES = 4 << 20
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's makers may recommend of sampling; /v1/models says what a request gets that leaves it open."""
PREFILL = "x-stallfree-prefill"
"""The header with which a router says which prefill engine, as host:port, is to compute a request's prompt, or `HERE`."""
HERE = "none"
"""In that header: no other engine, the server itself."""
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def asks(body: type[AnyBody]) -> dict[str, Any]:
    """A route's body for the OpenAPI schema: the routes read it themselves."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> None:
    """Have the OpenAPI schema of `app` hold the bodies that its routes ask for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, bodies = models_json_schema(
                [(body, "validation") for body in get_args(AnyBody)], ref_template="#/components/schemas/{model}"
            )
            FastAPI.openapi(app)["components"]["schemas"] |= bodies["$defs"]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def create_app(
    engine_thread: EngineThread,
    *,
    model: str,
    metrics: Metrics,
    live: Live,
    traces: Traces | None = None,
    asking: Asking | None = None,
    serving: Serving | None = None,
    api_key: str | None = None,
    sanitize_control_tokens: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """An app that serves `engine_thread` under the name `model`, and owns it: it starts with the app and is closed with it.

    `metrics`, `live` and `traces` are those whose `record` is called after each iteration. `asking` has prompts computed by other
    engines, `serving` computes them for others; both are owned too. With an `api_key`, every route wants it but /health and the
    page's own files, which say nothing of this server. `sanitize_control_tokens`: whether control tokens that clients write are
    text where a request does not say.
    """
    engine, text = engine_thread.engine, engine_thread.engine.text
    max_len = engine.scheduler.ledger.max_len
    sampling = {name: getattr(engine.sampling, name) for name in RECOMMENDED}
    reader = Reader(text, Terms(model, max_len, engine_thread.max_queue, sanitize_control_tokens))
    served = schema.Model(id=model, created=int(time.time()), max_model_len=max_len, default_sampling=sampling)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine_thread.start()
        sides = [side for side in (asking, serving) if side is not None]
        for side in sides:
            side.start()
        yield
        for side in sides:
            side.close()
        await engine_thread.close(0)
        reader.close()

    app = FastAPI(
        title="stallfree",
        version=stallfree.__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # their pages load scripts from elsewhere; /openapi.json is all there is to them
        redoc_url=None,
        responses=errors.RESPONSES,
        separate_input_output_schemas=False,
    )
    app.state.reader = reader
    errors.install(app)
    describe(app)
    app.add_middleware(Door, api_key=api_key, max_body_bytes=max_body_bytes)

    def fetches(name: str | None) -> Callable[[], Fetch | None]:
        """What makes each request's fetch; `name`: the prefill engine that the router chose."""
        if asking is not None and name != HERE:
            return asking.fetches(name)
        if name not in (None, HERE):
            raise ApiError(
                400, f"{PREFILL}: this server asks no other engine for prompts; it is not of --role decode", param=PREFILL
            )
        return lambda: None

    async def answer(kind: type[Call], shape: type[AnyBody], request: Request) -> Response:
        asked: Asked = await reader.read(shape, await request.body())
        body, prompts = asked.body, asked.prompts
        ids = [ids for ids, _ in prompts]
        requests = intake.requests(engine, asked, intake.targets(body, request.headers, live.slo))
        n = len(requests) // len(prompts)
        if traces is not None:
            traces.told([r.id for r in requests], kind.operation, request.headers)
        try:
            outputs = engine_thread.submit(
                requests,
                intake.stops(body),
                include_stop=bool(body.include_stop_str_in_output),
                continues=kind is Completions,
                fetch=fetches(request.headers.get(PREFILL)),
            )
        except Refused as refusal:
            raise intake.refused(refusal, body, ids) from None
        choices = [Choice(i, r, prompts[i // n][1]) for i, r in enumerate(requests)]
        call = kind(model, text, outputs, choices, n)
        if body.stream:
            options = body.stream_options or schema.StreamOptions()
            return EventStream(
                call, include_usage=bool(options.include_usage), continuous_usage=bool(options.continuous_usage_stats)
            )
        async with watching(outputs, request.receive):
            return Response(await call.whole(), media_type="application/json")

    @app.post(
        "/v1/chat/completions", response_model=schema.ChatCompletion, responses=STREAMS, openapi_extra=asks(schema.ChatRequest)
    )
    async def chat_completions(request: Request) -> Response:
        """The next message of a conversation; with `stream`, as server-sent events that end in `data: [DONE]`."""
        return await answer(Chat, schema.ChatRequest, request)

    @app.post("/v1/completions", response_model=schema.Completion, responses=STREAMS, openapi_extra=asks(schema.CompletionRequest))
    async def completions(request: Request) -> Response:
        """The continuation of one or more prompts; with `stream`, as server-sent events that end in `data: [DONE]`."""
        return await answer(Completions, schema.CompletionRequest, request)

    @app.get("/v1/models")
    async def models() -> schema.Models:
        """The model that is served."""
        return schema.Models(data=[served])

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> schema.Model:
        """The model of that name, if it is served."""
        check_model(name, model)
        return served

    @app.post("/tokenize", response_model=schema.Tokens, openapi_extra=asks(schema.TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt, or of messages in the model's chat template."""
        return Response(await reader.read(schema.TokenizeRequest, await request.body()), media_type="application/json")

    @app.post("/detokenize", response_model=schema.Prompt, openapi_extra=asks(schema.DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        return Response(await reader.read(schema.DetokenizeRequest, await request.body()), media_type="application/json")

    @app.get("/health")
    async def health() -> schema.Health:
        """200 while requests are taken; 503 when the engine has failed or is shutting down."""
        if engine_thread.failure is not None or engine_thread.draining:
            raise ApiError(503, engine_thread.failure or "the server is shutting down", code="unavailable")
        return schema.Health()

    @app.get("/version")
    async def version() -> schema.Version:
        return schema.Version(version=stallfree.__version__)

    @app.get("/live", include_in_schema=False)
    async def look(since: int = -1) -> Response:
        """What the page at / draws: `Live.look` behind step `since`, and what there is to say of the server."""
        scheduler, capacity = engine.scheduler, engine.executor.capacity
        now = engine.clock()
        about = {
            "model": model,
            "policy": live.policy,
            "slo": str(live.slo),
            "targets": asdict(live.slo),
            "max_model_len": max_len,
            "num_blocks": capacity.num_blocks,
            "now": now,
            "running": len(scheduler.ledger.running),
            "waiting": scheduler.ledger.num_waiting,
            "free_blocks": scheduler.ledger.pool.num_free,
        }
        return JSONResponse(about | live.look(now, since), headers={"Cache-Control": "no-store"})

    files = Files()

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        """The live page."""
        return files.response("index.html", request)

    @app.get("/live/{name:path}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        """A file of the live page."""
        return files.response(name, request)

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Prometheus' text format."""
        prefill_engines = None if asking is None else (asking.num_connected, len(asking.peers))
        return Response(
            metrics.expose(engine.scheduler, engine.clock(), prefill_engines), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )

    return app
