"""The virtual token counter (VTC, OSDI'24, arXiv 2401.00588, algorithm 2): whenever there is room, the tenant that was served least
is next. Service is counted in tokens. A tenant that was idle begins at the least of those that wait, so it cannot save up.

It knows neither targets nor what an iteration costs.
"""

from collections.abc import Sequence

from stallfree.core.draft import Draft
from stallfree.core.plan import Plan
from stallfree.core.policy import Reserve
from stallfree.core.request import Request


class Vtc:
    """`token_budget`: the most tokens in an iteration, including decodes. `output_weight`: what a token of an answer counts; one of
    a prompt counts 1."""

    reserve: Reserve = "max"
    stall_free = True
    chunks = True

    def __init__(self, token_budget: int = 512, output_weight: float = 2.0):
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}; it must be at least 1 token")
        if not output_weight > 0:
            raise ValueError(f"output_weight is {output_weight:g}; it must be above 0")
        self.token_budget = token_budget
        self.output_weight = output_weight
        self._served: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._last = 0.0

    def turn(self, request: Request) -> tuple[float]:
        return (self._served.get(request.tenant, self._last),)

    def plan(self, draft: Draft) -> None:
        draft.decode_all()
        draft.cap(self.token_budget, "fixed token budget")
        for r in draft.prefilling:
            draft.prefill(r)
        self._lift({tenant for tenant, _, _ in draft.lanes} | draft.parked)
        while draft.lanes:
            lane = min(draft.lanes, key=lambda lane: self._served[lane[0]])
            (r,) = draft.first(lane)
            if not draft.admit(r):
                break
            self._charge(r, len(r.prompt))

    def learn(self, plan: Plan, requests: Sequence[Request], now: float) -> None:
        for work, r in zip(plan.work, requests, strict=True):
            if work.samples:
                self._charge(r, self.output_weight)

    def _charge(self, r: Request, tokens: float) -> None:
        self._served[r.tenant] = self._last = self._served.get(r.tenant, self._last) + tokens / r.weight

    def _lift(self, waiting: set[str]) -> None:
        """Begin to count tenants that have just begun to wait at the least of those that waited already, or of the last served."""
        least = min([self._served[tenant] for tenant in waiting & self._waiting], default=None)
        for tenant in waiting - self._waiting:
            before = self._served.get(tenant, 0.0)
            self._served[tenant] = max(before, self._last if least is None else least)
        self._waiting = waiting
