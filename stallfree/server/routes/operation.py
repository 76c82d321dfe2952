"""Routes for operators: the server's health, version and metrics. They start and change nothing."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

import stallfree
from stallfree.server import schema
from stallfree.server.errors import ApiError
from stallfree.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

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

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        asking, engine = service.asking, service.engine
        prefill_engines = None if asking is None else (asking.num_connected, len(asking.peers))
        text = service.metrics.expose(engine.scheduler.ledger, engine.clock(), prefill_engines)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router
