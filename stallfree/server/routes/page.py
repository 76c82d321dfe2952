"""Routes of the live page: its files, and the data that it draws. They compute none of that data."""

from dataclasses import asdict

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from stallfree.server.files import Files
from stallfree.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    engine, live, files = service.engine, service.live, Files()

    @router.get("/live")
    async def look(since: int = -1) -> Response:
        """The data of the page at /: `Live.look` after step `since`, and facts about the server."""
        ledger, now = engine.scheduler.ledger, engine.clock()
        about = {
            "model": service.name,
            "policy": live.policy,
            "slo": str(live.slo),
            "targets": asdict(live.slo),
            "max_model_len": ledger.max_len,
            "num_blocks": ledger.capacity.num_blocks,
            "now": now,
            "running": len(ledger.running),
            "waiting": ledger.num_waiting,
            "free_blocks": ledger.pool.num_free,
        }
        return JSONResponse(about | live.look(now, since), headers={"Cache-Control": "no-store"})

    @router.get("/")
    async def page(request: Request) -> Response:
        """The live page."""
        return files.response("index.html", request)

    @router.get("/live/{name:path}")
    async def file(name: str, request: Request) -> Response:
        """A file of the live page."""
        return files.response(name, request)

    return router
