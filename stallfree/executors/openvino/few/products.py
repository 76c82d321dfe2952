"""The product of one row of a matrix of 8 or 4 bits with a few vectors.

It knows how codes and scales lie, and no models.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from stallfree.executors.openvino.few.vectors import (
    BYTE,
    CHUNK,
    FLOAT,
    HALF,
    LANES,
    LONG,
    WORD,
    bytes_multiplied,
    fetch,
    filled,
    fused,
    load,
    loop,
    multiplied,
    picked,
    splat,
    store,
    summed,
    vector_of,
)

INT8, INT4, UINT4 = 0, 1, 2
"""Kinds of codes: 8 bits; 4 bits in two's complement; 4 bits, each group with a zero. Two of 4 bits are in a byte, the first in the
lower bits."""


AHEAD = 512
"""Bytes of codes of 4 bits that are fetched before they are needed: 8 % quicker with two threads. Before 8 bits it is slower."""


class _Row:
    """Writes the products of one row of a matrix with several vectors. What it is given are values of the program that is
    written."""

    def __init__(self, builder: ir.IRBuilder, vectors: int, half: bool, args: Sequence[ir.Value]) -> None:
        self.b, self.vectors, self.half = builder, vectors, half
        self.codes, self.zeros, self.scales, self.least, self.least_scales, self.row, self.groups = args[:7]
        self.x, self.x_scales, self.x_sums, self.out, self.apart = args[7:]
        self.first = builder.mul(self.row, self.groups)

    def place(self, vector: int, group: ir.Value) -> ir.Value:
        """The place of a vector's group among those of all vectors."""
        return self.b.add(self.b.mul(ir.Constant(LONG, vector), self.groups), group)

    def scale(self, at: ir.Value, number: int = 1) -> ir.Value:
        """The scale at this place, or a vector of several."""
        kind, wanted = HALF if self.half else FLOAT, FLOAT
        if number > 1:
            kind, wanted = vector_of(kind, number), vector_of(FLOAT, number)
        loaded = load(self.b, kind, self.scales, at, 2)
        return self.b.fpext(loaded, wanted) if self.half else loaded

    def eight_bits(self, chunks: int) -> list[ir.Value]:
        b, width, wide = self.b, chunks * CHUNK, vector_of(FLOAT, LANES)

        def body(group: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            at, codes, grown = b.add(self.first, group), [], []
            for chunk in range(chunks):
                place = b.add(b.mul(at, ir.Constant(LONG, width)), ir.Constant(LONG, chunk * CHUNK))
                codes.append(b.sext(load(b, vector_of(BYTE, CHUNK), self.codes, place, 1), vector_of(WORD, CHUNK)))
            scale = self.scale(at)
            for vector, total in enumerate(totals):
                place = self.place(vector, group)
                both = b.fmul(scale, load(b, FLOAT, self.x_scales, place, 4))
                start = b.mul(place, ir.Constant(LONG, width))
                parts = [
                    multiplied(b, codes[chunk], self.x, b.add(start, ir.Constant(LONG, chunk * CHUNK))) for chunk in range(chunks)
                ]
                grown.append(fused(b, b.sitofp(reduce(b.add, parts), wide), filled(b, both, LANES), total))
            return grown

        return [summed(b, total) for total in loop(b, self.groups, 1, [splat(0.0, wide)] * self.vectors, body)]

    def four_bits(self, signed: bool, width: int, together: int) -> list[ir.Value]:
        """`together` times `CHUNK` codes at once, each with its share of the lanes."""
        b, bytes_, floats = self.b, vector_of(BYTE, together * LANES), vector_of(FLOAT, together)
        lanes = together * CHUNK // 8
        wide = vector_of(FLOAT, lanes)

        def each(read: Callable[[ir.Value, int], ir.Value], at: ir.Value) -> ir.Value:
            """The numbers of the groups that the codes belong to."""
            if width == CHUNK:
                return read(at, together)
            number = max(1, together * CHUNK // width)
            numbers = read(b.udiv(at, ir.Constant(LONG, width // CHUNK)), number)
            if number == 1:
                return filled(b, numbers, together)
            return picked(b, numbers, [i * CHUNK // width for i in range(together)])

        def zero(at: ir.Value, number: int) -> ir.Value:
            return load(b, vector_of(BYTE, number) if number > 1 else BYTE, self.zeros, at, 1)

        def body(group: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            at, grown = b.add(self.first, group), []
            place = b.mul(at, ir.Constant(LONG, LANES))
            fetch(b, self.codes, b.add(place, ir.Constant(LONG, AHEAD)))
            pairs = load(b, bytes_, self.codes, place, 1)
            zeros = splat(8.0, floats)
            if signed:
                pairs = b.xor(pairs, splat(0x88, bytes_))
            else:
                zeros = b.uitofp(each(zero, at), floats)
            even, odd = b.and_(pairs, splat(15, bytes_)), b.lshr(pairs, splat(4, bytes_))
            scales = each(self.scale, at)
            less = b.fmul(zeros, scales)
            for vector in range(self.vectors):
                total, correction = totals[2 * vector : 2 * vector + 2]
                place = self.place(vector, group)
                start = b.mul(place, ir.Constant(LONG, CHUNK))
                x = [load(b, bytes_, self.x, b.add(start, ir.Constant(LONG, half)), 1) for half in (0, together * LANES)]
                whole = bytes_multiplied(b, odd, x[1], bytes_multiplied(b, even, x[0], splat(0, vector_of(WORD, lanes))))
                factors = b.fmul(scales, load(b, floats, self.x_scales, place, 4))
                spread = picked(b, factors, [lane // (CHUNK // 8) for lane in range(lanes)])
                grown.append(fused(b, b.sitofp(whole, wide), spread, total))
                grown.append(b.fsub(correction, b.fmul(less, load(b, floats, self.x_sums, place, 4))))
            return grown

        starts = [splat(0.0, wide), splat(0.0, floats)] * self.vectors
        sums = [summed(b, value) for value in loop(b, self.groups, together, starts, body)]
        return [b.fadd(total, correction) for total, correction in zip(sums[::2], sums[1::2], strict=True)]

    def least_numbers(self, width: int) -> list[ir.Value]:
        """What the least numbers of the groups add, which have 8 bits, and a scale for each `width` groups."""
        b, wide = self.b, vector_of(FLOAT, width)
        pieces = b.sdiv(self.groups, ir.Constant(LONG, width))
        first = b.mul(self.row, pieces)

        def body(piece: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            start = b.mul(piece, ir.Constant(LONG, width))
            codes = b.sitofp(load(b, vector_of(BYTE, width), self.least, b.add(self.first, start), 1), wide)
            weights = b.fmul(codes, filled(b, load(b, FLOAT, self.least_scales, b.add(first, piece), 4), width))
            return [
                fused(b, weights, load(b, wide, self.x_sums, self.place(vector, start), 4), total)
                for vector, total in enumerate(totals)
            ]

        return [summed(b, total) for total in loop(b, pieces, 1, [splat(0.0, wide)] * self.vectors, body)]


@intrinsic
def row_product(
    context: Any, kind: Any, width: Any, least_width: Any, half: Any, together: Any, vectors: Any, codes: Any, zeros: Any,
    scales: Any, least: Any, least_scales: Any, row: Any, groups: Any, x: Any, x_scales: Any, x_sums: Any, out: Any, apart: Any,
) -> Any:  # fmt: skip
    """Row `row` of a matrix times `vectors` vectors; the products go to `out`, `apart` numbers apart.

    `kind`, `width`, `least_width`, `half`, `together`, `vectors`: literals. Of the matrix: addresses of all `codes`, of `zeros`
    uint8 and `scales` for each `width` weights, float32 or with `half` float16, of `least` int8, numbers that are added to all
    weights of a group, times a float32 of `least_scales` for each `least_width` groups, which is 0 if there are none. `width` is a
    multiple of `CHUNK`; with 4 bits `CHUNK`, or without `least` a multiple of two.

    Of the vectors, one behind the other: `x`, their codes, with `x_scales` float32 for each group, of which a row has `groups`. For
    a matrix of 8 bits, they are int16, and their groups those of the matrix. For one of 4 bits, they are int8 in groups of `CHUNK`,
    with the sums of their numbers in `x_sums`, float32; `together` groups, 2 or 4, lie so: the codes at even places, then those at
    odd ones.
    """
    literals = kind, width, least_width, half, together, vectors
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        form, wide, shared, short, many, number = (value.literal_value for value in literals)
        row = _Row(builder, number, bool(short), args[6:])
        products = row.eight_bits(wide // CHUNK) if form == INT8 else row.four_bits(form == INT4, wide, many)
        if shared:
            products = [builder.fadd(*both) for both in zip(products, row.least_numbers(shared), strict=True)]
        for vector, product in enumerate(products):
            store(builder, product, row.out, builder.mul(ir.Constant(LONG, vector), row.apart))
        return context.get_dummy_value()

    return types.void(*literals, *[types.int64] * 12), generate
