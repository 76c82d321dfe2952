"""The loosely typed values in bodies of responses and messages, and the parts of a chat that they become. It knows neither API."""

from collections.abc import Mapping
from typing import Any

from stallfree.server.errors import ApiError, shown
from stallfree.server.schema import Function, NamedFunction, NamedTool, ToolDefinition


def text_of(where: str, value: Mapping[str, Any], name: str) -> str:
    """The text `name` of a value at the place `where`. Raises ApiError if it is none."""
    text = value.get(name)
    if not isinstance(text, str):
        raise ApiError(400, f"{where}.{name} is {shown(text)}; it must be a text", param=f"{where}.{name}")
    return text


def tool(name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None) -> ToolDefinition:
    """A function that the model may call."""
    return ToolDefinition(
        type="function", function=Function(name=name, description=description, parameters=parameters, strict=strict)
    )


def named_tool(name: str) -> NamedTool:
    """The function that must be called."""
    return NamedTool(type="function", function=NamedFunction(name=name))
