"""Pictures of runs, drawn from records: who got a token when, and who waited for whose prompt.

It needs matplotlib (the extra `plot`) and knows nothing of how a run came about.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stallfree.core.record import StepRecord
from stallfree.metrics.timeline import timelines


def streams(runs: Mapping[str, Sequence[StepRecord]], file: Path, window_s: tuple[float, float], long_prompt: int = 1000) -> None:
    """One panel per run: a row of dots for each stream, a dot for each token, and shading where an iteration computes a prompt of
    at least `long_prompt` tokens, as dark as its share of the iteration's tokens. `window_s`: from and to, in seconds after the
    first token.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.4 * len(runs) + 0.4), layout="constrained")
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, records) in zip(axes, runs.items(), strict=True):
        lines = timelines(records)
        origin = min(line.tokens[0] for line in lines.values() if line.tokens) + window_s[0]
        rows = [line for line in lines.values() if line.prompt_tokens < long_prompt]
        for r in records:
            total = sum(count for _, _, count in r.work)
            long = sum(count for id, _, count in r.work if lines[id].prompt_tokens >= long_prompt)
            if long:
                axis.axvspan(
                    r.t_start - origin, r.t_end - origin, color="tab:orange", alpha=0.15 + 0.35 * long / total, linewidth=0
                )
        for row, line in enumerate(rows):
            axis.plot([t - origin for t in line.tokens], [row] * len(line.tokens), ".", color="tab:blue", markersize=2.5)
        axis.set_xlim(0, window_s[1] - window_s[0])
        axis.set_yticks(range(0, len(rows), 5))
        axis.set_ylabel("stream")
        axis.set_title(name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds (a dot is a token; orange: a long prompt is being computed)")
    figure.savefig(file, dpi=150)
