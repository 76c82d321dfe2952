"""Paged attention for ragged hybrid batches in Triton: flash attention (Dao, arXiv 2307.08691) that finds keys and values by block
tables, with prompt chunks and decodes in one launch.

A program computes a few queries of one piece of work for all heads that share a KV head, so keys and values are read only once for
these. If there are few programs, as with decodes at long contexts, several share a context, and a second kernel combines their
results (flash decoding). It also runs in Triton's interpreter, without a GPU. It knows no model.
"""

import torch
import triton
import triton.language as tl

from stallfree.executors.torch.batch import Batch, upload

ROWS = 16
"""The fewest rows of a tile that tensor cores take."""
QUERIES = 64
"""Rows of a program if a batch has chunks."""
TILE = 64
"""Keys that a program reads at once."""
MOST_SPLITS = 32


@triton.jit
def _attend(
    query, keys, values, out, partial, state, begins, lengths, tables, piece_of, first_of, scale,
    query_token, query_head, cache_block, cache_token, cache_head, table_width,
    WINDOW: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One block of `COUNT` queries of one piece, one KV head, one part of the context. `MOST` >= COUNT x GROUP rows, `WIDTH` >=
    head size `SIZE`, both powers of two."""
    program, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece, first = tl.load(piece_of + program), tl.load(first_of + program)
    begin, length = tl.load(begins + piece), tl.load(lengths + piece)
    count = tl.load(begins + piece + 1) - begin
    row = tl.arange(0, MOST)
    which, own_head = first + row // GROUP, head * GROUP + row % GROUP
    real = (row < COUNT * GROUP) & (which < count)
    number = tl.arange(0, WIDTH)
    inside = number < SIZE
    q_at = (begin + which)[:, None] * query_token + own_head[:, None] * query_head + number[None, :]
    q = tl.load(query + q_at, mask=real[:, None] & inside[None, :], other=0.0)
    position = length - count + which
    last = tl.minimum(length - count + first + COUNT, length)
    begin_at = 0
    if WINDOW > 0:
        begin_at = tl.maximum(length - count + first - WINDOW + 1, 0) // TILE * TILE
    tiles = tl.cdiv(last - begin_at, TILE)
    each = tl.cdiv(tiles, SPLITS)
    peak = tl.full([MOST], float("-inf"), tl.float32)
    total = tl.zeros([MOST], tl.float32)
    sums = tl.zeros([MOST, WIDTH], tl.float32)
    for tile in range(split * each, tl.minimum((split + 1) * each, tiles)):
        at = begin_at + tile * TILE + tl.arange(0, TILE)
        valid = at < last
        block = tl.load(tables + piece * table_width + at // BLOCK, mask=valid, other=0)
        place = block * cache_block + (at % BLOCK) * cache_token + head * cache_head
        k = tl.load(keys + place[None, :] + number[:, None], mask=valid[None, :] & inside[:, None], other=0.0).to(q.dtype)
        v = tl.load(values + place[:, None] + number[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(q.dtype)
        seen = valid[None, :] & (at[None, :] <= position[:, None])
        if WINDOW > 0:
            seen &= at[None, :] > position[:, None] - WINDOW
        score = tl.where(seen, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp(score - safe[:, None])
        less = tl.exp(peak - safe)
        total = total * less + tl.sum(share, 1)
        sums = sums * less[:, None] + tl.dot(share.to(q.dtype), v, input_precision="ieee")
        peak = higher
    if SPLITS == 1:
        mean = sums / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + q_at, mean.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])
    else:
        heads = tl.num_programs(1) * GROUP
        slot = ((begin + which) * heads + own_head) * SPLITS + split
        tl.store(partial + slot[:, None] * WIDTH + number[None, :], sums, mask=real[:, None])
        tl.store(state + slot * 2, peak, mask=real)
        tl.store(state + slot * 2 + 1, total, mask=real)


@triton.jit
def _merge(
    partial, state, out, out_token, out_head,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One token and head: combine the results of the splits, as if there had been one."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = (token * tl.num_programs(1) + head) * SPLITS
    split, number = tl.arange(0, PADDED), tl.arange(0, WIDTH)
    real = split < SPLITS
    peak = tl.load(state + (slot + split) * 2, mask=real, other=float("-inf"))
    total = tl.load(state + (slot + split) * 2 + 1, mask=real, other=0.0)
    weight = tl.exp(peak - tl.max(peak, 0))
    sums = tl.load(partial + (slot + split)[:, None] * WIDTH + number[None, :], mask=real[:, None], other=0.0)
    mean = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + token * out_token + head * out_head + number, mean.to(out.dtype.element_ty), mask=number < SIZE)


def paged_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int) -> torch.Tensor:
    """See `attention.attend`. `query` is contiguous in its last dimension; keys and values have the same strides."""
    tokens, heads, size = query.shape
    kv_heads, block = keys.shape[2], keys.shape[1]
    group = heads // kv_heads
    most = max(ROWS, triton.next_power_of_2(group), QUERIES if max(batch.counts) > 1 else 0)
    count = most // group
    if batch.decodes:  # nothing comes from the host, so a CUDA graph can record it
        pieces, firsts = torch.arange(tokens, device=query.device), torch.zeros(tokens, dtype=torch.int64, device=query.device)
    else:
        blocks = [(piece, first) for piece, length in enumerate(batch.counts) for first in range(0, length, count)]
        pieces, firsts = upload([list(column) for column in zip(*blocks, strict=True)], query.device)
    splits = _splits(len(pieces) * kv_heads, max(batch.ends), query.device)
    width = triton.next_power_of_2(size)
    out = torch.empty_like(query)
    partial = torch.empty((tokens, heads, splits, width) if splits > 1 else 1, dtype=torch.float32, device=query.device)
    state = torch.empty((tokens, heads, splits, 2) if splits > 1 else 1, dtype=torch.float32, device=query.device)
    _attend[(len(pieces), kv_heads, splits)](
        query, keys, values, out, partial, state, batch.begins, batch.lengths, batch.tables, pieces, firsts, size**-0.5,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), batch.tables.stride(0),
        WINDOW=window, GROUP=group, COUNT=count, MOST=most, TILE=TILE, SIZE=size, WIDTH=width, BLOCK=block, SPLITS=splits,
    )  # fmt: skip
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        _merge[(tokens, heads)](
            partial, state, out, out.stride(0), out.stride(1), SIZE=size, WIDTH=width, SPLITS=splits, PADDED=padded
        )
    return out


def _splits(programs: int, longest: int, device: torch.device) -> int:
    """The number of parts of the context that makes enough programs for the device. Each part has at least a few tiles."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = -(-2 * processors // programs)
    return max(1, min(wanted, longest // (4 * TILE), MOST_SPLITS))
