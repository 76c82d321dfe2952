"""OpenAPI schemas of the bodies and streams that routes read and write without FastAPI. It knows no values, only types."""

from typing import Any, get_args

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from stallfree.server.reading import AnyBody

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def asks(body: type[AnyBody]) -> dict[str, Any]:
    """The part of a route's OpenAPI schema that says it takes a `body`."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> None:
    """Add the bodies that the routes of `app` take to its OpenAPI schema."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _, bodies = models_json_schema(
                [(body, "validation") for body in get_args(AnyBody)], ref_template="#/components/schemas/{model}"
            )
            FastAPI.openapi(app)["components"]["schemas"] |= bodies["$defs"]
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
