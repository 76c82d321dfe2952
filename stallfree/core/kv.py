"""KV blocks as numbers: who holds which, which are free, and which full blocks can be shared by equal prefixes.

It knows nothing of tensors. A full, computed block is indexed under (its parent's node, its token ids), compared exactly: no hash
can collide into somebody else's prefix, and a node number is never used twice, so the children of an evicted block are
unreachable. A shared block is only ever read, since its positions are already computed.
"""

from collections.abc import Iterable

from stallfree.core.request import Request


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens; `reuse` switches the sharing of prefixes.

    A block is free (in no table and not indexed), idle (indexed, in no table: reusable, and evicted least recently used first)
    or held by as many requests as its reference count says.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse: bool = True):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuse = reuse
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: dict[int, None] = {}
        self._references = [0] * num_blocks
        self._keys: dict[int, tuple[object, tuple[int, ...]]] = {}
        self._index: dict[tuple[object, tuple[int, ...]], tuple[int, int]] = {}
        self._nodes = 0
        self._evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that a request can have now, idle ones included."""
        return len(self._free) + len(self._idle)

    def grow(self, request: Request, upto: int, spare: int = 0) -> bool:
        """Give `request` blocks for `upto` tokens, all or nothing, leaving at least `spare` blocks free if any is taken."""
        need = -(-upto // self.block_size) - len(request.blocks)
        if need <= 0:
            return True
        if need + spare > len(self._free) + len(self._idle):
            return False
        taken = self._free[-need:]
        del self._free[-need:]
        taken.reverse()
        while len(taken) < need:
            taken.append(self._evict())
        for block in taken:
            self._references[block] = 1
        request.blocks += taken
        return True

    def release(self, request: Request) -> None:
        """Take back every block of `request`; the deepest become the first to be evicted."""
        references, keys = self._references, self._keys
        for block in reversed(request.blocks):
            references[block] -= 1
            if references[block] == 0:
                if block in keys:
                    self._idle[block] = None
                else:
                    self._free.append(block)
        request.blocks = []
        request.num_shared = 0
        request.prefix = request.adapter

    def match(self, request: Request) -> int:
        """Give a request without blocks the longest indexed prefix of its tokens, short of the last token (its logits are needed).

        Returns the number of tokens found, a multiple of the block size.
        """
        if not self.reuse:
            return 0
        size = self.block_size
        for start in range(0, (request.num_tokens - 1) // size * size, size):
            found = self._index.get((request.prefix, request.tokens(start, start + size)))
            if found is None:
                break
            block, request.prefix = found
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1
            request.blocks.append(block)
        request.num_shared = len(request.blocks)
        return request.num_shared * size

    def look(self, request: Request) -> int:
        """How many tokens `match` would find for a request without blocks. Takes nothing. What the last look found is kept on the
        request and holds until a block is evicted, so that asking again in every iteration is cheap.
        """
        if not self.reuse:
            return 0
        evictions, prefix, start = request.looked
        if evictions != self._evictions:
            prefix, start = request.adapter, 0
        size, last = self.block_size, request.num_tokens - self.block_size
        while start < last and (found := self._index.get((prefix, request.tokens(start, start + size)))) is not None:
            prefix, start = found[1], start + size
        request.looked = (self._evictions, prefix, start)
        return start

    def commit(self, request: Request) -> None:
        """Index the blocks of `request` that its computed tokens have filled since the last call."""
        if not self.reuse:
            return
        size = self.block_size
        while (request.num_shared + 1) * size <= request.num_computed:
            start = request.num_shared * size
            key = (request.prefix, request.tokens(start, start + size))
            found = self._index.get(key)
            if found is None:
                self._nodes += 1
                block = request.blocks[request.num_shared]
                found = self._index[key] = (block, self._nodes)
                self._keys[block] = key
            request.prefix = found[1]
            request.num_shared += 1

    def forget(self) -> None:
        """No block's content is there any more: nothing is indexed. For when nobody holds a block."""
        self._free += self._idle
        self._idle.clear()
        self._keys.clear()
        self._index.clear()
        self._evictions += 1

    def check(self, requests: Iterable[Request]) -> None:
        """Raise RuntimeError unless every block is free, idle or held by exactly the given requests."""
        held = [0] * self.num_blocks
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
        away = [*self._free, *self._idle]
        if len(away) != len(set(away)) or set(away) != {b for b in range(self.num_blocks) if held[b] == 0}:
            raise RuntimeError("the free and idle KV blocks are not exactly those that nobody holds")
        if {block: key for key, (block, _) in self._index.items()} != self._keys:
            raise RuntimeError("the prefix index and the blocks' keys disagree")
        if not self._idle.keys() <= self._keys.keys() or not self._keys.keys().isdisjoint(self._free):
            raise RuntimeError("an idle KV block is not indexed, or a free one is")

    def _evict(self) -> int:
        block = next(iter(self._idle))
        self._evictions += 1
        del self._idle[block]
        del self._index[self._keys.pop(block)]
        return block
