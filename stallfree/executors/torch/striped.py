"""Sequence parallelism: the tokens of each request are spread over groups of ranks, and so is their KV. Of N groups, number g has
the tokens at the positions p with p mod N = g (striped attention, arXiv 2311.09431), so that all have the same part of the causal
mask. A group computes all of a layer for its own tokens. Attention alone needs the others:

- A chunk's queries stay where they are, and the KV goes around: each group computes with what it has, and meanwhile sends this to
  the next group (ring attention, arXiv 2310.01889).
- A decode's query goes to all groups, because it is much smaller than the KV. The group of its token merges their answers. So
  each group is the master of some of the decodes (LoongServe, arXiv 2404.09526).

On a GPU, torch's flash attention computes numbers of 16 bits. Everything else, and decodes with a window, is computed by torch's
operators in float32. It knows plans and groups, and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist

from stallfree.core.plan import Capacity, Work
from stallfree.executors.torch.attention import Cache, contents, raw
from stallfree.executors.torch.batch import Batch, pack, upload

KEYS = 4096
"""Keys that a pass multiplies at once. It bounds the memory for the logits of attention."""

Partial = tuple[torch.Tensor, torch.Tensor]
"""Attention over a part of the keys: the result [tokens, heads, head size], and the logarithm of the sum of the exponentials of its
logits [tokens, heads], by which such results can be merged. Both float32."""


class Groups:
    """The `size` groups, of which this rank is in number `number`. `ranks`: those of its kind, one in each group, in order."""

    def __init__(self, process_group: dist.ProcessGroup, ranks: Sequence[int]):
        self._process_group, self._ranks = process_group, ranks
        self.number, self.size = dist.get_rank(process_group), len(ranks)

    def held(self, end: int, number: int | None = None) -> int:
        """How many tokens before position `end` a group has."""
        return (end + self.size - 1 - (self.number if number is None else number)) // self.size

    def count(self, work: Work) -> int:
        """How many tokens of the work this group has."""
        return self.held(work.start + work.count) - self.held(work.start)

    def gather(self, own: torch.Tensor, each: Sequence[int]) -> torch.Tensor:
        """The rows of all groups, one group after the other. `each`: how many rows each has."""
        padded = own.new_zeros(max(each), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in each]
        dist.all_gather(parts, padded, group=self._process_group)
        return torch.cat([part[:number] for part, number in zip(parts, each, strict=True)])

    def passed(self, values: torch.Tensor, into: torch.Tensor) -> list[dist.Work]:
        """Begin to send `values` to the next group, and to receive those of the one before `into` memory."""
        after, before = (self._ranks[(self.number + step) % self.size] for step in (1, -1))
        sent, received = (raw(tensor).view(-1) for tensor in (values, into))
        sending = dist.P2POp(dist.isend, sent, after, self._process_group)
        return dist.batch_isend_irecv([sending, dist.P2POp(dist.irecv, received, before, self._process_group)])


@dataclass(frozen=True, slots=True)
class Decodes:
    """The decodes of an iteration, by their groups. They are on the device before the first layer, so that no layer waits for them.

    `each`: how many decodes each group is the master of. `rows`: this group's own rows of the batch. `tables` [decodes, blocks of
    the longest]: block numbers. `last` [decodes]: the position of each token. `held` [decodes]: how many tokens this group has of
    each.
    """

    each: Sequence[int]
    rows: torch.Tensor
    tables: torch.Tensor
    last: torch.Tensor
    held: torch.Tensor


@dataclass(frozen=True, slots=True)
class Striped:
    """An iteration of all groups, as one group sees it. Pieces of one token are decodes, the others chunks; both are in the order
    of the plan.

    `ends`: tokens of each piece after this iteration. `tables` [pieces, blocks of the longest]: block numbers. `chunks`: their
    numbers. `queries`: this group's rows of the batch for each piece, from and to; their positions are `positions` [rows].
    `sampled`: the group of each row whose logits are wanted.
    """

    groups: Groups
    ends: Sequence[int]
    tables: torch.Tensor
    decodes: Decodes | None
    chunks: Sequence[int]
    queries: Sequence[tuple[int, int]]
    positions: torch.Tensor
    sampled: np.ndarray

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """See `attention.attend`. All groups call it together, also those without a token of their own."""
        out = query.new_empty(query.shape, dtype=torch.float32)
        rest = query.new_empty(query.shape[:2], dtype=torch.float32)
        if self.decodes is not None:
            rows = self.decodes.rows
            out[rows], rest[rows] = self._decoded(self.decodes, query[rows], keys, values, window)
        if self.chunks:
            self._ring(query, keys, values, window, out, rest)
        return with_sinks((out, rest), sinks).to(query.dtype)

    def written(self, cache: Cache) -> Cache:
        """Where the KV of the batch's rows is written, by their slots: to the cache itself."""
        return cache

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """The rows whose logits are wanted, in the order of the plan, on the first group; none on the others. `own`: those of this
        group."""
        rows = self.groups.gather(own, _counts(self.sampled, self.groups.size))
        return in_order(rows, self.sampled) if self.groups.number == 0 else rows[:0]

    def _decoded(self, decodes: Decodes, own: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> Partial:
        """The attention of this group's decodes. `own`: their queries."""
        each, number = decodes.each, self.groups.number
        everyone = self.groups.gather(own, each)
        if decodes.tables.shape[1]:
            key, value = (contents(cache, decodes.tables) for cache in (keys, values))
            if not window and flash_takes(everyone):
                part = flash_decodes(everyone, key, value, decodes.held)
            else:
                at = number + self.groups.size * torch.arange(key.shape[1], device=keys.device)
                part = attention(everyone[:, None].float(), key, value, seen(at, decodes.last[:, None, None], window))
        else:
            part = nothing(everyone[:, None])
        answer = torch.cat([part[0][:, 0], part[1][:, 0, :, None]], -1)
        everywhere = self.groups.gather(answer, [len(answer)] * self.groups.size).view(self.groups.size, *answer.shape)
        begin = sum(each[:number])
        mine = everywhere[:, begin : begin + each[number]]
        merged = mine[0, ..., :-1], mine[0, ..., -1]
        for other in mine[1:]:
            merged = merge(merged, (other[..., :-1], other[..., -1]))
        return merged

    def _ring(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, out: torch.Tensor, rest: torch.Tensor
    ) -> None:
        """Write the attention of this group's part of each chunk into `out` and `rest`. The KV of all chunks goes around as one."""
        groups = self.groups
        lengths = [groups.held(self.ends[i], 0) for i in self.chunks]  # group 0 has the most
        now = keys.new_zeros(2, sum(lengths), *keys.shape[2:])
        at = 0
        for i, length in zip(self.chunks, lengths, strict=True):
            own = groups.held(self.ends[i])
            tables = self.tables[i : i + 1, : -(-own // keys.shape[1])]
            for cache, piece in zip((keys, values), now, strict=True):
                piece[at : at + own] = contents(cache, tables)[0, :own]
            at += length
        parts: dict[int, Partial] = {}
        for step in range(groups.size):
            coming = torch.empty_like(now)
            passing = groups.passed(now, coming) if step < groups.size - 1 else []
            owner, at = (groups.number - step) % groups.size, 0
            for i, length in zip(self.chunks, lengths, strict=True):
                begin, end = self.queries[i]
                if begin < end:
                    part = self._pass(
                        query[None, begin:end], now[:1, at : at + length], now[1:, at : at + length], i, owner, window
                    )
                    parts[i] = merge(parts[i], part) if i in parts else part
                at += length
            for work in passing:
                work.wait()
            now = coming
        for i, (result, sums) in parts.items():
            begin, end = self.queries[i]
            out[begin:end], rest[begin:end] = result[0], sums[0]

    def _pass(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, i: int, owner: int, window: int) -> Partial:
        """The attention of this group's part of chunk `i` to what group `owner` has of its KV. All are [1, tokens, ...]."""
        number, size = self.groups.number, self.groups.size
        if not flash_takes(query):
            begin, end = self.queries[i]
            place = owner + size * torch.arange(key.shape[1], device=key.device)
            visible = seen(place, self.positions[begin:end, None], window)[None]
            return attention(query.float(), key, value, visible)
        # Counted in each group's own tokens: our token j sees the owner's up to j, or up to j - 1 if its j comes after ours.
        later = int(owner > number)
        last = self.groups.held(self.ends[i]) - later
        before = -(-(window + owner - number) // size) - 1 - later
        if not last or (window and before < 0):
            return nothing(query)
        return flash(query, key[:, :last], value[:, :last], before if window else -1)


def pack_stripes(
    groups: Groups, work: Sequence[Work], rows: Sequence[int], capacity: Capacity, device: torch.device
) -> tuple[Batch, list[Work]]:
    """As `batch.pack`, for the tokens of one group; and its part of the work. `capacity`: of one group, whose blocks hold every
    N-th token of the whole ones.
    """
    own, queries, places, first = [], [], [], 0
    for w in work:
        begin, end = groups.held(w.start), groups.held(w.start + w.count)
        queries.append((first, first + end - begin))
        first += end - begin
        if begin < end:
            tokens = w.tokens[(groups.number - w.start) % groups.size :: groups.size]
            own.append(w._replace(start=begin, count=end - begin, tokens=tokens))
            places.append(groups.number + groups.size * np.arange(begin, end))
    owners = np.concatenate([np.arange(w.start, w.start + w.count) % groups.size for w in work])
    ahead = np.cumsum(owners == groups.number) - 1  # the row in this group of a row of its own
    sampled = owners[np.asarray(rows, np.int64)]
    mine = [int(ahead[row]) for row, owner in zip(rows, sampled, strict=True) if owner == groups.number]
    batch = pack(own, mine, capacity, device)
    positions = torch.as_tensor(np.concatenate(places) if places else np.zeros(0, np.int64), device=device)
    ends = [w.start + w.count for w in work]
    width = max(-(-groups.held(end, 0) // capacity.block_size) for end in ends)
    tables = np.zeros((len(work), width), np.int64)
    for table, w in zip(tables, work, strict=True):
        table[: len(w.blocks)] = w.blocks[:width]
    striped = Striped(
        groups, ends, torch.as_tensor(tables, device=device), _decodes(groups, work, tables, queries, capacity.block_size, device),
        [i for i, w in enumerate(work) if w.count > 1], queries, positions, sampled,
    )  # fmt: skip
    return replace(batch, positions=positions, striped=striped), own


def _decodes(
    groups: Groups, work: Sequence[Work], tables: np.ndarray, queries: Sequence[tuple[int, int]], block: int, device: torch.device
) -> Decodes | None:
    """The decodes of `work`; None if there are none."""
    pieces = sorted((i for i, w in enumerate(work) if w.count == 1), key=lambda i: work[i].start % groups.size)
    if not pieces:
        return None
    masters = np.array([work[i].start % groups.size for i in pieces])
    held = [groups.held(work[i].start + 1) for i in pieces]
    return Decodes(
        _counts(masters, groups.size),
        upload([queries[i][0] for i, master in zip(pieces, masters, strict=True) if master == groups.number], device),
        upload(tables[pieces, : -(-max(held) // block)], device),
        upload([work[i].start for i in pieces], device),
        upload(held, device, torch.int32),
    )


def _counts(owners: np.ndarray, groups: int) -> list[int]:
    return [int(number) for number in np.bincount(owners, minlength=groups)]


def seen(keys: torch.Tensor, queries: torch.Tensor, window: int) -> torch.Tensor:
    """Whether the token at position `queries` attends to the one at position `keys`."""
    causal = keys <= queries
    return causal & (keys > queries - window) if window else causal


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> Partial:
    """`query` [pieces, tokens, heads, head size], `key` and `value` [pieces, keys, KV heads, head size], `visible` [pieces, tokens,
    keys]. The partial results are [pieces, tokens, ...]."""
    whole = nothing(query)
    for begin in range(0, key.shape[1], KEYS):
        part = slice(begin, begin + KEYS)
        whole = merge(whole, _attention(query, key[:, part], value[:, part], visible[..., part]))
    return whole


def nothing(query: torch.Tensor) -> Partial:
    """The attention of `query` to no key."""
    return torch.zeros_like(query, dtype=torch.float32), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)


def flash_takes(query: torch.Tensor) -> bool:
    """Whether torch's flash attention computes such queries. It multiplies numbers of 16 bits, and adds in 32."""
    fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return query.is_cuda and fits and _has_flash(query.device)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, before: int) -> Partial:
    """As `attention`, in one kernel, where each query sees one key more than the query before it, and the last query sees the last
    key. `before`: how many keys a query sees besides its last one; -1: all."""
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        query, key.to(query.dtype), value.to(query.dtype), None, None, query.shape[1], key.shape[1], 0.0, True, False,
        window_size_left=before, window_size_right=0,
    )  # fmt: skip
    return _no_key(out, sums.transpose(1, 2))


def flash_decodes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor) -> Partial:
    """As `attention`, in one kernel, for `query` [pieces, heads, head size]: each sees the first `lengths` [pieces] keys, int32."""
    pieces, width = key.shape[:2]
    rows = torch.arange(pieces + 1, dtype=torch.int32, device=query.device)
    flat = (each.flatten(0, 1).to(query.dtype) for each in (key, value))
    out, sums, *_ = torch.ops.aten._flash_attention_forward(
        query, *flat, rows, width * rows, 1, width, 0.0, False, False, seqused_k=lengths
    )
    return _no_key(out[:, None], sums.T[:, None])


def _no_key(out: torch.Tensor, sums: torch.Tensor) -> Partial:
    """torch's flash attention says +inf where a query sees no key."""
    return out.float(), sums.nan_to_num(nan=torch.nan, posinf=-torch.inf, neginf=-torch.inf)


def merge(a: Partial, b: Partial) -> Partial:
    """The attention over the keys of both."""
    share = torch.sigmoid(b[1] - a[1]).nan_to_num(nan=0.0)  # of b; nan: neither has a key
    return torch.lerp(a[0], b[0], share[..., None]), torch.logaddexp(a[1], b[1])


def with_sinks(whole: Partial, sinks: torch.Tensor | None) -> torch.Tensor:
    """The attention over all keys, which is overwritten; with `sinks`, one more logit for each head, of a value that is 0."""
    out, rest = whole
    if sinks is not None:
        out *= torch.sigmoid(rest - sinks.float())[..., None]
    return out


def in_order(rows: torch.Tensor, owners: np.ndarray) -> torch.Tensor:
    """`rows`, which are sorted by their `owners`, in the order of `owners`."""
    order = np.empty(len(owners), np.int64)
    order[np.argsort(owners, kind="stable")] = np.arange(len(owners))
    return rows[torch.as_tensor(order, device=rows.device)]


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> Partial:
    heads, kv_heads, size = query.shape[2], key.shape[2], query.shape[3]
    q = query.view(*query.shape[:2], kv_heads, heads // kv_heads, size)
    k = key.to(query.dtype)
    # Zero times what another request left behind is not zero if that is not a number.
    v = value.to(query.dtype).masked_fill(~visible.any(1)[..., None, None], 0)
    logits = torch.einsum("pthgd,pkhd->pthgk", q, k) * size**-0.5
    logits = logits.masked_fill(~visible[:, :, None, None], -torch.inf)
    sums = logits.logsumexp(-1)
    weights = (logits - sums[..., None]).nan_to_num(nan=-torch.inf).exp()
    return torch.einsum("pthgk,pkhd->pthgd", weights, v).reshape(query.shape), sums.reshape(query.shape[:3])
