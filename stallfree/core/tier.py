"""KV blocks in host memory: a second tier under the pool. What the pool evicts is kept here, and what a request begins with comes
back.

This is the index: what lies in which slot, and which bytes must be moved before the next plan runs. It knows no bytes, and does not
know who moves them. A block keeps its node (see `kv`) when it goes and when it comes back, so a prefix may lie in both tiers.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

Key = tuple[object, tuple[int, ...]]
"""What a block is found by: the node of its parent, or the root of its request; and its tokens."""


class Moves(NamedTuple):
    """Bytes to be moved, in this order: blocks that are `stored` in slots, by slot, and slots that are `loaded` into blocks, by
    block. Nothing may write to a block before."""

    stored: Mapping[int, int]
    loaded: Mapping[int, int]


class Tier:
    """`num_slots` slots, each with room for a block. In an iteration at most `most` blocks are moved each way: what is evicted
    beyond that is not kept, and what would come back beyond that waits for the next iteration.

    The least recently used entry makes room. A slot whose bytes are to be loaded keeps them until they are.
    """

    def __init__(self, num_slots: int, most: int):
        """Raises ValueError unless there is a slot, and a block may be moved."""
        if num_slots < 1 or most < 1:
            raise ValueError(f"a tier needs at least one slot, and one move an iteration, not {num_slots} and {most}")
        self.num_slots, self.most = num_slots, most
        self._slots: OrderedDict[Key, tuple[int, int]] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))
        self._pinned: set[int] = set()
        self._stored: dict[int, int] = {}
        self._loaded: dict[int, int] = {}
        self._left_to_store = self._left_to_load = most

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def open(self) -> bool:
        """Whether one more block may come back in this iteration."""
        return self._left_to_load > 0

    def node(self, key: Key) -> int | None:
        """The node of a block that is here; None if it is not. For any thread."""
        entry = self._slots.get(key)
        return None if entry is None else entry[1]

    def begin(self) -> None:
        """An iteration is planned: `most` blocks may be moved each way again."""
        self._left_to_store = self._left_to_load = self.most

    def store(self, key: Key, block: int, node: int) -> None:
        """The pool evicts `block`. It is kept if there is a slot, if it may still be moved, or if it is here anyway."""
        if key in self._slots:
            self._slots.move_to_end(key)
            self._loaded.pop(block, None)  # it was not even back
            return
        if not self._left_to_store:
            return
        if not self._free:
            oldest, (slot, _) = next(iter(self._slots.items()))
            if slot in self._pinned:  # so all others were used in this iteration, too
                return
            del self._slots[oldest]
            self._free.append(slot)
        slot = self._free.pop()
        self._slots[key] = slot, node
        self._stored[slot] = block
        self._left_to_store -= 1

    def claim(self, key: Key) -> tuple[int, int]:
        """The slot and the node of what lies under `key`, to be loaded in this iteration."""
        self._slots.move_to_end(key)
        self._pinned.add(self._slots[key][0])
        return self._slots[key]

    def load(self, slot: int, block: int) -> None:
        """Let what lies in a claimed slot come back into `block`. It also stays here, so that it goes again without a move."""
        self._loaded[block] = slot
        self._left_to_load -= 1

    def moves(self) -> Moves:
        """The moves since the last call. The caller makes them before anything writes to the pool's blocks."""
        moves = Moves(self._stored, self._loaded)
        self._stored, self._loaded = {}, {}
        self._pinned.clear()
        return moves

    def put(self, key: Key, node: int) -> int | None:
        """A free slot for a block that comes from elsewhere; None if there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._slots[key] = slot, node
        return slot

    def items(self) -> list[tuple[Key, int, int]]:
        """(key, slot, node) of each block, the least recently used first."""
        return [(key, slot, node) for key, (slot, node) in self._slots.items()]

    def forget(self) -> None:
        """Forget all, also moves that were not made."""
        self._slots.clear()
        self._free = list(range(self.num_slots - 1, -1, -1))
        self.moves()

    def check(self) -> None:
        """Raise RuntimeError unless there are as many slots as entries and free slots, and what is to be loaded stays. Quick, as
        idle moments are short: a tier has more blocks than a pool."""
        if len(self._slots) + len(self._free) != self.num_slots:
            raise RuntimeError(f"{len(self._slots)} used and {len(self._free)} free slots in host memory, of {self.num_slots}")
        if not self._pinned.issuperset(self._loaded.values()):
            raise RuntimeError("KV is to be loaded from a slot in host memory that may be written over")
