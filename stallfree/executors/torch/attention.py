"""Attention over a paged KV cache for a hybrid batch: chunks of prompts with cached context, and decodes, in one call.

The device decides what computes it: on CUDA the kernel in `kernels`, or FlashInfer (`flash`) if the batch was planned for it;
elsewhere torch's own attention, which is also the reference for the others. If the tokens are spread over groups of ranks, these
compute it together (`striped`). Each token attends to itself and the tokens before it;
with a window, only to the last `window` of these. With sinks, a head may attend to nothing: its softmax has one more logit.
It knows batches and caches, and no model.
"""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from stallfree.executors.torch.batch import Batch

Cache = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, [blocks, block size, KV heads, head size]."""


def write(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Write keys or values, [tokens, KV heads, head size], to their `slots` in `cache` [blocks, block size, ...]."""
    raw(cache).view(-1, *cache.shape[2:]).index_copy_(0, slots, raw(values.to(cache.dtype)))


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    window: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention of `query` over the caches, [tokens, heads, head size] like `query`. The caches, [blocks, block size, KV heads,
    head size], already hold the batch's own keys and values. `window` 0: no limit. `sinks` [heads]: the logits of attending
    to nothing.
    """
    if batch.striped is not None:
        return batch.striped.attend(query, keys, values, window, sinks)
    if batch.planned is not None:
        return batch.planned(query, keys, values, window)
    if query.is_cuda:
        from stallfree.executors.torch.kernels import paged_attention

        return paged_attention(query, keys, values, batch, window, sinks)
    return reference(query, keys, values, batch, window, sinks)


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    window: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention by torch: all decodes in one padded call, each chunk in its own call."""
    out = torch.empty_like(query)
    ones = [i for i, count in enumerate(batch.counts) if count == 1]
    if ones:
        which = torch.tensor(ones, device=query.device)
        rows = batch.begins[which]
        longest = max(batch.ends[i] for i in ones)
        tables = batch.tables[which, : -(-longest // keys.shape[1])]
        lengths = batch.lengths[which]
        at = torch.arange(tables.shape[1] * keys.shape[1], device=query.device)
        seen = at < lengths[:, None]
        if window:
            seen &= at >= lengths[:, None] - window
        # Zero times what another request left behind is not zero if that is not a number.
        gathered = [contents(cache, tables).to(query.dtype) for cache in (keys, values)]
        key, value = (each.masked_fill_(~seen[..., None, None], 0) for each in gathered)
        decoded = _attention(query[rows][:, None], key, value, seen[:, None, None], sinks)
        out[rows] = decoded[:, 0]
    begin = 0
    for i, (count, end) in enumerate(zip(batch.counts, batch.ends, strict=True)):
        if count > 1:
            tables = batch.tables[i : i + 1, : -(-end // keys.shape[1])]
            key, value = contents(keys, tables)[:, :end], contents(values, tables)[:, :end]
            position = torch.arange(end - count, end, device=query.device)[:, None]
            at = torch.arange(end, device=query.device)
            seen = at <= position
            if window:
                seen &= at > position - window
            out[begin : begin + count] = _attention(query[None, begin : begin + count], key, value, seen[None, None], sinks)[0]
        begin += count
    return out


def contents(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """The contents of the blocks in `tables`, [pieces, tokens of the longest, KV heads, head size]."""
    blocks = raw(cache)[tables].view(cache.dtype)
    return blocks.view(blocks.shape[0], -1, *blocks.shape[3:])


def raw(values: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes, because torch can move bytes on every device."""
    return values.view(torch.uint8) if values.dtype == torch.float8_e4m3fn else values


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """torch's attention for tensors [pieces, tokens, heads, head size]; `seen` [pieces, 1, tokens, keys] is its mask."""
    q, k, v = (x.transpose(1, 2) for x in (query, key.to(query.dtype), value.to(query.dtype)))
    mask = seen
    if sinks is not None:  # one more key and value, of zeros; its logit comes from the mask
        k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        shape = (*q.shape[:3], seen.shape[3])
        logits = torch.zeros(shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        mask = torch.cat([logits, sinks.to(q.dtype)[None, :, None, None].expand(*shape[:3], 1)], 3)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
