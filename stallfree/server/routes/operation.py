"""Routes for operators and routers: the server's health, version, metrics and load. They start and change nothing."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

import stallfree
from stallfree.core import request as core
from stallfree.server import schema
from stallfree.server.errors import ApiError
from stallfree.server.request_log import Entry
from stallfree.server.service import Service


class Load(BaseModel):
    """What the server has to do. `prefill_room_s`: seconds of prefill that it can still take within its targets. `backlog_s`:
    seconds of prefill that wait. `running`, `waiting`: requests. `predicted_ttft_s`: seconds until a new request would have its
    first token, if all of its prompt is computed here. All seconds are null if the policy forecasts nothing.
    """

    prefill_room_s: float | None = None
    backlog_s: float | None = None
    running: int
    waiting: int
    predicted_ttft_s: float | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    most = service.engine.scheduler.ledger.max_len

    @router.get("/health")
    async def health() -> schema.Health:
        """200 while the server takes requests; 503 after the engine has failed, or while the server shuts down."""
        if service.thread.failure is not None or service.thread.draining:
            raise ApiError(503, service.thread.failure or "the server is shutting down", code="unavailable")
        return schema.Health()

    @router.get("/health/ready")
    async def ready() -> schema.Health:
        """200 while requests should be sent here. 503 when /health has 503, and while an iteration is overdue."""
        if (fault := service.watchdog.look()) is not None:
            raise ApiError(503, fault, code="unavailable")
        return await health()

    @router.get("/health/live")
    async def live() -> schema.Health:
        """200 unless only a restart helps: 503 after the engine has failed, and while an iteration is overdue."""
        fault = service.thread.failure or service.watchdog.look()
        if fault is not None:
            raise ApiError(503, fault, code="unavailable")
        return schema.Health()

    @router.get("/version")
    async def version() -> schema.Version:
        return schema.Version(version=stallfree.__version__)

    @router.get("/load")
    async def load(
        request: Request,
        prompt_tokens: Annotated[int, Query(ge=1, le=most)] = 1,
        model: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Load:
        """How much the server has to do, and when a new request of `prompt_tokens` uncached tokens would have its first token. The
        request is one of the asking key's tenant, and of the class that this tenant's requests have by default. If `model` is an
        adapter whose weights are not in memory, the time until they are counts. 404 if the model is not served."""
        adapter = service.models.adapter(model)
        thread = service.thread
        load = Load(running=thread.num_running, waiting=thread.num_waiting)
        if thread.forecast is not None:
            load.prefill_room_s, load.backlog_s = thread.forecast.room, thread.forecast.backlog
            newcomer = _newcomer(service, request, prompt_tokens, adapter)
            load.predicted_ttft_s = thread.forecast.seconds(newcomer, wait_s=service.engine.adapters.wait_s(newcomer))
        return load

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        asking, engine = service.asking, service.engine
        prefill_engines = None if asking is None else (asking.num_connected, len(asking.peers))
        forecast = service.thread.forecast
        room = None if forecast is None else forecast.room
        text = service.metrics.expose(engine.scheduler.ledger, engine.clock(), prefill_engines, room)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def _newcomer(service: Service, request: Request, prompt_tokens: int, adapter: str) -> core.Request:
    """A request of so many tokens that arrives now, from the tenant that asks by `request`. It is never queued."""
    tenant = service.tenants.of(Entry.of(request.scope).key, None, request.headers)
    usual, own = next(iter(service.classes)), tenant.service_class
    return core.Request(
        "",
        range(prompt_tokens),
        max(1, service.engine.scheduler.ledger.max_len - prompt_tokens),
        arrival=service.engine.clock(),
        priority=tenant.priority_of(None),
        tenant=tenant.name,
        weight=tenant.weight,
        slo=None if own in ("", usual) else service.classes[own],
        service_class=own or usual,
        adapter=adapter,
    )
