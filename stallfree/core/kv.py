"""KV blocks as numbers: which request holds which, which are free, and which full blocks equal prefixes can share.

It knows nothing of tensors. A full, computed block is indexed under (its parent's node, its token ids). The comparison is exact, so
no hash collision can give a request the wrong prefix. A node number is never used twice, so the children of an evicted block cannot
be reached. A shared block is only read, because its positions are already computed.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from typing import Protocol

from stallfree.core.request import Request
from stallfree.core.tier import Key, Tier


class Lender(Protocol):
    """Holds blocks for something else than requests, and gives back what is not in use: `num_idle` blocks."""

    @property
    def num_idle(self) -> int: ...

    def reclaim(self, number: int, request: Request) -> None:
        """Give back idle blocks until `number` more are free, or all. They are for the KV of `request`."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. With `reuse`, equal prefixes share blocks.

    A block is free (in no block table and not indexed), idle (indexed, in no table; see `_Idle` for which is evicted first) or held
    by as many requests as its reference count says. `take` and `give` are for blocks that hold something else; the `lender`, if
    there is one, gives some back when KV is short. The `tier`, if there is one, keeps what is evicted. Whoever sets either does it
    before the first request.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuse = reuse
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle = _Idle()
        self._references = [0] * num_blocks
        self._keys: dict[int, Key] = {}
        self._index: dict[Key, tuple[int, int]] = {}
        self._nodes = 0
        self._evictions = 0
        self.lender: Lender | None = None
        self.tier: Tier | None = None

    @property
    def num_free(self) -> int:
        """Blocks that a request can have now, including idle ones and those that the lender would give back."""
        return len(self._free) + len(self._idle) + (self.lender.num_idle if self.lender is not None else 0)

    def grow(self, request: Request, upto: int, spare: int = 0) -> bool:
        """Give `request` all blocks for `upto` tokens, or none. If it takes any, at least `spare` blocks stay free."""
        need = -(-upto // self.block_size) - len(request.blocks)
        if need <= 0:
            return True
        short = need + spare - len(self._free) - len(self._idle)
        if short > 0:
            if self.lender is None or short > self.lender.num_idle:
                return False
            self.lender.reclaim(short, request)
        taken = self.take(need, spare)
        if taken is None:
            return False
        request.blocks += taken
        return True

    def take(self, number: int, spare: int = 0) -> list[int] | None:
        """Take `number` blocks, if at least `spare` stay free; else None. The lender is not asked."""
        if number + spare > len(self._free) + len(self._idle):
            return None
        taken = self._free[-number:]
        del self._free[-number:]
        taken.reverse()
        while len(taken) < number:
            taken.append(self._evict())
        for block in taken:
            self._references[block] = 1
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """Take back blocks that `take` gave."""
        for block in blocks:
            self._references[block] = 0
            self._free.append(block)

    def fits(self, request: Request, upto: int, spare: int) -> bool:
        """Whether `grow` would succeed."""
        need = -(-upto // self.block_size) - len(request.blocks)
        return need <= 0 or need + spare <= self.num_free

    def shrink(self, request: Request, upto: int) -> None:
        """Take back the blocks of `request` after those for `upto` tokens. They are not indexed."""
        kept = -(-upto // self.block_size)
        self.give(reversed(request.blocks[kept:]))
        del request.blocks[kept:]

    def release(self, request: Request) -> None:
        """Take back every block of `request`. Its last blocks will be evicted first."""
        references, keys = self._references, self._keys
        for block in reversed(request.blocks):
            references[block] -= 1
            if references[block] == 0:
                if block in keys:
                    self._idle.add(block, (request.priority, request.tenant), request.weight)
                else:
                    self._free.append(block)
        request.blocks = []
        request.num_shared = 0
        request.prefix = request.root

    def match(self, request: Request, spare: int = 0) -> int:
        """Give a request without blocks the longest indexed prefix of its tokens, short of the last token (its logits are needed).
        What the tier has of it comes back, if all of the request would fit now with `spare` blocks left free.

        Returns the number of tokens found, a multiple of the block size.
        """
        request.num_restored = 0
        if not self.reuse or request.scored:
            return 0
        size = self.block_size
        for start in range(0, (request.num_tokens - 1) // size * size, size):
            key = request.prefix, request.tokens(start, start + size)
            entry = self._index.get(key)
            if entry is None:
                if not self._restore(key, request, len(request.blocks), spare):
                    break
                continue
            block, request.prefix = entry
            if self._references[block] == 0:
                self._idle.remove(block)
            self._references[block] += 1
            request.blocks.append(block)
        request.num_shared = len(request.blocks)
        return request.num_shared * size

    def restore(self, request: Request) -> int:
        """Let more of the tokens of a running request, of whom none is in flight, come back from the tier. Returns by how many
        tokens more is computed then."""
        size, before = self.block_size, request.num_computed
        if self.tier is None or request.scored or before != request.num_planned:
            return 0
        while (request.num_shared + 1) * size < request.num_tokens:
            start = request.num_shared * size
            key = request.prefix, request.tokens(start, start + size)
            if key in self._index or not self._restore(key, request, request.num_shared, 0):
                break
            request.num_shared += 1
            request.num_computed = request.num_planned = start + size
        return request.num_computed - before

    def restorable(self, request: Request) -> bool:
        """Whether the next block of `request` is in the tier, and must wait there for the next iteration."""
        if self.tier is None or self.tier.open or request.scored:
            return False
        start = request.num_shared * self.block_size
        tokens = request.tokens(start, start + self.block_size)
        return start + self.block_size < request.num_tokens and self.tier.node((request.prefix, tokens)) is not None

    def look(self, request: Request) -> int:
        """How many tokens `match` would find for a request without blocks. Takes no block. The request keeps the result, which
        holds until a block is evicted, so that a call in every iteration is cheap.
        """
        if not self.reuse or request.scored:
            return 0
        evictions, prefix, start = request.lookup
        if evictions != self._evictions:
            prefix, start = request.root, 0
        size, last = self.block_size, request.num_tokens - self.block_size
        while start < last and (node := self._node((prefix, request.tokens(start, start + size)))) is not None:
            prefix, start = node, start + size
        request.lookup = (self._evictions, prefix, start)
        return start

    def commit(self, request: Request) -> None:
        """Index the blocks of `request` that computed tokens have filled since the last call."""
        if not self.reuse:
            return
        size = self.block_size
        while (request.num_shared + 1) * size <= request.num_computed:
            start = request.num_shared * size
            key = (request.prefix, request.tokens(start, start + size))
            entry = self._index.get(key)
            if entry is None:
                block = request.blocks[request.num_shared]
                entry = self._index[key] = (block, self._node(key) or self._new_node())
                self._keys[block] = key
            request.prefix = entry[1]
            request.num_shared += 1

    def contents(self) -> list[tuple[Key, int, int | None, int | None]]:
        """(key, node, block, slot) of all that can be found in the pool or in the tier, each after its parent. One of block and
        slot is None."""
        found: dict[Key, tuple[int, int | None, int | None]] = {}
        if self.tier is not None:
            found = {key: (node, None, slot) for key, slot, node in self.tier.items()}
        found |= {key: (node, block, None) for key, (block, node) in self._index.items()}
        children: dict[object, list[Key]] = {}
        for key in found:
            children.setdefault(key[0], []).append(key)
        waiting = [key for key in found if isinstance(key[0], str)]
        contents = []
        while waiting:
            key = waiting.pop()
            contents.append((key, *found[key]))
            waiting += children.get(found[key][0], [])
        return contents

    def put(self, key: Key) -> tuple[int, int | None, int | None] | None:
        """Make room under `key` for KV that was computed before this pool was made: a free block, idle from now on, or else a free
        slot of the tier. Returns (node, block, slot), one of the last two None; None if there is neither."""
        if not self.reuse or self._node(key) is not None:
            return None
        if self._free:
            block, node = self._free.pop(), self._new_node()
            self._index[key] = block, node
            self._keys[block] = key
            self._idle.add(block, (0, ""), 1.0)
            return node, block, None
        node = self._new_node()
        slot = None if self.tier is None else self.tier.put(key, node)
        return None if slot is None else (node, None, slot)

    def forget(self) -> None:
        """Forget the contents of all blocks: nothing is indexed any more. Only while no request holds a block."""
        self._free += self._idle.blocks
        self._idle = _Idle()
        self._keys.clear()
        self._index.clear()
        self._evictions += 1
        if self.tier is not None:
            self.tier.forget()

    def check(self, requests: Iterable[Request], lent: Iterable[Sequence[int]] = ()) -> None:
        """Raise RuntimeError unless every block is free, idle, held by exactly the given requests, or in one of the pieces
        `lent`."""
        held = [0] * self.num_blocks
        for blocks in lent:
            for block in blocks:
                held[block] += 1
        for request in requests:
            if len(set(request.blocks)) != len(request.blocks):
                raise RuntimeError(f"{request!r} holds a block twice: {request.blocks}")
            if request.num_planned > len(request.blocks) * self.block_size:
                raise RuntimeError(f"{request!r} has more tokens planned than its {len(request.blocks)} blocks hold")
            for block in request.blocks:
                held[block] += 1
        if held != self._references:
            wrong = [b for b in range(self.num_blocks) if held[b] != self._references[b]]
            raise RuntimeError(f"KV blocks {wrong[:8]} have reference counts that no request explains")
        away = [*self._free, *self._idle.blocks]
        if len(away) != len(set(away)) or set(away) != {b for b in range(self.num_blocks) if held[b] == 0}:
            raise RuntimeError("the free and idle KV blocks are not exactly those that no request holds")
        if {block: key for key, (block, _) in self._index.items()} != self._keys:
            raise RuntimeError("the prefix index and the blocks' keys disagree")
        if not self._idle.blocks <= self._keys.keys() or not self._keys.keys().isdisjoint(self._free):
            raise RuntimeError("an idle KV block is not indexed, or a free one is")
        if self.tier is not None:
            self.tier.check()

    def _evict(self) -> int:
        block = self._idle.pop()
        self._evictions += 1
        key = self._keys.pop(block)
        _, node = self._index.pop(key)
        if self.tier is not None:
            self.tier.store(key, block, node)
        return block

    def _node(self, key: Key) -> int | None:
        """The node of a block in the pool or in the tier."""
        entry = self._index.get(key)
        return entry[1] if entry is not None else self.tier.node(key) if self.tier is not None else None

    def _new_node(self) -> int:
        self._nodes += 1
        return self._nodes

    def _restore(self, key: Key, request: Request, number: int, spare: int) -> bool:
        """Let what lies under `key` in the tier come back into block `number` of `request`, which may have it already. Returns
        False, and does nothing, if it is not there or may not come now, or if the request would not fit."""
        tier = self.tier
        if tier is None or tier.node(key) is None or not tier.open or not self.fits(request, request.num_tokens, spare):
            return False
        slot, node = tier.claim(key)  # before a block is evicted for it, and perhaps kept in its slot
        if not self.grow(request, (number + 1) * self.block_size, spare):
            return False
        block = request.blocks[number]
        tier.load(slot, block)
        request.prefix = node
        self._index[key] = block, node
        self._keys[block] = key
        request.num_restored += self.block_size
        return True


TOGETHER = 32
"""Blocks that are evicted before it is looked again whose they should be."""


class _Idle:
    """Indexed blocks that no request holds, and whose they were last. The lowest priority's are evicted first, of these those of
    the tenant that has most of them over its weight, and of these the least recently used.
    """

    def __init__(self) -> None:
        self._homes: dict[int, tuple[int, str]] = {}
        # The first of a plain dict is found slowly once many before it were taken.
        self._lines: dict[tuple[int, str], OrderedDict[int, None]] = {}
        self._weights: dict[tuple[int, str], float] = {}
        self._next: tuple[int, str] | None = None
        self._left = 0

    def __len__(self) -> int:
        return len(self._homes)

    @property
    def blocks(self) -> Set[int]:
        return self._homes.keys()

    def add(self, block: int, home: tuple[int, str], weight: float) -> None:
        self._homes[block] = home
        if home not in self._lines:
            self._lines[home] = OrderedDict()
        self._lines[home][block] = None
        self._weights[home] = weight

    def remove(self, block: int) -> None:
        home = self._homes.pop(block)
        line = self._lines[home]
        del line[block]
        if not line:
            del self._lines[home], self._weights[home]

    def pop(self) -> int:
        """Take out the block to evict."""
        if self._next not in self._lines or not self._left:
            self._next = max(self._lines, key=lambda home: (home[0], len(self._lines[home]) / self._weights[home]))
            self._left = TOGETHER
        self._left -= 1
        block = next(iter(self._lines[self._next]))
        self.remove(block)
        return block
