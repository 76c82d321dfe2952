"""Quantised blocks stand for the same numbers as in the file."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.ggml import KINDS, from_ggml

HALVES = {GGMLQuantizationType.Q4_0: 1, GGMLQuantizationType.Q4_1: 2, GGMLQuantizationType.Q4_K: 2, GGMLQuantizationType.Q8_0: 1}
"""The 16-bit floats at the beginning of a block."""


def random_rows(kind: GGMLQuantizationType, rows: int = 6, blocks: int = 3) -> np.ndarray:
    """Rows [rows, bytes] of blocks with any codes and sensible scales, of which some are 0."""
    draw = np.random.default_rng(3)
    raw = draw.integers(0, 256, (rows, blocks, GGML_QUANT_SIZES[kind][1]), np.uint8)
    if kind == GGMLQuantizationType.MXFP4:
        raw[..., 0] = draw.integers(0, 140, (rows, blocks))  # powers of two
        return raw.reshape(rows, -1)
    scales = draw.uniform(-0.1, 0.1, (rows, blocks, HALVES[kind])).astype("<f2")
    scales[0, 0, 0] = scales[1, 1] = 0
    raw[..., : 2 * HALVES[kind]] = scales.view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_of_gguf_are_the_numbers_that_gguf_reads(kind):
    raw = random_rows(kind)
    blocks, wanted = from_ggml(raw, kind), dequantize(raw, kind)
    assert blocks.shape == wanted.shape
    assert blocks.group == 32
    np.testing.assert_allclose(blocks.dense(), wanted, rtol=1e-4, atol=1e-6)


def test_factors_and_orders_of_rows_are_those_of_the_numbers():
    blocks = from_ggml(random_rows(GGMLQuantizationType.Q4_K), GGMLQuantizationType.Q4_K)
    order = np.array([3, 0, 5, 1, 2, 4])
    np.testing.assert_allclose(blocks.times(0.25).ordered(order).dense(), 0.25 * blocks.dense()[order], rtol=1e-6)


def test_codes_are_in_order():
    codes = np.arange(32, dtype=np.uint8).reshape(2, 16) % 16
    blocks = Blocks.of_codes(codes, np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32))
    assert (blocks.dense() == codes).all()
