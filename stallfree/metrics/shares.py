"""Tells in words how a recorded run was shared: whose tokens were late, who was refused and why, which requests were relegated, and
how good the forecasts of first tokens were. Times are seconds since the run's first arrival.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from stallfree.core.record import Arrived, Refusal, Run, StepRecord
from stallfree.core.slo import Slo, Target
from stallfree.metrics.stalls import Stall
from stallfree.metrics.timeline import timelines

WORST = 5
"""At most so many tenants, classes or reasons are shown."""
RELEGATES = "slo"
"""The policy that relegates."""
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")


class Shares:
    """`run` and `records`, in which the first request arrived at `origin`."""

    def __init__(self, run: Run, records: Sequence[StepRecord], origin: float):
        self._run, self._origin = run, origin
        self._tenants = {id: (tenant, weight) for r in records for id, tenant, weight in r.tenants}
        self._classes = dict(pair for r in records for pair in r.classes)
        self._predicted = dict(pair for r in records for pair in r.predicted)
        self._firsts = {id: line.tokens[0] for id, line in timelines(records).items() if line.tokens}
        self._arrived = {a.id: a for r in records for a in r.arrived}
        self._refused = [refusal for r in records for refusal in r.refused]
        self._end = records[-1].t_end

    def late(self, late: Iterable[Stall]) -> Iterator[str]:
        """Whose the late tokens are, if requests have tenants or classes."""
        ids = [stall.id for stall in late]
        for noun, names in (
            ("class", [self._classes.get(id, "") for id in ids]),
            ("tenant", [self._tenants.get(id, ("", 1.0))[0] for id in ids]),
        ):
            if any(names):
                for name, count in Counter(names).most_common(WORST):
                    yield f"  {count} of these late tokens are of {f'{noun} {name}' if name else f'no {noun}'}"

    def refused(self) -> Iterator[str]:
        """How many requests were refused, whose they were, and why."""
        kinds: dict[tuple[str, str], list[Refusal]] = {}
        for refusal in self._refused:
            kinds.setdefault((refusal.tenant, _NUMBER.sub("", refusal.why)), []).append(refusal)
        if kinds:
            yield f"{_number(len(self._refused), 'request')} refused:"
        for (tenant, _), alike in sorted(kinds.items(), key=lambda kind: -len(kind[1]))[:WORST]:
            whose = f" of tenant {tenant}" if tenant else ""
            last = alike[-1]
            yield f"  {len(alike)}{whose}, the last one at {last.t - self._origin:.3f} s, because: {last.why}"

    def forecasts(self) -> Iterator[str]:
        """How long first tokens took, compared with their forecasts."""
        ratios = [
            (first - self._arrived[id].arrival) / self._predicted[id]
            for id, first in self._firsts.items()
            if self._predicted.get(id)
        ]
        if ratios:
            middle, high = np.percentile(ratios, [50, 90])
            times = f"{middle:.2f} times the forecast at the median, {high:.2f} times at P90"
            yield f"{_number(len(ratios), 'first token')} forecast; actual times are {times}."

    def relegations(self) -> Iterator[str]:
        """How many requests were relegated for certain: those that missed the end of their targets."""
        count = sum(self._missed(a) is not None for a in self._arrived.values())
        if count:
            yield f"{_number(count, 'request')} relegated: a target could not be met any more, so others came first."

    def whose(self, id: str) -> str:
        """Words on a request's tenant and class, to follow others; empty without both."""
        words = ""
        if id in self._tenants:
            tenant, weight = self._tenants[id]
            words += f", of {f'tenant {tenant}' if tenant else 'no tenant'} with weight {weight:g}"
        return f"{words}, class {self._classes[id]}" if id in self._classes else words

    def fate(self, id: str) -> Iterator[str]:
        """When a request's first token was expected, and whether it was relegated."""
        arrived = self._arrived[id]
        if id in self._predicted:
            yield f"At its arrival, its first token was expected after {1e3 * self._predicted[id]:.0f} ms."
        missed = self._missed(arrived)
        if missed is not None:
            name, target = missed
            at = arrived.arrival + target.seconds - self._origin
            yield (
                f"It was relegated at {at:.3f} s at the latest: {name}={target} could not be met any more, so it got what others "
                "left."
            )

    def _missed(self, a: Arrived) -> tuple[str, Target] | None:
        """The target that ended before the first token of a request came, under a policy that relegates it then."""
        if self._run.policy != RELEGATES:
            return None
        slo = self._run.targets or Slo()
        slo = Slo.parse(a.slo).within(slo) if a.slo else slo
        first = self._firsts.get(a.id, self._end)
        ends = [(name, target) for name, target in (("ttft", slo.ttft), ("ttlt", slo.ttlt)) if target is not None]
        return next(((name, target) for name, target in ends if first - a.arrival > target.seconds), None)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{' was' if count == 1 else 's were'}"
