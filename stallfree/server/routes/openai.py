"""OpenAI's routes: chat, completions, and the model that is served. They know no policy and no executor."""

import time
from collections.abc import Callable

from fastapi import APIRouter, Request, Response

from stallfree.core.request import Refused
from stallfree.engine.prefetch import Transfer
from stallfree.server import intake, schema
from stallfree.server.answers import Call, Chat, Choice, Completions
from stallfree.server.errors import ApiError
from stallfree.server.intake import HERE, PREFILL
from stallfree.server.reading import AnyBody, Query, check_model
from stallfree.server.routes.bodies import STREAMS, asks
from stallfree.server.service import Service
from stallfree.server.sse import EventStream, watching


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    max_len = service.engine.scheduler.ledger.max_len
    served = schema.Model(id=service.name, created=int(time.time()), max_model_len=max_len, default_sampling=service.sampling)

    @router.post(
        "/v1/chat/completions", response_model=schema.ChatCompletion, responses=STREAMS, openapi_extra=asks(schema.ChatRequest)
    )
    async def chat_completions(request: Request) -> Response:
        """The next message of a conversation. With `stream`: as server-sent events that end with `data: [DONE]`."""
        return await _answer(service, Chat, schema.ChatRequest, request)

    @router.post(
        "/v1/completions", response_model=schema.Completion, responses=STREAMS, openapi_extra=asks(schema.CompletionRequest)
    )
    async def completions(request: Request) -> Response:
        """The continuation of one or more prompts. With `stream`: as server-sent events that end with `data: [DONE]`."""
        return await _answer(service, Completions, schema.CompletionRequest, request)

    @router.get("/v1/models")
    async def models() -> schema.Models:
        """The model that is served."""
        return schema.Models(data=[served])

    @router.get("/v1/models/{name:path}")
    async def model_named(name: str) -> schema.Model:
        """The model of that name. 404 if it is not served."""
        check_model(name, service.name)
        return served

    return router


async def _answer(service: Service, kind: type[Call], shape: type[AnyBody], request: Request) -> Response:
    query: Query = await service.reader.read(shape, await request.body())
    body, prompts = query.body, query.prompts
    ids = [ids for ids, _ in prompts]
    requests = intake.requests(service.engine, query, intake.targets(body, request.headers, service.live.slo))
    n = len(requests) // len(prompts)
    if service.traces is not None:
        service.traces.note_call([r.id for r in requests], kind.operation, request.headers)
    try:
        outputs = service.thread.submit(
            requests,
            intake.stops(body),
            include_stop=bool(body.include_stop_str_in_output),
            continues=kind is Completions,
            transfer=_transfers(service, request.headers.get(PREFILL)),
        )
    except Refused as refusal:
        raise intake.refused(refusal, body, ids) from None
    choices = [Choice(i, r, prompts[i // n][1]) for i, r in enumerate(requests)]
    call = kind(service.name, service.engine.text, outputs, choices, n)
    if body.stream:
        options = body.stream_options or schema.StreamOptions()
        return EventStream(call, include_usage=bool(options.include_usage), continuous_usage=bool(options.continuous_usage_stats))
    async with watching(outputs, request.receive):
        return Response(await call.whole(), media_type="application/json")


def _transfers(service: Service, name: str | None) -> Callable[[], Transfer | None]:
    """A function that makes each request's KV transfer, or None. `name`: the prefill engine that the router chose."""
    if service.asking is not None and name != HERE:
        return service.asking.transfers(name)
    if name not in (None, HERE):
        raise ApiError(400, f"{PREFILL}: this server computes its prompts itself; it is not of --role decode", param=PREFILL)
    return lambda: None
