"""Routes from text to token ids and back, named as vLLM's. They compute nothing with the model."""

from fastapi import APIRouter, Request, Response

from stallfree.server import schema
from stallfree.server.routes.bodies import asks
from stallfree.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", response_model=schema.Tokens, openapi_extra=asks(schema.TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt, or of messages after the model's chat template."""
        return Response(await service.reader.read(schema.TokenizeRequest, await request.body()), media_type="application/json")

    @router.post("/detokenize", response_model=schema.Prompt, openapi_extra=asks(schema.DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included."""
        return Response(await service.reader.read(schema.DetokenizeRequest, await request.body()), media_type="application/json")

    return router
