"""Checks that an executor can run a piece of work. A piece that fails a check fails its request, before it can read or write
outside of memory; the rest of the plan runs. It knows no tensors.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from stallfree.core.plan import Capacity, Work

T = TypeVar("T")


def sift(work: Sequence[Work], check: Callable[[Sequence[Work]], T]) -> tuple[Sequence[Work], dict[str, str], T]:
    """The pieces of `work` that can run; why the others cannot, by request id; and the result of `check` for those that can.
    `check` raises ValueError if any piece cannot run. If no piece can run, this raises ValueError, too.
    """
    try:
        return work, {}, check(work)
    except ValueError as error:
        why = str(error)
    failed: dict[str, str] = {}
    for piece in work:
        try:
            check([piece])
        except ValueError as error:
            failed[piece.id] = str(error)
    rest = [piece for piece in work if piece.id not in failed]
    if not rest or not failed:
        raise ValueError("; ".join(failed.values()) or why)
    return rest, failed, check(rest)


def needed_blocks(work: Work, capacity: Capacity) -> int:
    """The number of KV blocks that `work` uses. Raises ValueError if its positions, tokens and blocks do not fit together. It does
    not check the values of tokens and block numbers.
    """
    end = work.start + work.count
    needed = -(-end // capacity.block_size)
    if work.start < 0 or work.count < 1 or end > capacity.max_model_len:
        raise ValueError(
            f"request {work.id}: tokens {work.start} to {end} are not within 0 to {capacity.max_model_len} (max_model_len)"
        )
    if len(work.tokens) != work.count:
        raise ValueError(f"request {work.id}: {len(work.tokens)} token ids for {work.count} tokens")
    if len(work.blocks) < needed:
        raise ValueError(f"request {work.id}: {len(work.blocks)} KV blocks cannot hold {end} tokens, {needed} are needed")
    return needed
