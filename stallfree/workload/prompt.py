"""A prompt of which only the length is known, and perhaps what it shares with others: stand-ins for its tokens, made when asked."""

from collections.abc import Sequence
from typing import overload

BLOCK = 512
"""Tokens in a block of Mooncake's trace."""


class Prompt(Sequence[int]):
    """`length` tokens: in each of its `blocks` of `size` tokens that block's number, which is 0 or more, behind them `own`."""

    __slots__ = ("_blocks", "_length", "_own", "_size")

    def __init__(self, length: int, blocks: Sequence[int], own: int, size: int = BLOCK):
        self._length, self._blocks, self._own, self._size = length, blocks, own, size

    def __len__(self) -> int:
        return self._length

    def at(self, position: int) -> int:
        """The token there, also behind the prompt's end, where a block reaches beyond it."""
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
        found: list[int] = []
        while start < stop:
            block = start // self._size
            end = min(stop, (block + 1) * self._size) if block < len(self._blocks) else stop
            found += [self.at(start)] * (end - start)
            start = end
        return found
