"""Random JSON schemas: nested objects, arrays, choices, references, formats, bounds, patterns; a few ask for what cannot be had."""

import random
from typing import Any

FORMATS = ("date", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname")
PATTERNS = ("^[a-z]{2,8}$", "^[A-Z][a-z]+(-[0-9]{2})?$", "^(north|south)[0-9]*$", "^\\d{3}-\\d{4}$", "^[^\\s]{1,12}$")
UNSUPPORTED: tuple[tuple[str, Any], ...] = (
    ("uniqueItems", True),
    ("if", {"type": "string"}),
    ("contains", {"type": "integer"}),
    ("propertyNames", {"maxLength": 3}),
    ("dependentRequired", {"a": ["b"]}),
)
NAMES = ("name", "id", "größe", "a b", 'quo"te', "tags", "x", "value")


def schema(number: int) -> dict[str, Any]:
    """Schema `number`: the same in every run."""
    draw = random.Random(number)
    made = _value(draw, 3)
    if draw.random() < 0.3:
        made = {
            "$defs": {"part": _value(draw, 1)},
            "type": "object",
            "properties": {"part": {"$ref": "#/$defs/part"}, "rest": made},
        }
        made |= {"required": ["part"], "additionalProperties": False}
    if draw.random() < 0.08:
        made = dict([*made.items(), draw.choice(UNSUPPORTED)])
    return made


def _value(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _string, _integer, _number, _enum, _const, lambda draw, depth: {"type": draw.choice(["boolean", "null"])}]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _any_of, _all_of]
    return draw.choice(kinds)(draw, depth)


def _string(draw: random.Random, depth: int) -> dict[str, Any]:
    kind = draw.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": draw.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": draw.choice(FORMATS)}
    least = draw.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(20)}


def _integer(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randrange(-1000, 1000)
    return {"type": "integer", draw.choice(["minimum", "exclusiveMinimum"]): least, "maximum": least + draw.randrange(2, 5000)}


def _number(draw: random.Random, depth: int) -> dict[str, Any]:
    least = round(draw.uniform(-100, 100), 2)
    return {"type": "number", "minimum": least, draw.choice(["maximum", "exclusiveMaximum"]): least + draw.randrange(1, 100)}


def _enum(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": draw.sample(["red", "grün", 'a"b', "\\", 1, 2.5, True, None, "🙂"], draw.randrange(1, 6))}


def _const(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"const": draw.choice(["fixed", 7, {"a": [1, "b"]}, [], None])}


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randrange(1, 5))
    made = {"type": "object", "properties": {name: _value(draw, depth - 1) for name in names}}
    made["required"] = draw.sample(names, draw.randrange(len(names) + 1))
    if draw.random() < 0.8:
        made["additionalProperties"] = False
    return made


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randrange(3)
    made = {"type": "array", "items": _value(draw, depth - 1), "minItems": least, "maxItems": least + draw.randrange(1, 4)}
    if draw.random() < 0.2:
        made = {"type": "array", "prefixItems": [_value(draw, depth - 1) for _ in range(2)], "items": False, "minItems": 2}
    return made


def _any_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_value(draw, depth - 1) for _ in range(draw.randrange(2, 4))]}


def _all_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"allOf": [{"type": "integer", "minimum": draw.randrange(10)}, {"maximum": draw.randrange(20, 99)}]}
