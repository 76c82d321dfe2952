"""Is a piece of work one that an executor can run? A plan that is not is refused before it can read or write outside of memory."""

from stallfree.core.plan import Capacity, Work


def needed_blocks(work: Work, capacity: Capacity) -> int:
    """How many KV blocks `work` uses. Raises ValueError if its positions, its tokens or its blocks do not fit together; what the
    tokens and block numbers are is not looked at.
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
