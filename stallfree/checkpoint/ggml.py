"""GGUF's blocks of four and of eight bits as `Blocks`. Layouts: ggml/src/ggml-common.h and ggml-quants.c of llama.cpp.

It knows no files. The `gguf` package reads all kinds as numbers; this module keeps the codes.
"""

import numpy as np
from gguf import GGMLQuantizationType

from stallfree.checkpoint.blocks import Blocks

KINDS = {
    GGMLQuantizationType.Q4_0: "int4",
    GGMLQuantizationType.Q4_1: "int4",
    GGMLQuantizationType.Q4_K: "int4",
    GGMLQuantizationType.Q8_0: "int8",
    GGMLQuantizationType.MXFP4: "e2m1",
}
"""GGUF's quantisations that `Blocks` can hold as they are, with the form of their codes. Those of 5 and 6 bits have no place in it:
the executors have products of 4 and of 8 bits."""


def from_ggml(raw: np.ndarray, kind: GGMLQuantizationType) -> Blocks:
    """`raw`: [out, bytes of a row] uint8, of one of `KINDS`."""
    if kind == GGMLQuantizationType.Q4_K:
        return _q4_k(raw.reshape(len(raw), -1, 144))
    if kind == GGMLQuantizationType.Q8_0:
        blocks = raw.reshape(len(raw), -1, 34)
        scales = _half(blocks[..., :2])
        return Blocks(blocks[..., 2:].reshape(len(raw), -1).view(np.int8), scales, np.zeros_like(scales))
    if kind == GGMLQuantizationType.MXFP4:
        blocks = raw.reshape(len(raw), -1, 17)
        return Blocks.of_mxfp4(_pairs(blocks[..., 1:]), blocks[..., 0])
    head = 2 if kind == GGMLQuantizationType.Q4_0 else 4
    blocks = raw.reshape(len(raw), -1, head + 16)
    scales = _half(blocks[..., :2])
    zeros = np.full_like(scales, 8)
    if kind == GGMLQuantizationType.Q4_1:  # scale * code + least
        scales, zeros = _least(scales, _half(blocks[..., 2:4]))
    return Blocks(_pairs(blocks[..., head:]), scales, zeros)


def _q4_k(blocks: np.ndarray) -> Blocks:
    """256 weights each: two floats, eight scales and eight negated minimums of 6 bits that they multiply, and the codes. Codes of
    two groups of 32 share 32 bytes."""
    small = blocks[..., 4:16]
    low, middle, high = small[..., 0:4], small[..., 4:8], small[..., 8:12]
    scales = np.concatenate([low & 63, high & 15 | (low >> 6) << 4], axis=-1)
    least = np.concatenate([middle & 63, high >> 4 | (middle >> 6) << 4], axis=-1)
    rows = len(blocks)
    scales, zeros = _least(
        (_half(blocks[..., 0:2])[..., None] * scales).reshape(rows, -1),
        -(_half(blocks[..., 2:4])[..., None] * least).reshape(rows, -1),
    )
    return Blocks(_pairs(blocks[..., 16:].reshape(rows, -1, 32)), scales, zeros)


def _least(scales: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros of weights scale * code + least. A scale of 0 becomes one that is too small to matter."""
    scales = np.where(scales == 0, np.float32(1e-6) * np.abs(least), scales)
    return scales, np.divide(-least, scales, out=np.zeros_like(scales), where=scales != 0)


def _pairs(halves: np.ndarray) -> np.ndarray:
    """Codes as `Blocks` has them, from blocks whose bytes have a code of the first half in the lower bits and one of the second
    half in the higher. `halves`: [out, blocks, bytes]."""
    low, high = halves & 15, halves >> 4
    paired = [half[..., 0::2] | half[..., 1::2] << 4 for half in (low, high)]
    return np.concatenate(paired, axis=-1).reshape(len(halves), -1)


def _half(pair: np.ndarray) -> np.ndarray:
    """Bytes [..., 2] as float32 [...]."""
    return np.ascontiguousarray(pair).view("<f2")[..., 0].astype(np.float32)
