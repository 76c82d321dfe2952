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
    cut,
    fetch,
    filled,
    fused,
    has_vnni,
    lengthened,
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

SUMS = 4
"""Sums that the products of a group of `CHUNK` codes of 4 bits are added up to."""


class _Row:
    """Writes the products of one row of a matrix with several vectors. What it is given are values of the program that is
    written."""

    def __init__(self, builder: ir.IRBuilder, vectors: int, half: bool, args: Sequence[ir.Value]) -> None:
        self.b, self.vectors, self.half = builder, vectors, half
        self.codes, self.zeros, self.scales, self.least, self.least_scales, self.row, self.groups = args[:7]
        self.x, self.x_scales, self.x_sums, self.out, self.apart = args[7:]
        self.first = builder.mul(self.row, self.groups)
        self.lanes = LANES if has_vnni() else LANES // 2

    def starts(self, lanes: int) -> list[ir.Value]:
        return [splat(0.0, vector_of(FLOAT, lanes))] * self.vectors

    def times(self, value: ir.Value, number: int) -> ir.Value:
        return self.b.mul(value, ir.Constant(LONG, number))

    def place(self, vector: int, group: ir.Value) -> ir.Value:
        """The place of a vector's group among those of all vectors."""
        return self.b.add(self.times(self.groups, vector), group)

    def scale(self, at: ir.Value, number: int = 1) -> ir.Value:
        """The scale at this place, or a vector of several."""
        kind, wanted = HALF if self.half else FLOAT, FLOAT
        if number > 1:
            kind, wanted = vector_of(kind, number), vector_of(FLOAT, number)
        loaded = load(self.b, kind, self.scales, at, 2)
        return self.b.fpext(loaded, wanted) if self.half else loaded

    def eight_bits(self, chunks: int) -> list[ir.Value]:
        b, width, floats = self.b, chunks * CHUNK, vector_of(FLOAT, self.lanes)

        def body(group: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            at, codes, grown = b.add(self.first, group), [], []
            for chunk in range(chunks):
                place = b.add(self.times(at, width), ir.Constant(LONG, chunk * CHUNK))
                codes.append(b.sext(load(b, vector_of(BYTE, CHUNK), self.codes, place, 1), vector_of(WORD, CHUNK)))
            scale = filled(b, self.scale(at), self.lanes)
            for vector, total in enumerate(totals):
                place = self.place(vector, group)
                start = self.times(place, width)
                parts = [
                    multiplied(b, codes[chunk], self.x, b.add(start, ir.Constant(LONG, chunk * CHUNK))) for chunk in range(chunks)
                ]
                whole = reduce(b.add, [part for both in parts for part in cut(b, both, self.lanes)])
                weighed = b.fmul(b.sitofp(whole, floats), scale)
                grown.append(fused(b, weighed, filled(b, load(b, FLOAT, self.x_scales, place, 4), self.lanes), total))
            return grown

        return loop(b, self.groups, 1, self.starts(self.lanes), body)

    def four_bits(self, signed: bool, width: int, least_width: int, together: int) -> list[ir.Value]:
        """`together` times `CHUNK` codes at once, each with its share of the sums."""
        b, bytes_, floats = self.b, vector_of(BYTE, together * LANES), vector_of(FLOAT, together)
        wide = vector_of(FLOAT, together * SUMS)
        lanes = min(self.lanes, wide.count)

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

        def least(at: ir.Value) -> ir.Value:
            codes = b.sitofp(load(b, vector_of(BYTE, together), self.least, at, 1), floats)
            scale = load(b, FLOAT, self.least_scales, b.udiv(at, ir.Constant(LONG, least_width)), 4)
            return b.fmul(codes, filled(b, scale, together))

        def body(group: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            at, grown = b.add(self.first, group), []
            place = self.times(at, LANES)
            fetch(b, self.codes, b.add(place, ir.Constant(LONG, AHEAD)))
            pairs = load(b, bytes_, self.codes, place, 1)
            if signed:
                pairs = b.xor(pairs, splat(0x88, bytes_))
            codes = b.and_(pairs, splat(15, bytes_)), b.lshr(pairs, splat(4, bytes_))
            scales = each(self.scale, at)
            added = b.fmul(b.fneg(splat(8.0, floats) if signed else b.uitofp(each(zero, at), floats)), scales)
            if least_width:
                added = b.fadd(added, least(at))
            spread = picked(b, scales, [lane // SUMS for lane in range(wide.count)])
            for vector, total in enumerate(totals):
                place = self.place(vector, group)
                start = self.times(place, CHUNK)
                x = [load(b, bytes_, self.x, b.add(start, ir.Constant(LONG, half)), 1) for half in (0, together * LANES)]
                products = b.sitofp(bytes_multiplied(b, codes, x), wide)
                factors = b.fmul(spread, load(b, wide, self.x_scales, self.times(place, SUMS), 4))
                more = lengthened(b, b.fmul(added, load(b, floats, self.x_sums, place, 4)), lanes)
                for both in zip(cut(b, products, lanes), cut(b, factors, lanes), strict=True):
                    more = fused(b, *both, more)
                grown.append(b.fadd(total, more))
            return grown

        return loop(b, self.groups, together, self.starts(lanes), body)


@intrinsic
def row_product(
    context: Any, kind: Any, width: Any, least_width: Any, half: Any, together: Any, vectors: Any, codes: Any, zeros: Any,
    scales: Any, least: Any, least_scales: Any, row: Any, groups: Any, x: Any, x_scales: Any, x_sums: Any, out: Any, apart: Any,
) -> Any:  # fmt: skip
    """Row `row` of a matrix times `vectors` vectors; the products go to `out`, `apart` numbers apart.

    `kind`, `width`, `least_width`, `half`, `together`, `vectors`: literals. Of the matrix: addresses of all `codes`, of `zeros`
    uint8 and `scales` for each `width` weights, float32 or with `half` float16, of `least` int8, numbers that are added to all
    weights of a group, times a float32 of `least_scales` for each `least_width` groups, which is 0 if there are none, or a multiple
    of `together`. `width` is a multiple of `CHUNK`; with 4 bits `CHUNK`, or without `least` a multiple of two.

    Of the vectors, one behind the other: `x`, their codes, with `x_scales` float32 for each group, of which a row has `groups`. For
    a matrix of 8 bits, they are int16, and their groups those of the matrix. For one of 4 bits, they are int8 in groups of `CHUNK`,
    with the sums of their numbers in `x_sums`, float32, and each scale `SUMS` times; `together` groups, 2 or 4, lie so: the codes
    at even places, then those at odd ones.
    """
    literals = kind, width, least_width, half, together, vectors
    if not all(isinstance(value, types.IntegerLiteral) for value in literals):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        form, wide, shared, short, many, number = (value.literal_value for value in literals)
        row = _Row(builder, number, bool(short), args[6:])
        totals = row.eight_bits(wide // CHUNK) if form == INT8 else row.four_bits(form == INT4, wide, shared, many)
        for vector, total in enumerate(totals):
            store(builder, summed(builder, total), row.out, row.times(row.apart, vector))
        return context.get_dummy_value()

    return types.void(*literals, *[types.int64] * 12), generate
