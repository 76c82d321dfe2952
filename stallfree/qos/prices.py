"""What one request adds to the time of iterations that run anyway: its marginal seconds by a cost model. A request that runs alone
takes longer."""

from collections.abc import Sequence

from stallfree.core.policy import CostModel
from stallfree.core.request import Request


def beside(cost: CostModel) -> list[tuple[int, int]]:
    """A chunk beside which an iteration's tokens are not few, for a cost model that prices these apart (`Fitted.few`)."""
    few = getattr(cost, "few", 0)
    return [(0, few)] if few else []


def prefill(cost: CostModel, start: int, stop: int) -> float:
    """Seconds that the tokens from `start` to `stop` of a prompt add."""
    if stop <= start + 1:
        return 0.0
    base = beside(cost)
    return cost.seconds([*base, (start, stop - start)]) - cost.seconds([*base, (start, 1)])


def decode(cost: CostModel, context: int, extra_rows: int = 0) -> float:
    """Seconds that one more decode at `context` tokens adds, whose sampling takes as long as `extra_rows` plain rows."""
    one, base = (context, 1), beside(cost)
    extra = [(extra_rows, 0)] if extra_rows else []
    return cost.seconds([*base, one, one, *extra]) - cost.seconds([*base, one])


def adapters(cost: CostModel, brought: Sequence[tuple[int, int]]) -> float:
    """Seconds that adapters add, the pieces `brought` of a shape."""
    base = [*beside(cost), (1, 1)]
    return cost.seconds([*brought, *base]) - cost.seconds(base) if brought else 0.0


def given(r: Request) -> int:
    """Prompt tokens whose KV a request found in the prefix cache, or gets from another engine."""
    return min(len(r.prompt), max(r.num_cached, r.cut))


def expected(cost: CostModel, r: Request, start: int, answer: float) -> float:
    """Seconds that a request will have added by its end, if the KV of `start` tokens is given and it gets `answer` tokens."""
    length = len(r.prompt)
    return prefill(cost, start, length) + answer * decode(cost, length + int(answer / 2), r.extra_rows)


def used(cost: CostModel, r: Request) -> float:
    """Seconds that a request has added so far. What was computed twice, because KV was short, counts once."""
    length, written = len(r.prompt), len(r.output)
    prompt = prefill(cost, given(r), length if written else min(length, r.num_computed))
    return prompt + written * decode(cost, length + written // 2, r.extra_rows)
