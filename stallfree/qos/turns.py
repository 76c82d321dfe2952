"""Which decodes sit out an iteration, because their targets leave time that others need more. It knows deadlines and prices, and
plans nothing.
"""

from collections.abc import Sequence
from math import inf

from stallfree.core.draft import RUNNING, Draft
from stallfree.core.policy import CostModel
from stallfree.core.request import Request
from stallfree.qos.deadlines import Deadlines

LOOSE = 1.5
"""Streams whose targets are this much looser than the tightest may sit out iterations. Among equals it gains nothing (docs/log.md).
"""


class Turns:
    """Prices by `cost`, dues by `deadlines`."""

    def __init__(self, cost: CostModel, deadlines: Deadlines):
        self._cost, self._deadlines = cost, deadlines

    def sitting(self, draft: Draft, dues: Sequence[float], wanted: float, margin: float) -> tuple[set[Request], float]:
        """The decodes that sit out this iteration, and the seconds that it may take for their sake. `dues`: of `draft.decoding`.
        `wanted`: the seconds of all prefill at hand. `margin`: the factor on expected times.

        Only a stream sits out whose target is looser than that of the tightest, and if its token will be in time although it comes
        only with the next iteration. And somebody has to gain by it: there is more prefill than fits beside all decodes, or these
        alone would be too slow for the tightest. Then a stream whose target is k times looser joins about every k-th iteration.
        """
        decoding = draft.decoding
        gaps = [self._deadlines.gap(r) for r in decoding]
        loose = LOOSE * min(gaps)
        if max(gaps) <= loose:
            return set(), inf
        slacks = [due - draft.now if due < inf else pause for due, pause in zip(dues, gaps, strict=True)]
        alone = self._cost.seconds([(r.num_planned, 1) for r in decoding])
        limit = min(slacks) / margin
        if limit < alone:
            first = self._cost.seconds([(decoding[0].num_planned, 1)])
            share = max(0.0, max(limit, min(gaps) / margin) - first) / max(alone - first, 1e-9)
            order = sorted(range(len(slacks)), key=lambda i: slacks[i] / gaps[i])
            return {decoding[i] for i in order[1 + int(share * (len(slacks) - 1)) :] if gaps[i] > loose}, inf
        if wanted <= limit - alone:
            return set(), inf
        enough = margin * (min(limit, wanted) + alone)
        rows = zip(decoding, slacks, gaps, strict=True)
        sitting = {r: slack for r, slack, pause in rows if slack >= enough and pause > loose}
        return set(sitting), min(sitting.values(), default=inf) / margin - alone

    def join(self, draft: Draft, shape: Sequence[tuple[int, int]], sitting: set[Request], limit: float) -> None:
        """Prefill has all that it wants: the streams that would sit out join as far as the time allows, the most urgent first."""
        streams = [r for r in draft.decoding if r in sitting and r.status is RUNNING]
        now, all_in = self._cost.seconds(shape), self._cost.seconds([*shape, *((r.num_planned, 1) for r in streams)])
        fit = len(streams) if all_in <= limit or draft.empty else int((limit - now) * len(streams) / (all_in - now))
        streams.sort(key=lambda r: self._deadlines.next(r, self._deadlines.targets(r)))
        draft.decode_all(but=sitting.difference(streams[: max(0, fit)]))
