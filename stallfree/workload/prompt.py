"""A stand-in for a prompt of unknown text: its length, and the blocks that it shares with others. It makes tokens on demand."""

from collections.abc import Sequence
from typing import overload

BLOCK = 512
"""Tokens in a block of Mooncake's trace."""


class Prompt(Sequence[int]):
    """`length` tokens. A token in one of its `blocks`, of `size` tokens, is that block's number, at least 0; later ones: `own`."""

    __slots__ = ("_blocks", "_length", "_own", "_size")

    def __init__(self, length: int, blocks: Sequence[int], own: int, size: int = BLOCK):
        self._length, self._blocks, self._own, self._size = length, blocks, own, size

    def __len__(self) -> int:
        return self._length

    def at(self, position: int) -> int:
        """The token at `position`, also after the prompt's end, if a block reaches beyond it."""
        block = position // self._size
        return self._blocks[block] if block < len(self._blocks) else self._own

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, int):
            return self.at(range(self._length)[index])
        start, stop, step = index.indices(self._length)
        if step != 1:
            return [self.at(position) for position in range(start, stop, step)]
        tokens: list[int] = []
        while start < stop:
            block = start // self._size
            end = min(stop, (block + 1) * self._size) if block < len(self._blocks) else stop
            tokens += [self.at(start)] * (end - start)
            start = end
        return tokens
