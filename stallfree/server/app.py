"""The HTTP app over a service: its routes, its errors, and the door that all requests pass. It knows no engine."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

import stallfree
from stallfree.server import errors, origins
from stallfree.server.door import Door, Opens
from stallfree.server.keys import Keys
from stallfree.server.request_log import RequestLog
from stallfree.server.routes import adapters, anthropic, openai, operation, page, text
from stallfree.server.routes.bodies import describe
from stallfree.server.service import Service

MAX_BODY_BYTES = 4 << 20


def create_app(
    service: Service,
    *,
    keys: Opens | None = None,
    admin: Keys | None = None,
    allow_origins: Sequence[str] = (),
    log_requests: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The app that serves `service` and owns it: the service starts and closes with the app.

    If there are `keys`, every route requires one except the health checks and the page's own files, which tell nothing about this
    server. Routes that change adapters require the `admin` key instead. Pages of the sites `allow_origins` may call it. With
    `log_requests`, every request gets a line in the log.
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
    for group in (openai, anthropic, text, operation, page):
        app.include_router(group.routes(service))
    app.include_router(adapters.routes(service, changeable=bool(admin)))
    describe(app)
    # What is added later is further outside: the log sees all answers, and a preflight needs no key.
    app.add_middleware(Door, keys=keys or Keys(), admin=admin, max_body_bytes=max_body_bytes, origins=allow_origins)
    if allow_origins:
        origins.allow(app, allow_origins)
    if log_requests:
        app.add_middleware(RequestLog)
    return app
