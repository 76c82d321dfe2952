"""OpenAI's routes: chat, completions, responses, and the model that is served. They know no policy and no executor."""

import time

from fastapi import APIRouter, Request, Response

from stallfree.engine.adapters import MOST, Named
from stallfree.server import schema
from stallfree.server.answering import answer, ask
from stallfree.server.dialects.chat import Chat
from stallfree.server.dialects.chunks import Chunked
from stallfree.server.dialects.completions import Completions
from stallfree.server.dialects.responses import Responses, ResponsesRequest
from stallfree.server.reading import AnyBody, Query
from stallfree.server.routes.bodies import STREAMS, asks
from stallfree.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    max_len = service.engine.scheduler.ledger.max_len
    facts = {"created": int(time.time()), "max_model_len": max_len, "default_sampling": service.sampling}
    served = {name: schema.Model.model_validate({"id": name, **facts}) for name in service.names}

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

    @router.post("/v1/responses", responses=STREAMS, openapi_extra=asks(ResponsesRequest))
    async def responses(request: Request) -> Response:
        """An answer as a list of items. Nothing is kept: the whole conversation is in `input`. With `stream`: as events."""
        query: Query = await service.reader.read(ResponsesRequest, await request.body())
        call = await ask(service, Responses, query, request)
        call.echo = dict(query.echo or {})
        call.echo |= {name: service.sampling[name] for name in ("temperature", "top_p") if call.echo[name] is None}
        return await answer(call, request, stream=bool(query.body.stream))

    entries: dict[str, str] = {}

    def entry(named: Named) -> str:
        """The JSON of an adapter in the list. There may be thousands, so each is written once."""
        if named.key not in entries:
            if len(entries) > 2 * MOST:  # of adapters that have left
                entries.clear()
            entries[named.key] = _adapter(named).model_dump_json()
        return entries[named.key]

    @router.get("/v1/models", response_model=schema.Models)
    async def models() -> Response:
        """The model that is served, once under each of its names, and its adapters."""
        own = [model.model_dump_json() for model in served.values()]
        data = ",".join([*own, *map(entry, service.models.library.named.values())])
        return Response(f'{{"object":"list","data":[{data}]}}', media_type="application/json")

    @router.get("/v1/models/{name:path}")
    async def model_named(name: str) -> schema.Model:
        """The model of that name. 404 if it is not served."""
        service.models.check(name)
        return served[name] if name in served else _adapter(service.models.library.named[name])

    def _adapter(named: Named) -> schema.Model:
        own = {"id": named.name, "created": named.created, "parent": service.name, "root": str(named.adapter.path)}
        return schema.Model.model_validate(facts | own)

    return router


async def _answer(service: Service, kind: type[Chunked], shape: type[AnyBody], request: Request) -> Response:
    query: Query = await service.reader.read(shape, await request.body())
    call = await ask(service, kind, query, request)
    body = query.body
    if body.stream:
        options = body.stream_options or schema.StreamOptions()
        call.include_usage = bool(options.include_usage)
        call.continuous_usage = call.include_usage and bool(options.continuous_usage_stats)
    return await answer(call, request, stream=bool(body.stream))
