"""Turns timelines into rows of numbers, one for each request, for other programs. It reads timelines and nothing else."""

from stallfree.metrics.report import COMPLETED
from stallfree.metrics.timeline import Timeline

COLUMNS = (
    *("id", "arrival_s", "scheduled_s", "first_token_s", "finished_s", "reason", "prompt_tokens", "output_tokens"),
    *("ttft_s", "tpot_s", "tbt_max_s", "e2e_s", "stalls", "tenant", "class", "priority"),
)
"""Names of `row`'s columns, with their units. Times count from the run's start. None: it has not happened, or is not known. A
client does not know `scheduled_s`. Only records tell `stalls`, the iterations without a token for a ready decode."""


def row(line: Timeline) -> tuple[str | float | int | None, ...]:
    """One request, by `COLUMNS`. `ttft_s`: arrival to first token. `tpot_s`: mean gap between tokens. `tbt_max_s`: longest gap.
    `e2e_s`: arrival to last token, of a completed request.
    """
    gaps, tokens = line.gaps, line.tokens
    done = line.reason in COMPLETED and bool(tokens)
    return (
        line.id,
        line.arrival,
        line.scheduled,
        tokens[0] if tokens else None,
        line.finished,
        line.reason,
        line.prompt_tokens,
        len(tokens),
        line.ttft,
        sum(gaps) / len(gaps) if gaps else None,
        max(gaps, default=None),
        tokens[-1] - line.arrival if done else None,
        line.stalls,
        line.tenant,
        line.service_class,
        line.priority,
    )
