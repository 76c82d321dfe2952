"""Quantised matrices, as the executors can keep them: some weights of a row, side by side, share a scale and a zero.

It knows no files, and no executor.
"""

from typing import NamedTuple, Self

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The numbers that MXFP4's codes stand for: a sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, 5.3.3)."""
PACKED = {np.dtype(np.int8): 1, np.dtype(np.uint8): 2, np.dtype(np.uint16): 4}
"""How many codes an element has, by its type."""


class Blocks(NamedTuple):
    """A matrix [out, in] of weights scale * (code - zero).

    `codes`: [out, in / 2] uint8, two codes of 0 to 15 in each, the first in the lower bits; or [out, in] int8, whose zeros are 0;
    or [out, in / 4] uint16, four codes of 4 bits in each that stand for the numbers `E2M1`, and whose zeros are 0.
    `scales`, `zeros`: [out, groups] float32, each for in / groups weights side by side. Zeros need not be whole numbers.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @classmethod
    def of_codes(cls, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Self:
        """`codes`: [out, in] uint8, 0 to 15."""
        return cls(codes[:, 0::2] | codes[:, 1::2] << 4, scales, zeros)

    @classmethod
    def of_mxfp4(cls, codes: np.ndarray, scales: np.ndarray) -> Self:
        """`codes`: [out, in / 2] uint8, two of MXFP4 in each. `scales`: [out, in / 32] uint8, s for 2^(s - 127)."""
        factors = np.exp2(scales.astype(np.float32) - 127)
        return cls(np.ascontiguousarray(codes).view(np.uint16), factors, np.zeros_like(factors))

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == np.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), PACKED[self.codes.dtype] * self.codes.shape[1]

    @property
    def group(self) -> int:
        """How many weights share a scale."""
        return self.shape[1] // int(self.scales.shape[1])

    def dense(self) -> np.ndarray:
        """[out, in] float32."""
        pairs = self.codes.view(np.uint8)
        codes = self.codes if self.bits == 8 else np.stack([pairs & 15, pairs >> 4], axis=-1)
        if self.codes.dtype == np.uint16:
            codes = E2M1[codes]
        values: np.ndarray = self.scales[..., None] * (codes.reshape(*self.scales.shape, -1) - self.zeros[..., None])
        return values.reshape(self.shape)

    def times(self, factor: float) -> Self:
        return self._replace(scales=self.scales * np.float32(factor))

    def ordered(self, rows: np.ndarray) -> Self:
        """With its rows in this order."""
        return type(self)(*(part[rows] for part in self))
