"""Attention of a few heads to some tokens side by side, whose keys and values have 8 bits: scores, and sums of values.

A token's keys, or values, of a head are a scale and a zero point in float32, and a byte for each number. It knows no blocks.
"""

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from stallfree.executors.openvino.few.vectors import (
    BYTE,
    CHUNK,
    FLOAT,
    LANES,
    LONG,
    WORD,
    all_summed,
    filled,
    fused,
    load,
    loop,
    multiplied,
    store,
    vector_of,
)

TOKENS = 4
"""Tokens whose values are added at once. Where the processor has fewer registers than there are sums, these are read and written
once for all of them."""


class _Past:
    """Writes what attention does with the keys, or the values, of some tokens side by side, for several heads that share them. A
    token's are a scale and a zero point in float32, and `dim` bytes."""

    def __init__(self, builder: ir.IRBuilder, dim: int, heads: int) -> None:
        self.b, self.heads, self.pieces = builder, heads, dim // LANES
        self.each = dim + 8
        self.wide = vector_of(FLOAT, LANES)

    def about(self, past: ir.Value, token: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The address of a token's codes, its scale, and its zero point."""
        at = self.b.add(past, self.b.mul(token, ir.Constant(LONG, self.each)))
        scale, zero = (load(self.b, FLOAT, at, ir.Constant(LONG, i), 4) for i in (0, 1))
        return self.b.add(at, ir.Constant(LONG, 8)), scale, zero

    def piece(self, memory: ir.Value, head: int, piece: int) -> ir.Value:
        return load(self.b, self.wide, memory, ir.Constant(LONG, (head * self.pieces + piece) * LANES), 4)


@intrinsic
def scores(
    context: Any, dim: Any, heads: Any, queries: Any, scales: Any, sums: Any, keys: Any, count: Any, out: Any, apart: Any
) -> Any:
    """The products of `heads` queries with the keys of `count` tokens at `keys`, to `out`, those of a head `apart` numbers behind
    the one before. `queries`: int16 [heads, dim], with float32 `scales` and `sums`. `dim`, `heads`: literals."""
    if not isinstance(dim, types.IntegerLiteral) or not isinstance(heads, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        queries, scales, sums, keys, count, out, apart = args[2:]
        past, size = _Past(builder, dim.literal_value, heads.literal_value), dim.literal_value

        def body(token: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
            at, scale, zero = past.about(keys, token)
            pieces = []
            for start in range(0, size, CHUNK):
                codes = load(builder, vector_of(BYTE, CHUNK), at, ir.Constant(LONG, start), 1)
                pieces.append(builder.zext(codes, vector_of(WORD, CHUNK)))
            totals = []
            for head in range(past.heads):
                parts = [
                    multiplied(builder, codes, queries, ir.Constant(LONG, head * size + piece * CHUNK))
                    for piece, codes in enumerate(pieces)
                ]
                totals.append(reduce(builder.add, parts))
            each = vector_of(FLOAT, past.heads)
            total = builder.sitofp(all_summed(builder, totals), each)
            less = builder.fmul(filled(builder, zero, past.heads), load(builder, each, sums, ir.Constant(LONG, 0), 4))
            factor = builder.fmul(filled(builder, scale, past.heads), load(builder, each, scales, ir.Constant(LONG, 0), 4))
            products = builder.fmul(builder.fsub(total, less), factor)
            for head in range(past.heads):
                place = builder.add(token, builder.mul(ir.Constant(LONG, head), apart))
                store(builder, builder.extract_element(products, ir.Constant(WORD, head)), out, place)
            return []

        loop(builder, count, 1, [], body)
        return context.get_dummy_value()

    return types.void(dim, heads, *[types.int64] * 7), generate


@intrinsic
def weigh(context: Any, dim: Any, heads: Any, shares: Any, values: Any, count: Any, out: Any, less: Any, apart: Any) -> Any:
    """Add to `out` [heads, dim] float32 the values of `count` tokens at `values`, as if their zero points were 0, times the shares
    that each head gives them; and to `less` [heads], their zero points. The shares of a head are `apart` numbers behind those of
    the one before. `dim`, `heads`: literals."""
    if not isinstance(dim, types.IntegerLiteral) or not isinstance(heads, types.IntegerLiteral):
        return None

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        shares, values, count, out, less, apart = args[2:]
        past = _Past(builder, dim.literal_value, heads.literal_value)
        places = [(head, piece) for head in range(past.heads) for piece in range(past.pieces)]

        def body(first: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            grown, codes, factors = list(totals), list[ir.Value](), list[list[ir.Value]]()
            for number in range(TOKENS):
                token = builder.add(first, ir.Constant(LONG, number))
                there = builder.icmp_signed("<", token, count)
                token = builder.select(there, token, first)
                at, scale, zero = past.about(values, token)
                scale = builder.select(there, scale, ir.Constant(FLOAT, 0.0))
                codes.append(at)
                factors.append([])
                for head in range(past.heads):
                    place = builder.add(token, builder.mul(ir.Constant(LONG, head), apart))
                    factor = builder.fmul(scale, load(builder, FLOAT, shares, place, 4))
                    factors[-1].append(filled(builder, factor, LANES))
                    grown[head] = builder.fadd(grown[head], builder.fmul(factor, zero))
            for piece in range(past.pieces):
                loaded = [load(builder, vector_of(BYTE, LANES), at, ir.Constant(LONG, piece * LANES), 1) for at in codes]
                numbers = [builder.sitofp(builder.zext(each, vector_of(WORD, LANES)), past.wide) for each in loaded]
                for head in range(past.heads):
                    place = past.heads + head * past.pieces + piece
                    for number in range(TOKENS):
                        grown[place] = fused(builder, numbers[number], factors[number][head], grown[place])
            return grown

        starts = [load(builder, FLOAT, less, ir.Constant(LONG, head), 4) for head in range(past.heads)]
        totals = loop(builder, count, TOKENS, [*starts, *(past.piece(out, *place) for place in places)], body)
        for head in range(past.heads):
            store(builder, totals[head], less, ir.Constant(LONG, head))
        for number, total in enumerate(totals[past.heads :]):
            store(builder, total, out, ir.Constant(LONG, number * LANES))
        return context.get_dummy_value()

    return types.void(dim, heads, *[types.int64] * 6), generate
