"""Attention over tokens whose KV is anywhere: each instance of an iteration, its members, has any tokens of each request, in slots.

- The new tokens of a chunk are computed in stripes: position p by member p mod N, so that all have the same part of the causal
  mask (arXiv 2311.09431). The KV that members have, and that of the new tokens, goes around a ring. A member that is to keep a
  token which another computed takes its KV as it passes. So a group shrinks at the end of a prompt, and no KV moves afterwards
  (LoongServe, arXiv 2404.09526, section 4).
- A decode is computed by the member that keeps its KV. Its query goes to all members, and it merges their answers.

Members send to each other directly, so a group that changes needs no new process group. It is computed by torch's operators in
float32, on a GPU, too. It knows iterations and members, and no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist

from stallfree.core.plan import Work
from stallfree.executors.torch.attention import Cache, raw, write
from stallfree.executors.torch.batch import Batch, upload
from stallfree.executors.torch.striped import Partial, attention, in_order, merge, nothing, seen, with_sinks


class Waiting(Protocol):
    """A message under way."""

    def wait(self) -> object: ...


class Members:
    """The members of an iteration, of which this rank is in number `number`. `ranks`: those of its kind, one in each member."""

    def __init__(self, number: int, ranks: Sequence[int]):
        self.number, self.ranks = number, ranks

    @property
    def size(self) -> int:
        return len(self.ranks)

    def exchange(self, sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor]) -> list[Waiting]:
        """Begin to send tensors to members, by their numbers, and to receive into others. Empty ones are left out. Both ends know
        all shapes."""
        ends = ((dist.isend, sent), (dist.irecv, received))
        parcels = [
            dist.P2POp(way, raw(tensor).view(-1), self.ranks[member])
            for way, tensors in ends
            for member, tensor in tensors.items()
            if tensor.numel()
        ]
        return list[Waiting](dist.batch_isend_irecv(parcels)) if parcels else []


class Piece(NamedTuple):
    """One request's part of an iteration, as one member sees it. `past`: the positions that each member has. `keepers`: the member
    that keeps each new token. `slots`: this member's slots of the past tokens; `into`: those of the new tokens that it keeps."""

    work: Work
    past: Sequence[Sequence[int]]
    keepers: Sequence[int]
    slots: Sequence[int]
    into: Sequence[int]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a prompt. `keys`: for each member, the positions of the KV that it sends around. `slots`: this member's past
    tokens; `rows`: this member's rows of the batch, from and to."""

    keys: Sequence[torch.Tensor]
    slots: torch.Tensor
    rows: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Decodes:
    """The decodes of an iteration, by their masters. `each`: how many each member is the master of. `rows`: this member's own rows
    of the batch. `slots` [decodes, most tokens here]: this member's, filled up with 0; `positions`: theirs, with -1 for no token.
    `last` [decodes]: the position of each token."""

    each: Sequence[int]
    rows: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True, slots=True)
class Placed:
    """An iteration as one member sees it. `positions`: of this member's rows. `fresh`: a cache of one layer for the KV of its rows.
    `own`: its rows that it keeps, and their slots. `taken`: for each member, the places in what that sends around of the tokens
    that this one keeps, and their slots. `sampled`: the member of each row whose logits are wanted."""

    members: Members
    positions: torch.Tensor
    fresh: Cache
    own: tuple[torch.Tensor, torch.Tensor]
    chunks: Sequence[Chunk]
    taken: Sequence[tuple[torch.Tensor, torch.Tensor]]
    decodes: Decodes | None
    sampled: np.ndarray

    def written(self, cache: Cache) -> Cache:
        """Where the KV of the batch's rows is written, by their slots: not to the cache, because others may keep it."""
        return self.fresh

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """See `attention.attend`. All members call it together, also those without a token of their own."""
        out = query.new_empty(query.shape, dtype=torch.float32)
        rest = query.new_empty(query.shape[:2], dtype=torch.float32)
        rows, slots = self.own
        for cache, fresh in zip((keys, values), self.fresh, strict=True):
            write(cache, tokens(fresh, rows), slots)
        if self.decodes is not None:
            own = self.decodes.rows
            out[own], rest[own] = self._decoded(self.decodes, query[own], keys, values, window)
        if self.chunks:
            self._ring(query, keys, values, window, out, rest)
        return with_sinks((out, rest), sinks).to(query.dtype)

    def gathered(self, own: torch.Tensor) -> torch.Tensor:
        """The rows whose logits are wanted, in the order of the plan, on the first member; none on the others. `own`: those of this
        member."""
        if self.members.number:
            _wait(self.members.exchange({0: own.contiguous()}, {}))
            return own[:0]
        counts = np.bincount(self.sampled, minlength=self.members.size)
        parts = [own, *(own.new_empty(int(count), *own.shape[1:]) for count in counts[1:])]
        _wait(self.members.exchange({}, dict(enumerate(parts[1:], 1))))
        return in_order(torch.cat(parts), self.sampled)

    def _decoded(self, decodes: Decodes, own: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int) -> Partial:
        """The attention of this member's decodes. `own`: their queries."""
        members, each = self.members, decodes.each
        others = [number for number in range(members.size) if number != members.number]
        queries = [own if number == members.number else own.new_empty(n, *own.shape[1:]) for number, n in enumerate(each)]
        own = own.contiguous()
        _wait(members.exchange(dict.fromkeys(others, own), {number: queries[number] for number in others}))
        everyone = torch.cat(queries)
        if decodes.slots.shape[1]:
            key, value = (tokens(cache, decodes.slots) for cache in (keys, values))
            at = decodes.positions[:, None]
            visible = (at >= 0) & seen(at, decodes.last[:, None, None], window)
            part = attention(everyone[:, None].float(), key, value, visible)
        else:
            part = nothing(everyone[:, None])
        answers = torch.cat([part[0][:, 0], part[1][:, 0, :, None]], -1).split(list(each))
        mine = answers[members.number]
        theirs = {number: torch.empty_like(mine) for number in others}
        _wait(members.exchange({number: answers[number].contiguous() for number in others}, theirs))
        merged = mine[..., :-1], mine[..., -1]
        for other in theirs.values():
            merged = merge(merged, (other[..., :-1], other[..., -1]))
        return merged

    def _ring(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int, out: torch.Tensor, rest: torch.Tensor
    ) -> None:
        """Write the attention of this member's part of each chunk into `out` and `rest`, and keep what passes and is to be kept."""
        members = self.members
        lengths = [sum(len(chunk.keys[number]) for chunk in self.chunks) for number in range(members.size)]
        now = torch.stack([self._sent(cache, fresh) for cache, fresh in zip((keys, values), self.fresh, strict=True)])
        parts: dict[int, Partial] = {}
        for step in range(members.size):
            owner, coming, passing = (members.number - step) % members.size, now, list[Waiting]()
            if step < members.size - 1:
                coming = now.new_empty(2, lengths[owner - 1], *now.shape[2:])
                after, before = ((members.number + way) % members.size for way in (1, -1))
                passing = members.exchange({after: now}, {before: coming})
            places, slots = self.taken[owner]
            for cache, passed in zip((keys, values), now, strict=True):
                write(cache, raw(passed)[places].view(passed.dtype), slots)
            at = 0
            for i, chunk in enumerate(self.chunks):
                (begin, end), length = chunk.rows, len(chunk.keys[owner])
                if begin < end and length:
                    visible = seen(chunk.keys[owner], self.positions[begin:end, None], window)[None]
                    key, value = now[:1, at : at + length], now[1:, at : at + length]
                    part = attention(query[None, begin:end].float(), key, value, visible)
                    parts[i] = merge(parts[i], part) if i in parts else part
                at += length
            _wait(passing)
            now = coming
        for i, (result, sums) in parts.items():
            begin, end = self.chunks[i].rows
            out[begin:end], rest[begin:end] = result[0], sums[0]

    def _sent(self, cache: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """What this member sends around: of each chunk, its past tokens, then its rows."""
        rows = raw(fresh)[0]
        pieces = [part for chunk in self.chunks for part in (raw(tokens(cache, chunk.slots)), rows[slice(*chunk.rows)])]
        return torch.cat(pieces).view(cache.dtype)


def pack_placed(
    members: Members, pieces: Sequence[Piece], rows: Sequence[int], caches: Sequence[Cache], device: torch.device
) -> Batch:
    """As `batch.pack`, for the tokens that one member computes. `caches`: those of the layers."""
    number, size = members.number, members.size
    ids, places, begins, owners = list[int](), list[int](), [0], list[int]()
    own, taken = (list[int](), list[int]()), [(list[int](), list[int]()) for _ in range(size)]
    offsets, chunks, masters = [0] * size, list[Chunk](), list[tuple[int, int, Piece]]()
    for piece in pieces:
        work, first = piece.work, len(ids)
        chosen = list(piece.keepers) if work.decode else [p % size for p in range(work.start, work.start + work.count)]
        into = iter(piece.into)
        keys = [list(past) for past in piece.past]
        for position, token, owner, keeper in zip(
            range(work.start, work.start + work.count), work.tokens, chosen, piece.keepers, strict=True
        ):
            slot = next(into) if keeper == number else 0
            if keeper == number == owner:
                own[0].append(len(ids))
                own[1].append(slot)
            elif keeper == number:
                taken[owner][0].append(offsets[owner] + len(keys[owner]))
                taken[owner][1].append(slot)
            if owner == number:
                ids.append(token)
                places.append(position)
            keys[owner].append(position)
        owners += chosen
        begins.append(len(ids))
        if work.decode:
            masters.append((chosen[0], first, piece))
            continue
        offsets = [offset + len(part) for offset, part in zip(offsets, keys, strict=True)]
        parts = [upload(part, device) for part in keys]
        chunks.append(Chunk(parts, upload(piece.slots, device), (first, len(ids))))
    owner_of = np.asarray(owners, np.int64)
    ahead = np.cumsum(owner_of == number) - 1  # the row in this member of a row of its own
    sampled = owner_of[np.asarray(rows, np.int64)]
    mine = [int(ahead[row]) for row, owner in zip(rows, sampled, strict=True) if owner == number]
    keys_of, values_of = (cache.new_zeros(1, len(ids), *cache.shape[2:]) for cache in caches[0])
    positions = upload(places, device)
    placed = Placed(
        members, positions, (keys_of, values_of), _pair(own, device), chunks, [_pair(pair, device) for pair in taken],
        _decodes(members, masters, device), sampled,
    )  # fmt: skip
    counts = tuple(end - begin for begin, end in pairwise(begins))
    ends = tuple(piece.work.start + piece.work.count for piece in pieces)
    return Batch(
        upload(ids, device), positions, torch.arange(len(ids), device=device), upload(begins, device), upload(ends, device),
        torch.zeros(len(pieces), 0, dtype=torch.int64, device=device), upload(mine, device), counts, ends, striped=placed,
    )  # fmt: skip


def tokens(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The KV in `slots`, [*slots' shape, KV heads, head size], of a layer's keys or values [blocks, block size, ...]."""
    return raw(cache).view(-1, *cache.shape[2:])[slots].view(cache.dtype)


def _decodes(members: Members, masters: Sequence[tuple[int, int, Piece]], device: torch.device) -> Decodes | None:
    """The decodes of an iteration: of each its master, its row if it is this member's, and the piece. None if there are none."""
    if not masters:
        return None
    masters = sorted(masters, key=lambda master: master[0])
    held = []
    for _, _, piece in masters:
        held.append((list(piece.slots), list(piece.past[members.number])))
        if piece.into:
            held[-1][0].append(piece.into[0])
            held[-1][1].append(piece.work.start)
    width = max(len(slots) for slots, _ in held)
    slots, positions = np.zeros((len(held), width), np.int64), np.full((len(held), width), -1, np.int64)
    for row, (own, places) in enumerate(held):
        slots[row, : len(own)], positions[row, : len(own)] = own, places
    return Decodes(
        np.bincount([master for master, _, _ in masters], minlength=members.size).tolist(),
        upload([first for master, first, _ in masters if master == members.number], device),
        upload(slots, device),
        upload(positions, device),
        upload([piece.work.start for _, _, piece in masters], device),
    )


def _pair(pair: tuple[list[int], list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return upload(pair[0], device), upload(pair[1], device)


def _wait(messages: Sequence[Waiting]) -> None:
    for message in messages:
        message.wait()
