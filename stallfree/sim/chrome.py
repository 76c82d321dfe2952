"""A simulation as chrome://tracing and Perfetto draw it: a process for each replica, a row for each of its pipeline stages, a bar
for each iteration. Gaps between the bars are bubbles, or nothing to do.
"""

from collections.abc import Sequence
from typing import Any

from stallfree.sim.replica import Span


def trace(spans: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """The spans of each replica in the Trace Event Format (JSON object form, times in microseconds), for `json.dump`."""
    events: list[dict[str, Any]] = []
    for replica, of_one in enumerate(spans):
        events.append(_name("process_name", replica, 0, f"replica {replica}"))
        events += [_name("thread_name", replica, stage, f"stage {stage}") for stage in sorted({span.stage for span in of_one})]
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
            for span in of_one
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(what: str, replica: int, stage: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": replica, "tid": stage, "args": {"name": name}}


def _words(span: Span) -> str:
    held = [f"{span.decodes} decodes"] if span.decodes else []
    held += [f"{span.prefill} prefill"] if span.prefill else []
    return " + ".join(held)
