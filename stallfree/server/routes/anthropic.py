"""Anthropic's routes: messages, and how many tokens one would have. They know no policy and no executor."""

from fastapi import APIRouter, Request, Response

from stallfree.server.answering import answer, ask
from stallfree.server.dialects.messages import CountRequest, Messages, MessagesRequest
from stallfree.server.errors import ANTHROPIC_RESPONSES
from stallfree.server.reading import Query
from stallfree.server.routes.bodies import STREAMS, asks
from stallfree.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/messages", responses=ANTHROPIC_RESPONSES | STREAMS, openapi_extra=asks(MessagesRequest))
    async def messages(request: Request) -> Response:
        """The next message of a conversation, as blocks. With `stream`: as events."""
        query: Query = await service.reader.read(MessagesRequest, await request.body())
        call = await ask(service, Messages, query, request)
        return await answer(call, request, stream=bool(query.body.stream))

    @router.post("/v1/messages/count_tokens", responses=ANTHROPIC_RESPONSES, openapi_extra=asks(CountRequest))
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of a message would have."""
        return Response(await service.reader.read(CountRequest, await request.body()), media_type="application/json")

    return router
