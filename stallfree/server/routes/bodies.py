"""What the OpenAPI schema says of bodies and streams that the routes read and write themselves."""

from typing import Any, get_args

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from stallfree.server.reading import AnyBody

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def asks(body: type[AnyBody]) -> dict[str, Any]:
    """A route's body for the OpenAPI schema."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> None:
    """Have the OpenAPI schema of `app` hold the bodies that its routes ask for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, bodies = models_json_schema(
                [(body, "validation") for body in get_args(AnyBody)], ref_template="#/components/schemas/{model}"
            )
            FastAPI.openapi(app)["components"]["schemas"] |= bodies["$defs"]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
