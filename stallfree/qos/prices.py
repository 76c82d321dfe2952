"""What one request adds to the time of iterations that run anyway: its marginal seconds by a cost model. A request that runs alone
takes longer."""

from stallfree.core.policy import CostModel
from stallfree.core.request import Request


def prefill(cost: CostModel, start: int, stop: int) -> float:
    """Seconds that the tokens from `start` to `stop` of a prompt add."""
    return cost.seconds([(start, stop - start)]) - cost.seconds([(start, 1)]) if stop > start + 1 else 0.0


def decode(cost: CostModel, context: int, extra_rows: int = 0) -> float:
    """Seconds that one more decode at `context` tokens adds, whose sampling takes as long as `extra_rows` plain rows."""
    one = (context, 1)
    extra = [(extra_rows, 0)] if extra_rows else []
    return cost.seconds([one, one, *extra]) - cost.seconds([one])


def expected(cost: CostModel, r: Request, start: int, answer: float) -> float:
    """Seconds that a request will have added by its end, if `start` tokens are in the prefix cache and it gets `answer` tokens."""
    length = len(r.prompt)
    return prefill(cost, start, length) + answer * decode(cost, length + int(answer / 2), r.extra_rows)


def used(cost: CostModel, r: Request) -> float:
    """Seconds that a request has added so far. What was computed twice, because KV was short, counts once."""
    length, written = len(r.prompt), len(r.output)
    prompt = prefill(cost, r.num_cached, length if written else min(length, r.num_computed))
    return prompt + written * decode(cost, length + written // 2, r.extra_rows)
