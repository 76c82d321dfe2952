"""How a matrix of a checkpoint is stored for the runtime: arrays of codes, scales and what else its products need.

From numbers, 8 bits; from `Blocks`, the file's own codes. It knows nothing of graphs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stallfree.checkpoint.blocks import PACKED, Blocks

MIDDLE = 8
"""The zero of 4-bit codes that a signed code of 4 bits has."""
CHUNK = 1 << 22
"""How many weights become 8 bits at once."""
SHARED = (32, 16)
"""Widths of the groups in which least weights share a scale, the preferred first."""


class Stored(NamedTuple):
    """A matrix [..., out, in], of weights scale * (code - zero) + least, in groups of weights of a row.

    `codes`: int8 [..., out, groups, weights], or uint8 [out, in / 2], two of 4 bits in each byte, the first in the lower bits:
    without `zeros` signed, with `zeros` unsigned; or uint16 [out, in / 4], four of `E2M1`. `scales`: float32 [out, groups, 1].
    `zeros`: uint8 [out, groups, 1]. The least weight of a group is a code in `least`, int8 [out, pieces, groups of a piece], times
    `least_scales`, float32 [out, pieces, 1].
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    least: np.ndarray | None = None
    least_scales: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., out, groups, weights of a group]."""
        width = PACKED[self.codes.dtype] * self.codes.size // self.scales.size
        return *self.scales.shape[:-1], width


def eight_bits(values: np.ndarray, group: int) -> Stored:
    """`values` [..., out, in] as round(w / s), with one scale s = max|w| / 127 for each `group` of an output's weights, or for all
    of them (`group` 0)."""
    grouped = values.reshape(*values.shape[:-1], -1, group or values.shape[-1])
    codes, scales = np.empty(grouped.shape, np.int8), np.empty((*grouped.shape[:-1], 1), np.float32)
    some = max(1, CHUNK * len(grouped) // grouped.size)
    for at in range(0, len(grouped), some):  # so that what is needed on the way takes little memory
        part = grouped[at : at + some]
        scales[at : at + some] = np.maximum(np.abs(part).max(axis=-1, keepdims=True) / 127, np.float32(1e-12))
        np.rint(part / scales[at : at + some], out=codes[at : at + some], casting="unsafe")
    return Stored(codes, scales)


def own_bits(parts: Sequence[Blocks]) -> Stored:
    """Blocks of one group size and form of codes, one below the other, with their own codes."""
    codes, scales, zeros = (np.ascontiguousarray(np.concatenate(part)) for part in zip(*parts, strict=True))
    if codes.dtype == np.int8:
        return Stored(codes.reshape(*scales.shape, -1), scales[..., None])
    if codes.dtype == np.uint16:
        return Stored(codes, scales[..., None])
    if (zeros == MIDDLE).all():
        return Stored(_signed(codes), scales[..., None])
    if ((zeros == np.rint(zeros)) & (zeros >= 0) & (zeros < 2 * MIDDLE)).all():
        return Stored(codes, scales[..., None], zeros.astype(np.uint8)[..., None])
    least = scales * (MIDDLE - zeros)
    width = next((width for width in SHARED if not least.shape[1] % width), 0)
    rounded = eight_bits(least, width)
    return Stored(_signed(codes), scales[..., None], None, rounded.codes, rounded.scales)


def _signed(codes: np.ndarray) -> np.ndarray:
    """Codes of 0 to 15, less 8, in two's complement."""
    return codes ^ np.uint8(0x88)
