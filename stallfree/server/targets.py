"""What a request is promised: its service class and its own latency targets, from its body, its headers and its tenant.

It knows the names of fields and headers. What the targets mean, the policy decides.
"""

import re
from typing import NamedTuple

from starlette.datastructures import Headers

from stallfree.core.classes import Classes
from stallfree.core.slo import Slo
from stallfree.server.errors import ApiError, shown
from stallfree.server.schema import LEAST_TARGET_MS, LONGEST_CLASS, MOST_TARGET_MS, Generation

CLASS_HEADER = "x-slo-class"
TARGET_HEADERS = ("x-slo", "x-llm-d-slo")
"""Prefixes of the headers with a request's latency targets: this server's, and that of llm-d's gateway."""
TARGETS = ("ttft", "tbt", "tpot", "ttlt")
USUAL_TIERS = ("auto", "default", "standard_only")
"""Values of `service_tier` that name no class: OpenAI's and Anthropic's words for the usual one."""
HOSTED_TIERS = ("flex", "priority", "scale")
"""Values of `service_tier` that OpenAI sells. A server without classes takes them for the usual one."""


class Promise(NamedTuple):
    """`service_class`: its name, "" if the server has no classes. `slo`: the request's own targets and those of its class; None:
    those of the default class. `answered`: the class for the answer's `service_tier`; None if the request named no tier or class.
    """

    service_class: str = ""
    slo: Slo | None = None
    answered: str | None = None


def promise(body: Generation, headers: Headers, classes: Classes, default: Slo, own_class: str = "") -> Promise:
    """What a request is promised. `default`: the targets of the first of the `classes`, as the policy keeps them. `own_class`: the
    tenant's own default class; "": the first. Raises ApiError, with the place, for an unknown class, for a value that is no time,
    and for two that contradict each other.
    """
    usual = next(iter(classes))
    tier = body.service_tier
    is_usual = tier in USUAL_TIERS or (tier in HOSTED_TIERS and list(classes) == [""])
    named = _class(body, headers, None if is_usual and tier not in classes else tier)
    if named is not None:
        name, place = named
        try:
            classes.find(name)
        except ValueError as error:
            raise ApiError(400, f"{place}: {error}", param=place) from None
    else:
        name = own_class or usual
    targets = default if name == usual else classes[name]
    own = _own(body, headers, targets)
    if name != usual:
        own = targets if own is None else own.within(targets)
    return Promise(name, own, name or None if named is not None or is_usual else None)


def _class(body: Generation, headers: Headers, tier: str | None) -> tuple[str, str] | None:
    """The class that the request names, and where; None if it names none."""
    names = [(tier, "service_tier"), (None if body.slo is None else body.slo.class_, "slo.class")]
    names += [(value, CLASS_HEADER) for value in headers.getlist(CLASS_HEADER)]
    first: tuple[str, str] | None = None
    for name, place in names:
        if name is None:
            continue
        if not 0 < len(name) <= LONGEST_CLASS:
            raise ApiError(400, f"{place}: {shown(name)} names no class; a name has 1 to {LONGEST_CLASS} characters", param=place)
        first = first or (name, place)
        if name != first[0]:
            raise ApiError(400, f"{place} names class {name!r}, {first[1]} names {first[0]!r}; give one of them", param=place)
    return first


def _own(body: Generation, headers: Headers, default: Slo) -> Slo | None:
    """A request's own targets, with the percentiles of `default`; None without any."""
    times: dict[str, tuple[float, str]] = {}
    for name in TARGETS:
        own = None if body.slo is None else getattr(body.slo, f"{name}_ms")
        values = [] if own is None else [(float(own), f"slo.{name}_ms")]
        for header in (f"{prefix}-{name}-ms" for prefix in TARGET_HEADERS):
            values += [(_milliseconds(value, header), header) for value in headers.getlist(header)]
        for value, place in values:
            first, where = times.setdefault(name, (value, place))
            if value != first:
                raise ApiError(
                    400, f"{place} asks for {name} {value:g} ms, {where} for {first:g} ms; give one of them", param=place
                )
    if not times:
        return None
    if "tbt" in times and "tpot" in times:
        message = "tbt_ms and tpot_ms both say when the next token is due; give one of them"
        raise ApiError(400, message, param=times["tpot"][1])
    return Slo.of({name: value for name, (value, _) in times.items()}, default)


def _milliseconds(text: str, header: str) -> float:
    if not re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,6})?", text) or not LEAST_TARGET_MS <= float(text) <= MOST_TARGET_MS:
        limits = f"from {LEAST_TARGET_MS:g} to {MOST_TARGET_MS:,}"
        message = f"{header}: {shown(text)} is not a number of milliseconds {limits}; write {header}: 100"
        raise ApiError(400, message, param=header)
    return float(text)
