"""The routes. Each says what it takes and gives; checking, translating, answering and failing are done elsewhere."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse

import stallfree
from stallfree.core.request import Refused
from stallfree.engine.engine import Fetch
from stallfree.engine.thread import EngineThread
from stallfree.handoff.asking import Asking
from stallfree.handoff.serving import Serving
from stallfree.server import errors, intake, schema
from stallfree.server.answers import Call, Chat, Choice, Completions
from stallfree.server.door import Door
from stallfree.server.errors import ApiError, shown
from stallfree.server.files import Files
from stallfree.server.live import Live
from stallfree.server.metrics import Metrics
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
    max_len = engine.scheduler.max_len
    sampling = {name: getattr(engine.sampling, name) for name in RECOMMENDED}
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
    errors.install(app)
    app.add_middleware(Door, api_key=api_key, max_body_bytes=max_body_bytes)

    def check_model(name: str | None) -> None:
        if name is not None and name != model:
            raise ApiError(404, f"the model {shown(name)} is not served here; {model!r} is", param="model", code="model_not_found")

    def recognised(sanitized: bool | None) -> bool:
        """Whether control tokens that the client has written are control tokens."""
        return not (sanitize_control_tokens if sanitized is None else sanitized)

    def fetches(name: str | None) -> Callable[[], Fetch | None]:
        """What makes each request's fetch; `name`: the prefill engine that the router chose."""
        if asking is not None and name != HERE:
            return asking.fetches(name)
        if name not in (None, HERE):
            raise ApiError(
                400, f"{PREFILL}: this server asks no other engine for prompts; it is not of --role decode", param=PREFILL
            )
        return lambda: None

    async def answer(kind: type[Call], body: schema.Generation, prompts: list[tuple[list[int], str]], request: Request) -> Response:
        ids = [ids for ids, _ in prompts]
        requests = intake.requests(engine, body, ids, intake.targets(body, request.headers, live.slo))
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
            return JSONResponse(await call.whole())

    @app.post("/v1/chat/completions", response_model=schema.ChatCompletion, responses=STREAMS)
    async def chat_completions(body: schema.ChatRequest, request: Request) -> Response:
        """The next message of a conversation; with `stream`, as server-sent events that end in `data: [DONE]`."""
        check_model(body.model)
        ids = await intake.conversation(text, body.messages, control=recognised(body.sanitize_control_tokens))
        return await answer(Chat, body, [(ids, "")], request)

    @app.post("/v1/completions", response_model=schema.Completion, responses=STREAMS)
    async def completions(body: schema.CompletionRequest, request: Request) -> Response:
        """The continuation of one or more prompts; with `stream`, as server-sent events that end in `data: [DONE]`."""
        check_model(body.model)
        control = recognised(body.sanitize_control_tokens)
        return await answer(Completions, body, await intake.prompts(text, body, engine_thread.max_queue, control=control), request)

    @app.get("/v1/models")
    async def models() -> schema.Models:
        """The model that is served."""
        return schema.Models(data=[served])

    @app.get("/v1/models/{name:path}")
    async def model_named(name: str) -> schema.Model:
        """The model of that name, if it is served."""
        check_model(name)
        return served

    @app.post("/tokenize")
    async def tokenize(body: schema.TokenizeRequest) -> schema.Tokens:
        """The token ids of a prompt, or of messages in the model's chat template."""
        check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        control = recognised(body.sanitize_control_tokens)
        if body.messages is not None:
            prompted = body.add_generation_prompt is not False
            ids = await intake.conversation(text, body.messages, generation_prompt=prompted, control=control)
        else:
            ids = await intake.encode(text, body.prompt or "", special=body.add_special_tokens is not False, control=control)
        return schema.Tokens(count=len(ids), max_model_len=max_len, tokens=ids)

    @app.post("/detokenize")
    async def detokenize(body: schema.DetokenizeRequest) -> schema.Prompt:
        """The text of token ids, special tokens included."""
        check_model(body.model)
        intake.check_ids(body.tokens, text, "tokens")
        return schema.Prompt(prompt=text.decode(body.tokens, skip_special=False))

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
            "running": len(scheduler.running),
            "waiting": scheduler.num_waiting,
            "free_blocks": scheduler.pool.num_free,
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
