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
    """What the server gives to a policy besides the policy's own options. `cost` prices iterations and learns; `targets` are the
    server's latency targets. Each is None if there is none.
    """

    cost: "CostModel | None" = None
    targets: Slo | None = None


@runtime_checkable
class Tuned(Policy, Protocol):
    """A policy that is made of a `Setup` and of its own options. Any other policy is made of its own options alone.

    `slo`: the targets that it keeps. `options`: its own options; with these targets they make the same policy again.
    """

    slo: Slo
    options: Mapping[str, Any]

    @classmethod
    def of(cls, setup: Setup, **options: Any) -> Self: ...


@runtime_checkable
class Priced(Policy, Protocol):
    """A policy that knows what an iteration costs: `cost` prices its plans."""

    cost: "CostModel"


@runtime_checkable
class Ordered(Policy, Protocol):
    """A policy with its own order of requests. Every list that it reads is in this order, and preemption begins at its end."""

    def key(self, request: Request) -> tuple[Any, ...]:
        """The sort key of a request; the least key comes first. Without this method: priority, then arrival. Called once, when the
        request arrives. Of equal keys, the first to arrive comes first."""


@runtime_checkable
class Fair(Policy, Protocol):
    """A policy that shares the machine among tenants. The adapters that their requests wait for are loaded in its order."""

    def turn(self, request: Request) -> tuple[Any, ...]:
        """The place of a request in this order; the least comes first. It changes as tenants are served, and a tenant that is not
        served must be first in the end. Of equal ones, the requests' keys decide. Any thread may ask."""


@runtime_checkable
class Steady(Policy, Protocol):
    """A policy that says whether it is `steady`. A steady plan depends only on the order of the requests and on how many tokens
    each still needs. It does not depend on the time, the past, their lengths, or whether a prompt has begun. So iterations are
    alike until a request arrives, leaves, ends or runs out of KV, and a simulator may take many at once. It takes all other
    policies step by step.
    """

    steady: bool


@runtime_checkable
class Chunks(Policy, Protocol):
    """A policy that says whether it computes prompts in chunks. Then it also goes on with a prompt whose first part another engine
    has computed. Any other policy gets only whole prompts from other engines.
    """

    chunks: bool


@runtime_checkable
class Learner(Policy, Protocol):
    """A policy that learns from the results of its plans."""

    def learn(self, plan: Plan, requests: Sequence[Request], now: float) -> None:
        """`plan` ran without error and ended at `now` (s). `requests` are those of its work, before the result is applied."""


class Guess(Protocol):
    """Guesses the lengths of answers."""

    def left(self, request: Request) -> float:
        """Tokens that the request's answer will still have, on average."""


@runtime_checkable
class Forecasting(Priced, Protocol):
    """A policy that tells enough of its order and its pace to forecast first tokens. Any thread may read it.

    `slo`: the server's targets. `share`: the share of the time that prefill gets while it wants more. `decoding_s`: seconds of the
    last iteration's decodes. `crowding`: from 0 to 1, how often of late requests were kept out for want of room, not of time.
    """

    slo: Slo
    answers: Guess
    share: float
    decoding_s: float
    crowding: float

    def targets(self, request: Request) -> Slo:
        """The targets of a request, completed by the server's."""

    def first_due(self, request: Request) -> float:
        """When its first token is due (s)."""


class CostModel(Protocol):
    """Predicts how many seconds an iteration takes."""

    def seconds(self, shape: Shape) -> float:
        """The expected seconds of an iteration of this shape."""

    def room(self, shape: Shape, start: int, most: int, limit: float) -> int:
        """How many tokens from position `start`, at most `most`, an iteration of this shape can add within `limit` seconds. If some
        chunk sizes are efficient on the executor, it is one of these.
        """

    def learn(self, shape: Shape, seconds: float) -> float:
        """An iteration of this shape took `seconds`. Returns the measured over the expected seconds."""


@runtime_checkable
class BatchModel(Protocol):
    """The extra method of a cost model in which only the number of decodes and the sum of their contexts count."""

    def batch(self, decodes: int, context: int, chunks: Shape) -> float:
        """The expected seconds of an iteration. `decodes`: the number of pieces of one token; `context`: the tokens before them,
        summed; `chunks`: the longer pieces. Equal to the last bit to `seconds` of such a shape.
        """
