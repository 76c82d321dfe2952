"""Whose blocks leave the prefix cache first: the lowest priority's, then those of the tenant that has most over its weight."""

from stallfree.core.kv import BlockPool
from stallfree.core.request import Request


def leave(pool: BlockPool, name: str, blocks: int, **whose: object) -> Request:
    """A request computes so many blocks, and ends. Returns one that asks for the same prefix."""
    prompt = [sum(map(ord, name)) * 1000 + i for i in range(blocks * pool.block_size)]
    request = Request(name, prompt, 1, **whose)
    assert pool.grow(request, len(prompt))
    request.num_computed = request.num_planned = len(prompt)
    pool.commit(request)
    pool.release(request)
    return Request(f"{name} again", [*prompt, 1], 1, **whose)


def take(pool: BlockPool, blocks: int) -> None:
    assert pool.grow(Request("new", [1], 1), blocks * pool.block_size)


def test_the_lowest_priority_goes_first_however_lately_it_was_used():
    pool = BlockPool(40, 16)
    high = leave(pool, "high", 20)
    low = leave(pool, "low", 20, priority=1)
    take(pool, 20)
    assert (20 * 16, 0) == (pool.look(high), pool.look(low))
    take(pool, 5)
    assert 0 < pool.look(high) < 20 * 16


def test_the_tenant_with_most_over_its_weight_goes_first():
    pool = BlockPool(400, 16)
    heavy = leave(pool, "heavy", 300, tenant="heavy", weight=4.0)
    light = leave(pool, "light", 100, tenant="light", weight=1.0)
    take(pool, 64)
    assert pool.look(light) < 100 * 16
    assert pool.look(heavy) > 200 * 16


def test_of_one_tenant_the_least_recently_used_goes_first():
    pool = BlockPool(40, 16)
    old, new = leave(pool, "old", 20), leave(pool, "new one", 20)
    take(pool, 20)
    assert (0, 20 * 16) == (pool.look(old), pool.look(new))
