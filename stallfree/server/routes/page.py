"""Routes of the live page: its files, and the data that it draws. They compute none of that data."""

from dataclasses import asdict
from heapq import nlargest
from itertools import islice
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from stallfree.engine.adapters import name_of
from stallfree.server.files import Files
from stallfree.server.service import Service

ADAPTERS = 20
"""Rows of adapters: those that most requests want."""


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
            "adapters": _adapters(service),
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


def _adapters(service: Service) -> dict[str, Any] | None:
    """The adapters: how many are where, requests that wait for one, the KV blocks that they have, and the rows of those that most
    requests want. None if there is none."""
    accounts, named = service.engine.scheduler.ledger.adapters, service.models.library.named
    if not accounts.known:
        return None
    keys = {each.key: each for each in islice(named.values(), ADAPTERS)}
    keys |= {key: each for key in accounts.active() if (each := named.get(name_of(key))) is not None and each.key == key}
    wanted = nlargest(ADAPTERS, keys.values(), key=lambda each: (accounts.requests(each.key), each.key in accounts.resident))
    return {
        **accounts.counts(),
        "waiting": accounts.num_parked,
        "blocks": accounts.num_blocks,
        "rows": [
            {
                "name": each.name,
                "state": accounts.state(each.key),
                "rank": each.adapter.rank,
                "requests": accounts.requests(each.key),
            }
            for each in wanted
        ],
    }
