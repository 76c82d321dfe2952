"""What numba has no words for: vectors, atomic numbers, and memory by its address.

What has a `builder` writes operations for LLVM, which chooses the processor's instructions for them (for `multiplied`, on x86,
vpmaddwd in 256 or 512 bits). It knows nothing of matrices.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

CHUNK = 32
"""Codes that are multiplied at once."""
LANES = CHUNK // 2

FEATURES = binding.get_host_cpu_features()
"""The instructions that the processor has, by LLVM's names."""

BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()


def has_vnni() -> bool:
    """Whether the processor multiplies bytes and adds up four products, in vectors of 256 and 512 bits."""
    return bool(FEATURES.get("avx512vnni") and FEATURES.get("avx512vl"))


def vector_of(kind: ir.Type, size: int) -> ir.VectorType:
    return ir.VectorType(kind, size)


def picked(builder: ir.IRBuilder, first: ir.Value, indices: Sequence[int], second: ir.Value | None = None) -> ir.Value:
    """The numbers of one or two vectors at these places."""
    second = ir.Constant(first.type, ir.Undefined) if second is None else second
    return builder.shuffle_vector(first, second, ir.Constant(vector_of(WORD, len(indices)), list(indices)))


def filled(builder: ir.IRBuilder, value: ir.Value, size: int) -> ir.Value:
    kind = vector_of(value.type, size)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
    return picked(builder, first, [0] * size)


def load(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value, index: ir.Value, align: int) -> ir.Value:
    """The value of type `kind` that begins `index` elements behind `address`."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    place = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    loaded = builder.load(builder.bitcast(place, kind.as_pointer()))
    loaded.align = align
    return loaded


def fetch(builder: ir.IRBuilder, address: ir.Value, offset: ir.Value) -> None:
    """Begin to read the bytes there from memory: what is read in order crosses a page before the processor expects it."""
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), WORD, WORD, WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    place = builder.gep(builder.inttoptr(address, BYTE.as_pointer()), [offset])
    builder.call(function, [place, *(ir.Constant(WORD, value) for value in (0, 3, 1))])  # to read, into all caches, data


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, index: ir.Value) -> None:
    """Store float32, one or a vector, `index` numbers behind `address`."""
    place = builder.gep(builder.inttoptr(address, FLOAT.as_pointer()), [index])
    builder.store(value, builder.bitcast(place, value.type.as_pointer()), align=4)


def multiplied(builder: ir.IRBuilder, codes: ir.Value, address: ir.Value, index: ir.Value) -> ir.Value:
    """The products of `CHUNK` codes, int32, with as many int16 `index` numbers behind `address`, in sums of two."""
    values = builder.sext(load(builder, vector_of(SHORT, CHUNK), address, index, 2), vector_of(WORD, CHUNK))
    products = builder.mul(codes, values)
    return builder.add(picked(builder, products, range(0, CHUNK, 2)), picked(builder, products, range(1, CHUNK, 2)))


def bytes_multiplied(builder: ir.IRBuilder, codes: Sequence[ir.Value], values: Sequence[ir.Value]) -> ir.Value:
    """The products of vectors of uint8 codes below 16 with as many of int8 values, at most eight, added up in sums of four places:
    int32. In one instruction for each two where the processor has it (VNNI), or in two and an addition (AVX2)."""
    size = codes[0].type.count // 4
    words, shorts = vector_of(WORD, size), vector_of(SHORT, 2 * size)
    if has_vnni():
        kind = ir.FunctionType(words, [words] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.vpdpbusd.{32 * size}")
        total = splat(0, words)
        for both in zip(codes, values, strict=True):
            total = builder.call(function, [total, *(builder.bitcast(operand, words) for operand in both)])
        return total
    if FEATURES.get("avx2"):
        pairs = [_by_half(builder, "llvm.x86.avx2.pmadd.ub.sw", shorts, both) for both in zip(codes, values, strict=True)]
        return _by_half(builder, "llvm.x86.avx2.pmadd.wd", words, [reduce(builder.add, pairs), splat(1, shorts)])
    products = [
        builder.mul(builder.zext(code, vector_of(WORD, 4 * size)), builder.sext(value, vector_of(WORD, 4 * size)))
        for code, value in zip(codes, values, strict=True)
    ]
    total = reduce(builder.add, products)
    return reduce(builder.add, [picked(builder, total, range(at, 4 * size, 4)) for at in range(4)])


def _by_half(builder: ir.IRBuilder, name: str, kind: ir.VectorType, operands: Sequence[ir.Value]) -> ir.Value:
    """LLVM's function `name`, of vectors of 32 bytes, for vectors of as many or twice as many. `kind`: the result's."""
    number = operands[0].type.count * operands[0].type.element.width // 256
    pieces = list(zip(*[cut(builder, operand, operand.type.count // number) for operand in operands], strict=True))
    result = ir.FunctionType(vector_of(kind.element, kind.count // number), [piece.type for piece in pieces[0]])
    function = cgutils.get_or_insert_function(builder.module, result, name)
    results = [builder.call(function, piece) for piece in pieces]
    return results[0] if number == 1 else picked(builder, results[0], range(kind.count), results[1])


def cut(builder: ir.IRBuilder, vector: ir.Value, size: int) -> list[ir.Value]:
    """A vector in pieces of at most `size` numbers."""
    count = vector.type.count
    if count <= size:
        return [vector]
    return [picked(builder, vector, range(at, at + size)) for at in range(0, count, size)]


def lengthened(builder: ir.IRBuilder, vector: ir.Value, size: int) -> ir.Value:
    """A vector with zeros behind its numbers."""
    count = vector.type.count
    return picked(builder, vector, [min(at, count) for at in range(size)], splat(0.0, vector.type))


def summed(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    size, add = vector.type.count, builder.fadd if vector.type.element == FLOAT else builder.add
    while not size % 2:
        size //= 2
        vector = add(*(picked(builder, vector, range(at, at + size)) for at in (0, size)))
    return reduce(add, [builder.extract_element(vector, ir.Constant(WORD, i)) for i in range(size)])


def all_summed(builder: ir.IRBuilder, vectors: Sequence[ir.Value]) -> ir.Value:
    """The sum of each of one to four vectors of int32, in a vector: several are added at once."""
    size = vectors[0].type.count
    while size > 4:
        size //= 2
        vectors = [builder.add(*(picked(builder, v, range(at, at + size)) for at in (0, size))) for v in vectors]
    both = [*vectors, *[vectors[0]] * (4 - len(vectors))]
    while len(both) > 1:
        both = [
            builder.add(*(picked(builder, a, range(at, 8, 2), b) for at in (0, 1)))
            for a, b in zip(both[::2], both[1::2], strict=True)
        ]
    return picked(builder, both[0], range(len(vectors)))


def splat(value: float, kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def loop(
    builder: ir.IRBuilder,
    count: ir.Value,
    step: int,
    starts: Sequence[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """The values that `body` makes of `starts`, called with each `step`-th number below `count`, at least with 0, and the values so
    far."""
    before, block, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(block)
    builder.position_at_end(block)
    number, values = builder.phi(LONG), [builder.phi(start.type) for start in starts]
    grown = body(number, values)
    following = builder.add(number, ir.Constant(LONG, step))
    builder.cbranch(builder.icmp_signed("<", following, count), block, end)
    for phi, start, value in zip([number, *values], [ir.Constant(LONG, 0), *starts], [following, *grown], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, builder.block)
    builder.position_at_end(end)
    return grown


def fused(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, of float32 vectors."""
    kind = ir.FunctionType(x.type, [x.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{x.type.count}f32"), [x, y, z])


@intrinsic
def add_to(context: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`, atomically. Returns what it was."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], LONG.as_pointer()), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def look_at(context: Any, address: Any) -> Any:
    """The int64 at `address`, as other threads have left it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(builder.inttoptr(args[0], LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """The memory at `address`, for `numba.carray`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def as_float(context: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(args[0], FLOAT)

    return types.float32(types.int32), generate


@intrinsic
def call(context: Any, function: Any, args: Any) -> Any:
    """Call the compiled function at an address, with a tuple of int64."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        numbers = cgutils.unpack_tuple(builder, values[1])
        kind = ir.FunctionType(ir.VoidType(), [LONG] * len(numbers))
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(types.int64, args), generate
