"""What a scheduling policy and a cost model are. A policy decides three things: order of service, what may share an iteration,
and what KV is reserved at admission. It keeps no clock and owns no request.
"""

from typing import Literal, Protocol

from stallfree.core.draft import Draft
from stallfree.core.plan import Shape

Reserve = Literal["chunk", "prompt", "max"]


class Policy(Protocol):
    """Writes one iteration at a time into a `Draft`.

    `reserve`: KV blocks taken at admission: for the first chunk, the whole prompt, or the prompt and `max_tokens`.
    `stall_free`: the promise that while KV lasts every ready decode is in every iteration; tests hold the policy to it.
    """

    reserve: Reserve
    stall_free: bool

    def plan(self, draft: Draft) -> None: ...


class CostModel(Protocol):
    """Seconds that an iteration of this shape takes."""

    def seconds(self, shape: Shape) -> float: ...
