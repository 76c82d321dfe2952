"""Timelines as rows: what became of each request, in numbers for other programs. It reads timelines and nothing else."""

from stallfree.metrics.report import COMPLETED
from stallfree.metrics.timeline import Timeline

COLUMNS = (
    *("id", "arrival_s", "scheduled_s", "first_token_s", "finished_s", "reason", "prompt_tokens", "output_tokens"),
    *("ttft_s", "tpot_s", "tbt_max_s", "e2e_s", "stalls"),
)
"""Of `row`, with their units. Moments count from the run's start; None is for what has not happened or is not known: a client does
not know when a request was first scheduled, and only records tell `stalls`, iterations without a token for a ready decode."""


def row(line: Timeline) -> tuple[str | float | int | None, ...]:
    """One request, by `COLUMNS`. `ttft_s`: arrival to first token; `tpot_s`: mean gap between tokens; `tbt_max_s`: the longest one;
    `e2e_s`: arrival to last token, of a request that was completed.
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
    )
