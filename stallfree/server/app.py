"""The HTTP app over a service: its routes, its errors, and the door that all requests pass. It knows no engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import stallfree
from stallfree.server import errors
from stallfree.server.door import Door
from stallfree.server.routes import openai, operation, page, text
from stallfree.server.routes.bodies import describe
from stallfree.server.service import Service

MAX_BODY_BYTES = 4 << 20


def create_app(service: Service, *, api_key: str | None = None, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The app that serves `service` and owns it: the service starts and closes with the app. With an `api_key`, every route
    requires it except /health and the page's own files, which tell nothing about this server.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    app = FastAPI(
        title="stallfree",
        version=stallfree.__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # these pages load scripts from other sites; /openapi.json has all that they show
        redoc_url=None,
        responses=errors.RESPONSES,
        separate_input_output_schemas=False,
    )
    errors.install(app)
    for group in (openai, text, operation, page):
        app.include_router(group.routes(service))
    describe(app)
    app.add_middleware(Door, api_key=api_key, max_body_bytes=max_body_bytes)
    return app
