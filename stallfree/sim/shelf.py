"""The adapters of simulated replicas: how many KV blocks each takes, and how long its weights are on the way from the host's
memory. An adapter's name is a number, and its rank follows from that. It does not know who asks for which."""

from collections.abc import Callable, Sequence
from functools import partial

from stallfree.core.adapters import Resident
from stallfree.perf.adapters import Adapters

HOST_LINK = 20e9
"""Bytes per second from the host's memory to a device: what PCIe 4.0 x16 reaches of its 32e9 with pinned memory. Assumed."""


class Shelf:
    """Adapters of `ranks`, in turn: the one named "4" has the fifth. `blocks`, `load_s`: KV blocks and seconds of a rank. `known`:
    as `core.adapters.Adapters` wants it, of the adapters that were met.
    """

    def __init__(self, ranks: Sequence[int], blocks: Callable[[int], int], load_s: Callable[[int], float]):
        self._ranks, self._blocks, self._load_s = ranks, blocks, load_s
        self.known: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, ranks: Sequence[int], adapters: Adapters, block_size: int) -> "Shelf":
        """The shelf of a replica with such adapters, whose KV blocks have `block_size` tokens."""
        return cls(ranks, partial(adapters.blocks, block_size=block_size), partial(_on_link, adapters))

    def meet(self, adapter: str) -> None:
        """A request for this adapter comes."""
        if adapter not in self.known:
            rank = self._ranks[int(adapter) % len(self._ranks)]
            self.known[adapter] = self._blocks(rank), rank

    def load_s(self, adapter: Resident) -> float:
        return self._load_s(adapter.rank)


def _on_link(adapters: Adapters, rank: int) -> float:
    return adapters.bytes(rank) / HOST_LINK


def ranks(words: str) -> tuple[int, ...]:
    """The ranks in "8,16,32". Raises ValueError that says what to write."""
    try:
        found = tuple(int(word) for word in words.split(","))
    except ValueError:
        found = ()
    if not found or not all(1 <= rank <= 1024 for rank in found):
        raise ValueError(f"--rank {words!r} is no list of ranks from 1 to 1,024; write 8 or 8,16,32")
    return found
