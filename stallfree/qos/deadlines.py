"""When tokens are due, by the targets of the server and of each request. It knows no iteration and no cost."""

from collections.abc import Sequence
from functools import lru_cache
from math import inf

from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.qos.answers import Answers


class Deadlines:
    """`slo`: the server's targets, which complete those of a request. `answers`: how long answers will be; a target for the last
    token makes the tokens before it due at an even pace."""

    def __init__(self, slo: Slo, answers: Answers):
        self._slo = slo
        self._answers = answers
        self._merged = lru_cache(1024)(self._merge)

    @property
    def slo(self) -> Slo:
        return self._slo

    @slo.setter
    def slo(self, slo: Slo) -> None:
        self._slo = slo
        self._merged.cache_clear()

    def targets(self, r: Request) -> Slo:
        return self._slo if r.slo is None else self._merged(r.slo)

    def gap(self, r: Request) -> float:
        """Seconds between two tokens of a request; inf if no target says."""
        targets = self.targets(r)
        if targets.ttlt is not None and targets.tbt is targets.tpot is None:
            return targets.ttlt.seconds / (len(r.output) + self._answers.most_left(r))
        return gap(targets)

    def first(self, r: Request) -> float:
        """When the first token is due. Without a target for it: at once, so that the longest wait counts most."""
        targets = self.targets(r)
        if r.output:
            return self.next(r, targets)
        if targets.ttft is not None:
            return r.arrival + targets.ttft.seconds
        if targets.ttlt is not None:  # half of the time is for the tokens after it
            return r.arrival + targets.ttlt.seconds / 2
        return r.arrival

    def missed(self, r: Request, at: float) -> bool:
        """Whether a request that gets its first token `at` (s) misses a target by that."""
        targets = self.targets(r)
        if r.output:
            return False
        ends = [target.seconds for target in (targets.ttft, targets.ttlt) if target is not None]
        return bool(ends) and at > r.arrival + min(ends)

    def nexts(self, requests: Sequence[Request]) -> list[float]:
        """When the next token of each request is due. For nearly all requests this needs no call."""
        if self._slo.tbt is None:
            return [self.next(r, self.targets(r)) for r in requests]
        pause = self._slo.tbt.seconds
        return [r.last_token + pause if r.slo is None else self.next(r, self.targets(r)) for r in requests]

    def next(self, r: Request, slo: Slo) -> float:
        """When the next token of a request with output is due by `slo`."""
        if slo.tbt is not None:
            return r.last_token + slo.tbt.seconds
        if slo.tpot is not None:
            start = r.first_token if slo.ttft is None else max(r.first_token, r.arrival + slo.ttft.seconds)
            # After a standstill, a late request keeps its pace from there. To catch up, it would stall the others.
            return max(start + len(r.output) * slo.tpot.seconds, r.last_token + slo.tpot.seconds)
        if slo.ttlt is not None:
            left = r.arrival + slo.ttlt.seconds - r.last_token
            # What can no longer be kept is served from what is left, at the pace that a request has from its arrival.
            return r.last_token + (left if left > 0 else slo.ttlt.seconds) / self._answers.most_left(r)
        return inf

    def _merge(self, own: Slo) -> Slo:
        return own.within(self._slo)


def gap(slo: Slo) -> float:
    """Seconds between tokens; inf if no target says."""
    target = slo.tbt or slo.tpot
    return inf if target is None else target.seconds
