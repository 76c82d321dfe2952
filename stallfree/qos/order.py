"""Who gets prefill first: those that can still meet their targets; of these, answers that were interrupted and requests of tenants
with credit; then by priority; then by relative slack. It knows what prefill takes and what was promised, and not how much fits.
"""

from collections.abc import Iterable, Sequence
from heapq import nsmallest
from itertools import islice
from typing import NamedTuple

from stallfree.core.draft import RUNNING, Draft
from stallfree.core.policy import CostModel
from stallfree.core.request import Lane, Request, Status
from stallfree.qos import prices
from stallfree.qos.answers import Answers
from stallfree.qos.credits import Credits
from stallfree.qos.deadlines import Deadlines

FINISHED, RELEASED = Status.FINISHED, Status.RELEASED

LOOKAHEAD = 16
"""How many waiting requests, the oldest, compete for the next prefill. To order all would cost more than it gains."""

BILLING = 128
"""A request's bill is looked at in one of so many iterations."""

Rank = tuple[bool, bool, int, bool]
"""What decides before deadlines do. The least is served first."""


class Prompt(NamedTuple):
    """A request that wants prefill, the `seconds` that this takes, and its relative `slack`: the time until its first token is due,
    over those seconds (Medha's LARS, arXiv 2409.17264)."""

    request: Request
    seconds: float
    slack: float


class Order:
    """Orders the requests of one policy, and bills them to their tenants' `credits`."""

    def __init__(self, cost: CostModel, deadlines: Deadlines, answers: Answers):
        self.credits = Credits()
        self._cost, self._deadlines, self._answers = cost, deadlines, answers
        self._state: tuple[tuple[int, int], int] | None = None
        self._nearest: list[Request] = []

    def prompts(self, draft: Draft, share: float) -> list[Prompt]:
        """The requests that compete for prefill, the most urgent first. Prefill gets `share` of the time.

        A long prompt does not block short ones, and does not starve, because its slack falls as it waits. Without a target for the
        first token, this is the order by waiting time over prefill time. Cached tokens take no time, so of equals the one with the
        longest cached prefix comes first.
        """
        prompts = [self._prompt(draft, r, share) for r in self._candidates(draft)]
        return sorted(prompts, key=self._place) if len(prompts) > 1 else prompts

    def again(self, draft: Draft, rest: Iterable[Prompt], admitted: Request, share: float) -> list[Prompt]:
        """The `rest` of the prompts after a request was admitted. Its bill may have taken its tenant's credit, and others behind it
        come into view."""
        prompts = list(rest)
        if self.credits.contended:
            known = {prompt.request for prompt in prompts}
            behind = [r for r in draft.first(admitted.lane, LOOKAHEAD) if r not in known]
            prompts += [self._prompt(draft, r, share) for r in behind[:1]]
            prompts.sort(key=self._place)
        return prompts

    def bill(self, r: Request) -> None:
        """A request was admitted: bill what it will probably take."""
        self.credits.bill(r, prices.expected(self._cost, r, prices.given(r), self._answers.left(r)))

    def review(self, step: int, requests: Sequence[Request]) -> None:
        """Look at some of the `requests`, which have run: bill those that took more than was expected what they are expected to
        take now."""
        if self.credits.contended:
            for r in requests[step % BILLING :: BILLING]:
                used = prices.used(self._cost, r)
                if used > self.credits.billed.get(r, used):
                    self.credits.bill(r, used + self._answers.left(r) * prices.decode(self._cost, r.num_tokens, r.extra_rows))

    def settle(self, running: Sequence[Request]) -> None:
        """Learn from the requests that are not `running` any more, and correct their bills. Bill those that a KV transfer brought:
        the policy did not admit them.
        """
        if self.credits.billed.keys() == set(running):
            return
        for r in running:
            if r not in self.credits.billed:
                self.bill(r)
        for r in [r for r in self.credits.billed if r.status is not RUNNING]:
            self.credits.correct(r, prices.used(self._cost, r))
            if r.status is FINISHED:
                self._answers.learn(r)
            if r.status in (FINISHED, RELEASED):
                self.credits.close(r)

    def _prompt(self, draft: Draft, r: Request, share: float) -> Prompt:
        start, now = draft.start(r), draft.now
        seconds = self._cost.seconds([(start, r.num_tokens - start)])
        due = self._deadlines.first(r)
        missed = self._deadlines.missed(r, now + seconds / share) if due > r.arrival or r.relegated else False
        if missed != r.relegated:
            draft.relegate(r, missed)
        return Prompt(r, seconds, (due - now - seconds) / seconds)

    def _place(self, prompt: Prompt) -> tuple[bool, bool, int, bool, float]:
        return *self._rank(prompt.request), prompt.slack

    def _rank(self, r: Request) -> Rank:
        return r.relegated, not (r.output or self.credits.has(r.tenant)), r.priority, not r.output

    def _candidates(self, draft: Draft) -> list[Request]:
        """All that are being prefilled, and of the waiting ones the first of each lane, about `LOOKAHEAD` in all."""
        lanes, prefilling = draft.lanes, draft.prefilling
        tenants = {r.tenant for r in prefilling}
        self.credits.wait(tenants.union([tenant for tenant, _, _ in lanes]), draft.parked)
        if len(lanes) < 2:
            return [*prefilling, *islice(draft.waiting, LOOKAHEAD)]

        def order(lane: Lane) -> tuple[bool, bool, int, bool, float]:
            return *self._rank(draft.first(lane)[0]), self.credits.ahead(lane[0])

        state = draft.queue_version, self.credits.version
        if state != self._state:  # it is the same for many iterations
            nearest = nsmallest(LOOKAHEAD, lanes, key=order)
            self._state = state
            self._nearest = [r for lane in nearest for r in draft.first(lane, LOOKAHEAD // len(nearest))]
        return [*prefilling, *self._nearest]
