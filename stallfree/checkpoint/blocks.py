"""Quantised matrices, as the executors can keep them: some weights of a row, side by side, share a scale and a zero.

It knows no files, and no executor.
"""

from typing import NamedTuple, Self

import numpy as np


class Blocks(NamedTuple):
    """A matrix [out, in] of weights scale * (code - zero).

    `codes`: [out, in / 2] uint8, two codes of 0 to 15 in each, the first in the lower bits; or [out, in] int8, whose zeros are 0.
    `scales`, `zeros`: [out, groups] float32, each for in / groups weights side by side. Zeros need not be whole numbers.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @classmethod
    def of_codes(cls, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Self:
        """`codes`: [out, in] uint8, 0 to 15."""
        return cls(codes[:, 0::2] | codes[:, 1::2] << 4, scales, zeros)

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == np.uint8 else 8

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), 8 // self.bits * self.codes.shape[1]

    @property
    def group(self) -> int:
        """How many weights share a scale."""
        return self.shape[1] // int(self.scales.shape[1])

    def dense(self) -> np.ndarray:
        """[out, in] float32."""
        codes = self.codes if self.bits == 8 else np.stack([self.codes & 15, self.codes >> 4], axis=-1)
        values: np.ndarray = self.scales[..., None] * (codes.reshape(*self.scales.shape, -1) - self.zeros[..., None])
        return values.reshape(self.shape)

    def times(self, factor: float) -> Self:
        return self._replace(scales=self.scales * np.float32(factor))

    def ordered(self, rows: np.ndarray) -> Self:
        """With its rows in this order."""
        return type(self)(*(part[rows] for part in self))
