"""What a scheduling policy and a cost model are. A policy decides three things: order of service, what may share an iteration,
and what KV is reserved at admission. It keeps no clock and owns no request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

from stallfree.core.draft import Draft
from stallfree.core.ledger import Reserve as Reserve
from stallfree.core.plan import Plan, Shape
from stallfree.core.request import Request
from stallfree.core.slo import Slo


class Policy(Protocol):
    """Writes one iteration at a time into a `Draft`.

    `reserve`: KV blocks taken at admission, see `Reserve`.
    `stall_free`: the promise that while KV lasts every ready decode is in every iteration; tests hold the policy to it.
    """

    reserve: Reserve
    stall_free: bool

    def plan(self, draft: Draft) -> None: ...


@dataclass(frozen=True, slots=True)
class Setup:
    """What a policy is set up with beside its own options: `cost`, which prices iterations and learns, and the server's `targets`;
    None where there is none.
    """

    cost: "CostModel | None" = None
    targets: Slo | None = None


@runtime_checkable
class Tuned(Policy, Protocol):
    """A policy that is made of a `Setup`, and of its own options if it has any. Any other is made of its own options alone.

    `slo`: the targets that it keeps; `options`: those of its own that make the same policy of these targets again.
    """

    slo: Slo
    options: Mapping[str, Any]

    @classmethod
    def of(cls, setup: Setup, **options: Any) -> Self: ...


@runtime_checkable
class Ordered(Policy, Protocol):
    """A policy with an order of its own. All lists of requests that it reads are in that order, and it decides who is preempted."""

    def key(self, request: Request) -> tuple[Any, ...]:
        """By what requests are ordered, the least first; without this, by priority, then arrival. Asked once, when the request
        comes; of equal ones the first to come is first."""


@runtime_checkable
class Steady(Policy, Protocol):
    """A policy that says whether it is `steady`: what it plans follows from the requests' order and from what they lack, not from
    the time, the past, how long they have become, or whether their prompts are begun. Then, while nobody comes, goes, ends or runs
    out of room, one iteration is like the other, and a simulator may take many at once. A policy that does not say so is taken step
    by step.
    """

    steady: bool


@runtime_checkable
class Learner(Policy, Protocol):
    """A policy that looks at what became of its plans."""

    def learn(self, plan: Plan, requests: Sequence[Request], now: float) -> None:
        """`plan` ran without error and was complete at `now`; `requests` are those of its work, as they were before that."""


class CostModel(Protocol):
    """What an iteration costs."""

    def seconds(self, shape: Shape) -> float:
        """Seconds that an iteration of this shape takes."""

    def room(self, shape: Shape, start: int, most: int, limit: float) -> int:
        """How many tokens from position `start`, `most` at the most, an iteration of this shape can take in and stay within
        `limit` seconds; an efficient number of them, where the executor has such.
        """

    def learn(self, shape: Shape, seconds: float) -> float:
        """An iteration of this shape took `seconds`; returns these over what had been expected."""


class BatchModel(CostModel, Protocol):
    """A cost model to which decodes differ in nothing but the sum of their contexts, so that it can be asked in one go."""

    def batch(self, decodes: int, context: int, chunks: Shape) -> float:
        """Seconds of an iteration of so many `decodes` (any piece of one token), `context` tokens before them all together, and
        `chunks` of more than one: to the last bit what `seconds` says of such a shape.
        """
