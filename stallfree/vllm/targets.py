"""A request's own latency targets, from vLLM's `extra_args` (`vllm_xargs` over HTTP). Bad ones are logged once and ignored: they
must not end an engine that serves others.
"""

import logging
from collections.abc import Mapping
from typing import Any

from stallfree.core.slo import Slo

log = logging.getLogger(__name__)

FIELD = "slo"
"""The name in `extra_args`. Its value: words (`"ttft=500ms,tbt=50ms"`), or, offline, a mapping (`{"ttft_ms": 500, "tbt_ms": 50}`);
over HTTP vLLM takes no mapping."""
LONGEST = 200
"""Characters of the longest words that are read. They are read between two iterations, in which every stream waits."""
MOST_WARNINGS = 100
"""How many different bad values are logged."""

_warnings: set[str] = set()


def own_targets(request: Any, default: Slo) -> Slo | None:
    """The targets of vLLM's `request`; None if it has none that can be read. Percentiles that it does not name are `default`'s."""
    extra = getattr(request.sampling_params, "extra_args", None)
    value = extra.get(FIELD) if isinstance(extra, Mapping) else None
    if value is None:
        return None
    try:
        return read(value, default)
    except (ValueError, OverflowError) as error:
        message = str(error)[:LONGEST]
        if message not in _warnings and len(_warnings) < MOST_WARNINGS:
            _warnings.add(message)
            log.warning("a request's targets in %s are ignored: %s", FIELD, message)
        return None


def read(value: object, default: Slo) -> Slo:
    """Raises ValueError for targets that cannot be read."""
    if isinstance(value, str):
        if len(value) > LONGEST:
            raise ValueError(f"{value[:40]!r}... has {len(value):,} characters; targets have at most {LONGEST}")
        return Slo.parse(value)
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{value!r:.80} is neither words, such as tbt=50ms, nor a mapping, such as {{'tbt_ms': 50}}")
    times: dict[str, float] = {}
    for name, milliseconds in value.items():
        if not isinstance(name, str) or not name.endswith("_ms"):
            raise ValueError(f"unknown latency target {name!r:.80}; known are ttft_ms, tbt_ms, tpot_ms")
        if isinstance(milliseconds, bool) or not isinstance(milliseconds, int | float):
            raise ValueError(f"{name} is {milliseconds!r:.80}, not a number of milliseconds")
        times[name.removesuffix("_ms")] = float(milliseconds)
    return Slo.of(times, default)
