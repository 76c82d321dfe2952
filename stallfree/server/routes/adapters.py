"""Routes that give and take adapters while the server runs, and tell where they are. Changes need the admin key. It knows no
weights: the library opens and checks them."""

import asyncio
from heapq import nsmallest
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from stallfree.engine.adapters import BadName, Named
from stallfree.server import schema
from stallfree.server.errors import ApiError
from stallfree.server.models import Models
from stallfree.server.reading import checked
from stallfree.server.service import Service

MOST_LISTED = 500
"""Adapters in one answer. Writing more would keep streams waiting."""

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewAdapter(Body):
    """`path`: a folder on the server's disk, as PEFT saves it."""

    name: str = Field(max_length=200)
    path: str = Field(min_length=1, max_length=4096)


class VllmLoad(Body):
    """vLLM's form. `load_inplace` replaces an adapter of this name: requests that run keep the one they began with."""

    lora_name: str = Field(max_length=200)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    base_model_name: str | None = None
    is_3d_lora_weight: bool = False


class VllmUnload(Body):
    lora_name: str = Field(max_length=200)
    lora_int_id: int | None = None


class AdapterState(BaseModel):
    """`state`: its weights are in KV blocks (resident), on their way (loading), or only on the disk (away). `blocks`: KV blocks
    that it takes while it is resident. `requests`: that want it now. `leaving`: its name was taken from it, and it goes after the
    requests that it has."""

    id: str
    object: Literal["adapter"] = "adapter"
    parent: str
    path: str
    rank: int
    modules: list[str]
    created: int
    state: str
    blocks: int
    requests: int
    leaving: bool


class AdapterStates(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterState]
    has_more: bool


def routes(service: Service, *, changeable: bool) -> APIRouter:
    router = APIRouter()
    models, changing = service.models, asyncio.Lock()

    def check() -> None:
        """The door has seen the admin key, if there is one."""
        if not changeable:
            message = "adapters can be changed while the server runs only if it was started with --admin-key"
            raise ApiError(403, message, code="no_admin_key")

    async def add(name: str, path: str, fields: tuple[str, str], *, replace: bool = False) -> Named:
        async with changing:
            try:
                return await asyncio.to_thread(_add, models, name, path, replace)
            except BadName as error:
                raise ApiError(409 if error.used else 400, str(error), param=fields[0]) from None
            except ValueError as error:
                raise ApiError(400, str(error), param=fields[1]) from None
            except OSError as error:
                raise ApiError(400, f"{path}: cannot be read: {error.strerror or error}", param=fields[1]) from None

    def remove(name: str, field: str) -> None:
        try:
            models.check(name)
        except ApiError as error:
            raise error.renamed({"model": field}) from None
        if name in models.names:
            raise ApiError(400, f"{name!r} is the model itself; only adapters can be removed", param=field)
        models.library.remove(name)

    @router.get("/v1/adapters")
    async def adapters(
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED, after: Annotated[str, Query(max_length=200)] = ""
    ) -> AdapterStates:
        """The adapters in the order of their names, and where each is; those after the name `after`, if it is given. An adapter
        that was removed or replaced and still serves requests follows the one that has its name now."""
        library = models.library
        leaving: dict[str, list[Named]] = {}
        for named in library.leaving:
            leaving.setdefault(named.name, []).append(named)
        names = nsmallest(limit + 1, {name for name in (*library.named, *leaving) if name > after})
        data = []
        for name in names[:limit]:
            if (current := library.named.get(name)) is not None:
                data.append(_state(service, current))
            data += [_state(service, named, leaving=True) for named in leaving.get(name, ())]
        return AdapterStates(data=data, has_more=len(names) > limit)

    @router.post("/v1/adapters", status_code=201, openapi_extra=_asks(NewAdapter))
    async def add_adapter(request: Request) -> AdapterState:
        """Serve the adapter in a folder of the server's disk under a name. It is read once here, so that an adapter that cannot be
        used is refused now."""
        check()
        body = checked(NewAdapter, await request.body())
        return _state(service, await add(body.name, body.path, ("name", "path")))

    @router.delete("/v1/adapters/{name:path}")
    async def remove_adapter(name: str) -> schema.Deleted:
        """Take no new requests for an adapter. Those that it has are served; then it goes."""
        check()
        remove(name, "name")
        return schema.Deleted(id=name)

    @router.post("/v1/load_lora_adapter", response_model=None, responses=TEXT, openapi_extra=_asks(VllmLoad))
    async def load_lora_adapter(request: Request) -> Response:
        """vLLM's name for POST /v1/adapters."""
        check()
        body = checked(VllmLoad, await request.body())
        await add(body.lora_name, body.lora_path, ("lora_name", "lora_path"), replace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_model=None, responses=TEXT, openapi_extra=_asks(VllmUnload))
    async def unload_lora_adapter(request: Request) -> Response:
        """vLLM's name for DELETE /v1/adapters/NAME."""
        check()
        body = checked(VllmUnload, await request.body())
        remove(body.lora_name, "lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _asks(body: type[BaseModel]) -> dict[str, Any]:
    """The part of a route's OpenAPI schema that says it takes a `body`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}}}


def _add(models: Models, name: str, path: str, replace: bool) -> Named:
    """In a thread, because it reads the disk."""
    library = models.library
    adapter = library.open(name, path, replaces=replace)
    adapter.check()
    return library.add(name, adapter, replaces=replace)


def _state(service: Service, named: Named, *, leaving: bool = False) -> AdapterState:
    accounts = service.engine.scheduler.ledger.adapters
    blocks, rank = accounts.known.get(named.key, (0, named.adapter.rank))  # it may just have gone
    return AdapterState(
        id=named.name,
        parent=service.name,
        path=str(named.adapter.path),
        rank=rank,
        modules=sorted(named.adapter.modules),
        created=named.created,
        state=accounts.state(named.key),
        blocks=blocks,
        requests=accounts.requests(named.key),
        leaving=leaving,
    )
