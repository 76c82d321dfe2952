"""A simulation for chrome://tracing and Perfetto: a process for each replica, a row for each of its pipeline stages, a bar for each
iteration. Gaps between bars are bubbles, or there was nothing to do. It knows spans and nothing else.
"""

from collections.abc import Sequence
from typing import Any

from stallfree.sim.replica import Span


def trace(spans: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """The spans of each replica in the Trace Event Format (JSON object form, times in microseconds), for `json.dump`."""
    events: list[dict[str, Any]] = []
    for replica, replica_spans in enumerate(spans):
        events.append(_name("process_name", replica, 0, f"replica {replica}"))
        events += [_name("thread_name", replica, number, f"stage {number}") for number in sorted({s.stage for s in replica_spans})]
        events += [
            {
                "name": _words(span),
                "ph": "X",
                "pid": replica,
                "tid": span.stage,
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "args": {"step": span.step, "decodes": span.decodes, "prefill tokens": span.prefill},
            }
            for span in replica_spans
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, replica: int, stage: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": replica, "tid": stage, "args": {"name": name}}


def _words(span: Span) -> str:
    parts = [f"{span.decodes} decodes"] if span.decodes else []
    parts += [f"{span.prefill} prefill"] if span.prefill else []
    return " + ".join(parts)
