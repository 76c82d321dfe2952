"""What most of the time passes in, compiled for the sizes of one model: products of quantised rows, and attention of one head.

A size that is known when a loop is compiled makes it several times as fast. It knows memory by its addresses.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, types

from stallfree.executors.openvino.few.compiled import quick
from stallfree.executors.openvino.few.past import scores, weigh
from stallfree.executors.openvino.few.products import row_product
from stallfree.executors.openvino.few.vectors import as_float, pointer

LEVELS, BYTE_LEVELS = 32767, 127
"""The largest code of an activation before a matrix of 8 bits, and of 4 bits."""


@quick(inline="always")
def exp(x: float) -> float:
    """e^x for x up to 88, in operations that come as vectors; 1.6e-38 for any x below -87."""
    x = np.float32(1.4426950408889634) * min(max(x, np.float32(-87)), np.float32(88))
    whole = np.rint(x)
    rest = (x - whole) * np.float32(0.6931471805599453)
    power = np.float32(1 / 720)
    for term in (120, 24, 6, 2, 1, 1):
        power = power * rest + np.float32(1 / term)
    return power * as_float((np.int32(whole) + np.int32(127)) << np.int32(23))


@quick()
def quantised(x: np.ndarray, codes: int, scales: int, sums: int) -> None:
    """Write x [rows, numbers] as int16 codes with a float32 scale for each row, and the sums of its codes, float32."""
    all_codes = carray(pointer(codes), x.shape, np.int16)
    for row in range(len(x)):
        largest, total = np.float32(1e-30), np.int32(0)
        for i in range(x.shape[1]):
            largest = max(largest, abs(x[row, i]))
        factor = np.float32(LEVELS) / largest
        for i in range(x.shape[1]):
            code = np.int32(np.rint(x[row, i] * factor))
            all_codes[row, i] = code
            total += code
        carray(pointer(scales + 4 * row), 1, np.float32)[0] = largest / np.float32(LEVELS)
        carray(pointer(sums + 4 * row), 1, np.float32)[0] = total


@quick()
def softmax(x: np.ndarray) -> None:
    highest, total = np.float32(-1e30), np.float32(0)
    for i in range(len(x)):
        highest = max(highest, x[i])
    for i in range(len(x)):
        x[i] = exp(x[i] - highest)
    for i in range(len(x)):
        total += x[i]
    scale = np.float32(1) / total
    for i in range(len(x)):
        x[i] *= scale


@cache
def rows_product(kind: int, width: int, least_width: int, half: int, together: int, vectors: int, kept: bool) -> Any:
    """A function that multiplies rows `begin` to `end` - 1 of a matrix with `vectors` vectors, as `row_product`; `kept`, once it is
    compiled."""

    @cfunc(types.void(*[types.int64] * 13), cache=kept, error_model="numpy")
    def function(
        begin: int, end: int, codes: int, zeros: int, scales: int, least: int, least_scales: int, groups: int, x: int,
        x_scales: int, x_sums: int, out: int, apart: int,
    ) -> None:  # fmt: skip
        for row in range(begin, end):
            row_product(
                kind, width, least_width, half, together, vectors, codes, zeros, scales, least, least_scales, row, groups, x,
                x_scales, x_sums, out + 4 * row, apart,
            )  # fmt: skip

    return function


@cache
def heads_attention(dim: int, block: int, heads: int, kept: bool) -> Any:
    """A function for attention of `heads` queries, of `dim` numbers each, that share a head of keys and values, to
    tokens `first` to `last` - 1 of blocks of `block` tokens. `keys`, `values`: addresses of this head's numbers in block 0; those
    of the next block are `stride` bytes behind. `memory`: room for `dim` + `last` + 2 float32 of each query."""
    each = 8 + dim

    @cfunc(types.void(*[types.int64] * 9), cache=kept, fastmath=True, error_model="numpy")
    def function(
        queries: int, keys: int, values: int, table: int, stride: int, first: int, last: int, memory: int, result: int
    ) -> None:
        codes, scales, sums = memory, memory + 2 * heads * dim, memory + 2 * heads * dim + 4 * heads
        memory = sums + 4 * heads
        quantised(carray(pointer(queries), (heads, dim), np.float32), codes, scales, sums)
        blocks = carray(pointer(table), last, np.int64)
        for number in range(first // block, (last - 1) // block + 1):
            begin, end = max(first, number * block), min(last, (number + 1) * block)
            at = blocks[number] * stride + (begin - number * block) * each
            scores(dim, heads, codes, scales, sums, keys + at, end - begin, memory + 4 * begin, last)
        out, less = carray(pointer(result), (heads, dim), np.float32), carray(pointer(sums), heads, np.float32)
        for head in range(heads):
            softmax(carray(pointer(memory + 4 * (head * last + first)), last - first, np.float32))
            less[head] = 0
            for i in range(dim):
                out[head, i] = 0
        for number in range(first // block, (last - 1) // block + 1):
            begin, end = max(first, number * block), min(last, (number + 1) * block)
            at = blocks[number] * stride + (begin - number * block) * each
            weigh(dim, heads, memory + 4 * begin, values + at, end - begin, result, sums, last)
        for head in range(heads):
            for i in range(dim):
                out[head, i] -= less[head]

    return function
