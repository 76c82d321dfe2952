"""Paged attention for ragged hybrid batches in Triton: flash attention (Dao, arXiv 2307.08691) that finds keys and values by block
tables. Decodes and prompt chunks are two launches of one kernel, each with the tiles that are fastest for it.

A program computes a few queries of one piece of work for all heads that share a KV head, so keys and values are read only once for
these. If there are few programs, as with decodes at long contexts, several share a context, and a second kernel combines their
results (flash decoding). It also runs in Triton's interpreter, without a GPU. It knows no model.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from stallfree.executors.torch.batch import Batch, upload


class Tiles(NamedTuple):
    """A program's work: `rows` (a row is a query of one head) and `keys` at once, by `warps` warps with `stages` loads in flight.
    Contexts are split until there are `programs` for each processor of the GPU."""

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int


DECODES = Tiles(16, 64, 2, 2, 4)
"""The fastest tried on an H200 with the heads of Llama 3 8B: it reads the KV of 32 decodes at 3.8 TB/s; a copy gets 4.1."""
CHUNKS = Tiles(64, 64, 4, 2, 2)
"""The best compromise there, for chunks of 64 to 8,192 tokens. 128 rows and keys are 13 % faster for a prompt of 8,192, and
34 % slower for eight of 256. They also need more shared memory than smaller GPUs have."""
WIDE = Tiles(64, 32, 4, 2, 2)
"""For heads of more than `WIDE_BYTES`. Larger tiles of them do not fit the shared memory of a processor."""
WIDE_BYTES = 256
ROWS = 16
"""The fewest rows of a tile that tensor cores take."""
LEAST_TILES = 4
"""The fewest tiles of a part of a context."""
MOST_SPLITS = 32
LOG2_E = 1.4426950408889634
"""The kernels compute powers of two, which are faster than those of e."""


@triton.jit
def _scan(
    q, peak, total, sums, keys, values, table, position, begin_at, begin, end, last, number,
    cache_block, cache_token, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend to the tiles `begin` to `end` of the context. Without `MASKED`, every query sees every key of these tiles."""
    for tile in range(begin, end):
        at = begin_at + tile * TILE + tl.arange(0, TILE)
        if MASKED:
            valid, inside = at < last, number < SIZE
            block = tl.load(table + at // BLOCK, mask=valid, other=0)
            place = block * cache_block + (at % BLOCK) * cache_token
            k = tl.load(keys + place[None, :] + number[:, None], mask=valid[None, :] & inside[:, None], other=0.0).to(q.dtype)
            v = tl.load(values + place[:, None] + number[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(q.dtype)
            seen = valid[None, :] & (at[None, :] <= position[:, None])
            if WINDOW > 0:
                seen &= at[None, :] > position[:, None] - WINDOW
            score = tl.where(seen, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        else:
            block = tl.load(table + at // BLOCK)
            place = block * cache_block + (at % BLOCK) * cache_token
            k = tl.load(keys + place[None, :] + number[:, None]).to(q.dtype)
            v = tl.load(values + place[:, None] + number[None, :]).to(q.dtype)
            score = tl.dot(q, k, input_precision="ieee") * scale
            higher = tl.maximum(peak, tl.max(score, 1))
            safe = higher
        share = tl.exp2(score - safe[:, None])
        less = tl.exp2(peak - safe)
        total = total * less + tl.sum(share, 1)
        sums = tl.dot(share.to(q.dtype), v, sums * less[:, None], input_precision="ieee")
        peak = higher
    return peak, total, sums


@triton.jit(do_not_specialize=["table_width"])  # each specialisation is another compilation
def _attend(
    query, keys, values, out, partial, state, begins, lengths, tables, tiles, sinks, scale,
    query_token, query_head, cache_block, cache_token, cache_head, table_width,
    LISTED: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One block of `COUNT` queries of one piece, one KV head, one part of the context. `LISTED`: `tiles` has the piece and the
    first query of each program; otherwise each piece is a decode. `MOST` >= COUNT x GROUP rows, `WIDTH` >= head size `SIZE`, both
    powers of two. `scale`: for powers of two."""
    program, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece, first = program, 0
    if LISTED:
        piece, first = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1).to(tl.int32)
    begin, length = tl.load(begins + piece), tl.load(lengths + piece).to(tl.int32)
    count = (tl.load(begins + piece + 1) - begin).to(tl.int32)
    row, number = tl.arange(0, MOST), tl.arange(0, WIDTH)
    which, own_head = first + row // GROUP, head * GROUP + row % GROUP
    real = (row < COUNT * GROUP) & (which < count)
    inside = number < SIZE
    q_at = (begin + which)[:, None] * query_token + own_head[:, None] * query_head + number[None, :]
    q = tl.load(query + q_at, mask=real[:, None] & inside[None, :], other=0.0)
    position = length - count + which
    last = tl.minimum(length - count + first + COUNT, length)
    begin_at = 0
    if WINDOW > 0:
        begin_at = tl.maximum(length - count + first - WINDOW + 1, 0) // TILE * TILE
    tiles_in_all = tl.cdiv(last - begin_at, TILE)
    each = tl.cdiv(tiles_in_all, tl.num_programs(2))
    from_tile, to_tile = split * each, tl.minimum((split + 1) * each, tiles_in_all)
    peak = tl.full([MOST], float("-inf"), tl.float32)
    total = tl.zeros([MOST], tl.float32)
    if SINKS:  # as if the first part of the context began with a key of this logit, whose value is zero
        sink = tl.load(sinks + own_head).to(tl.float32) * 1.4426950408889634  # LOG2_E
        peak, total = tl.where(split == 0, sink, peak), tl.where(split == 0, 1.0, total)
    sums = tl.zeros([MOST, WIDTH], tl.float32)
    own_keys, own_values, table = keys + head * cache_head, values + head * cache_head, tables + piece * table_width
    if WINDOW == 0 and SIZE == WIDTH:  # the tiles that the first query sees whole need no masks
        whole = tl.maximum(from_tile, tl.minimum(to_tile, (length - count + first + 1) // TILE))
        peak, total, sums = _scan(
            q, peak, total, sums, own_keys, own_values, table, position, 0, from_tile, whole, last, number,
            cache_block, cache_token, scale, MASKED=False, WINDOW=WINDOW, TILE=TILE, SIZE=SIZE, BLOCK=BLOCK,
        )  # fmt: skip
        from_tile = whole
    peak, total, sums = _scan(
        q, peak, total, sums, own_keys, own_values, table, position, begin_at, from_tile, to_tile, last, number,
        cache_block, cache_token, scale, MASKED=True, WINDOW=WINDOW, TILE=TILE, SIZE=SIZE, BLOCK=BLOCK,
    )  # fmt: skip
    if not SPLIT:
        mean = sums / tl.where(total > 0, total, 1.0)[:, None]
        out_at = ((begin + which)[:, None] * tl.num_programs(1) * GROUP + own_head[:, None]) * SIZE + number[None, :]
        tl.store(out + out_at, mean.to(out.dtype.element_ty), mask=real[:, None] & inside[None, :])
    else:
        slot = ((program * tl.num_programs(1) + head) * tl.num_programs(2) + split).to(tl.int64) * MOST + row
        tl.store(partial + slot[:, None] * WIDTH + number[None, :], sums, mask=real[:, None])
        tl.store(state + slot * 2, peak, mask=real)
        tl.store(state + slot * 2 + 1, total, mask=real)


@triton.jit(do_not_specialize=["kv_heads", "splits"])
def _merge(
    partial, state, out, begins, tiles, kv_heads, splits,
    LISTED: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, MOST: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One row of a block of queries: combine the results of the splits, as if there had been one."""
    program, head, row = tl.program_id(0), tl.program_id(1) // (COUNT * GROUP), tl.program_id(1) % (COUNT * GROUP)
    piece, first = program, 0
    if LISTED:
        piece, first = tl.load(tiles + 2 * program), tl.load(tiles + 2 * program + 1).to(tl.int32)
    token = tl.load(begins + piece) + first + row // GROUP
    if token < tl.load(begins + piece + 1):  # the last block of a piece may be short
        split, number = tl.arange(0, PADDED), tl.arange(0, WIDTH)
        slot = ((program * kv_heads + head) * splits + split).to(tl.int64) * MOST + row
        real = split < splits
        peak = tl.load(state + slot * 2, mask=real, other=float("-inf"))
        total = tl.load(state + slot * 2 + 1, mask=real, other=0.0)
        weight = tl.exp2(peak - tl.max(peak, 0))
        sums = tl.load(partial + slot[:, None] * WIDTH + number[None, :], mask=real[:, None], other=0.0)
        mean = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
        to = out + (token * kv_heads * GROUP + head * GROUP + row % GROUP) * SIZE + number
        tl.store(to, mean.to(out.dtype.element_ty), mask=number < SIZE)


def paged_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, window: int, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """See `attention.attend`. `query` is contiguous in its last dimension; keys and values have the same strides."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    group = query.shape[1] // keys.shape[2]
    wide = query.shape[2] * query.itemsize > WIDE_BYTES
    if batch.decodes:  # nothing comes from the host, so a CUDA graph can record it
        _launch(query, keys, values, out, batch, window, sinks, _tiles(group, wide, chunks=False), 1, None)
        return out
    for chunks in sorted({count > 1 for count in batch.counts}):
        tiles = _tiles(group, wide, chunks)
        count = tiles.rows // group if chunks else 1
        listed = _listed(batch, count, chunks, query.device)
        _launch(query, keys, values, out, batch, window, sinks, tiles, count, listed)
    return out


def _tiles(group: int, wide: bool, chunks: bool) -> Tiles:
    """The tiles for heads of which `group` share a KV head."""
    least = max(ROWS, triton.next_power_of_2(group))
    tiles = WIDE if wide else CHUNKS if chunks or least > DECODES.rows else DECODES
    return tiles._replace(rows=max(least, tiles.rows) if chunks else least)


def _listed(batch: Batch, count: int, chunks: bool, device: torch.device) -> torch.Tensor:
    """The piece and the first query of each program, for the chunks of a batch or for its decodes: [programs, 2]. The first
    layer's is kept for the others.
    """
    listed = batch.programs.get((count, chunks))
    if listed is None:
        pairs = [(i, first) for i, of in enumerate(batch.counts) if (of > 1) == chunks for first in range(0, of, count)]
        # The longest contexts first, so that no program is left running alone at the end.
        pairs.sort(key=lambda pair: batch.counts[pair[0]] - batch.ends[pair[0]] - pair[1])
        listed = batch.programs[count, chunks] = upload(pairs, device)
    return listed


def _launch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor, batch: Batch, window: int,
    sinks: torch.Tensor | None, tiles: Tiles, count: int, listed: torch.Tensor | None,
) -> None:  # fmt: skip
    """Write into `out` the attention of the pieces in `listed`, or of all (None), in programs of `count` queries."""
    heads, size = query.shape[1:]
    kv_heads, block = keys.shape[2], keys.shape[1]
    programs = len(batch.counts) if listed is None else len(listed)
    splits = _splits(tiles, programs * kv_heads, max(batch.ends), query.device)
    width = triton.next_power_of_2(size)
    slots = (programs, kv_heads, splits, tiles.rows) if splits > 1 else (1,)
    partial = torch.empty((*slots, width), dtype=torch.float32, device=query.device)
    state = torch.empty((*slots, 2), dtype=torch.float32, device=query.device)
    pieces = batch.begins if listed is None else listed
    shape = {"GROUP": heads // kv_heads, "COUNT": count, "MOST": tiles.rows, "SIZE": size, "WIDTH": width}
    _attend[(programs, kv_heads, splits)](
        query, keys, values, out, partial, state, batch.begins, batch.lengths, batch.tables, pieces,
        query if sinks is None else sinks, size**-0.5 * LOG2_E,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2), batch.tables.stride(0),
        LISTED=listed is not None, WINDOW=window, TILE=tiles.keys, BLOCK=block, SPLIT=splits > 1,
        SINKS=sinks is not None, **shape,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        _merge[(programs, count * heads)](
            partial, state, out, batch.begins, pieces, kv_heads, splits, LISTED=listed is not None, PADDED=padded, **shape
        )


def _splits(tiles: Tiles, programs: int, longest: int, device: torch.device) -> int:
    """The number of parts of the context that makes enough programs for the device. Each part has at least a few tiles."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    wanted = tiles.programs * processors // programs
    return max(1, min(wanted, longest // (LEAST_TILES * tiles.keys), MOST_SPLITS))
