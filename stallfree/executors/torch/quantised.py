"""Products with weights of int8, fp8 or int4 in Triton: a weight is a byte or half a byte in memory. It knows no layers.

Decodes are bound by reading weights. For a few rows a weight becomes a number of the activations' type in the tile, so half or a
quarter of the bytes takes half or a quarter of the time. Prompts are bound by the product. For many rows the weights are widened
once, and torch multiplies them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tiles(NamedTuple):
    """A program's work: `outs` outputs, from `ins` inputs at once, by `warps` warps with `stages` loads in flight. Inputs are split
    until there are `programs` for each processor of the GPU."""

    outs: int
    ins: int
    warps: int
    stages: int
    programs: int


SHORT, TALL = Tiles(64, 256, 4, 3, 4), Tiles(128, 128, 4, 3, 2)
"""For int8 and fp8: for at most `ROWS` rows, and for more. On an H200, with the matrices of Llama 3 8B, they are within 3 % of the
fastest tried for one row, and the fastest for 64."""
NIBBLES = Tiles(128, 64, 4, 3, 8)
"""For int4, the fastest tried there for one row and 32 together. A tile has the inputs of one group."""
ROWS = 16
"""The fewest rows of a tile that tensor cores take."""
HEIGHT = 64
"""The most rows of a tile."""
FEW = 128
"""Rows up to which weights are not widened. Widening took as long as 200 rows (int8, fp8) or 150 (int4) on an H200."""
MOST_SPLITS = 16


@triton.jit(do_not_specialize=["rows", "each"])  # each specialisation is another compilation
def _few(
    x, weight, scale, low, out, rows, outs, ins, each,
    INT4: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """A tile of `out` [splits, rows, outs]: x [rows, ins] times weight, for one part of the inputs, `each` x `INS`. The weight is
    int8 or fp8 [outs, ins] with a scale for each output; or int4 as in `weights.Matrix`, where `INS` is a group's inputs.
    """
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    split = tl.program_id(2)
    real, wanted = row < rows, column < outs
    x_at, w_at = x + row[:, None] * ins, weight + column.to(tl.int64)[None, :] * (ins // 2 if INT4 else ins)
    sums = tl.zeros([ROWS, OUTS], tl.float32)
    for step in range(split * each, tl.minimum((split + 1) * each, tl.cdiv(ins, INS))):
        if INT4:
            byte = tl.arange(0, INS // 2)
            both = tl.load(w_at + step * (INS // 2) + byte[:, None], mask=wanted[None, :], other=0)
            first = tl.load(x_at + step * INS + byte[None, :], mask=real[:, None], other=0.0)
            second = tl.load(x_at + step * INS + INS // 2 + byte[None, :], mask=real[:, None], other=0.0)
            s = tl.load(scale + step * outs + column, mask=wanted, other=0.0)[None, :]
            o = tl.load(low + step * outs + column, mask=wanted, other=0.0)[None, :]
            lower, upper = (both & 15).to(tl.float32) * s + o, (both >> 4).to(tl.float32) * s + o
            sums = tl.dot(first, lower.to(first.dtype), sums, input_precision="ieee")
            sums = tl.dot(second, upper.to(first.dtype), sums, input_precision="ieee")
        else:
            at = step * INS + tl.arange(0, INS)
            inside = at < ins
            values = tl.load(w_at + at[:, None], mask=inside[:, None] & wanted[None, :], other=0.0)
            inputs = tl.load(x_at + at[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            sums = tl.dot(inputs, values.to(inputs.dtype), sums, input_precision="ieee")
    if not INT4:
        sums *= tl.load(scale + column, mask=wanted, other=0.0)[None, :]
    to = out + (split * rows + row).to(tl.int64)[:, None] * outs + column[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=real[:, None] & wanted[None, :])


@triton.jit
def _add(partial, out, size, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of the splits' parts, always in the same order."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = at < size
    sums = tl.zeros([WIDTH], tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(partial + split * size + at, mask=real, other=0.0)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=real)


@triton.jit
def _widen(
    weight, scale, low, out, outs, ins,
    INT4: tl.constexpr, GROUP: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
):  # fmt: skip
    """A tile of `out` [outs, ins]: the numbers for which the weight stands, `INS` stored bytes of each output."""
    row = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)[:, None]
    byte = tl.program_id(1) * INS + tl.arange(0, INS)[None, :]
    if INT4:
        real = (row < outs) & (byte < ins // 2)
        both = tl.load(weight + row * (ins // 2) + byte, mask=real, other=0)
        group, place = byte // (GROUP // 2), byte % (GROUP // 2)
        s = tl.load(scale + group * outs + row, mask=real, other=0.0)
        o = tl.load(low + group * outs + row, mask=real, other=0.0)
        to = out + row * ins + group * GROUP + place
        tl.store(to, ((both & 15).to(tl.float32) * s + o).to(out.dtype.element_ty), mask=real)
        tl.store(to + GROUP // 2, ((both >> 4).to(tl.float32) * s + o).to(out.dtype.element_ty), mask=real)
    else:
        real = (row < outs) & (byte < ins)
        values = tl.load(weight + row * ins + byte, mask=real, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=row < outs, other=0.0)
        tl.store(out + row * ins + byte, (values * s).to(out.dtype.element_ty), mask=real)


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None, group: int) -> torch.Tensor:
    """The product [rows, outs] of x [rows, ins] and a weight as `weights.Matrix` stores it. `low`: int4's offset, else None."""
    rows, ins = x.shape
    outs, int4 = len(weight), low is not None
    offset = scale if low is None else low
    if rows > FEW:
        wide = torch.empty(outs, ins, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(outs, 4), triton.cdiv(weight.shape[1], 1024))
        _widen[grid](weight, scale, offset, wide, outs, ins, INT4=int4, GROUP=group, OUTS=4, INS=1024)
        return torch.nn.functional.linear(x, wide)
    x = x.contiguous()
    height = min(HEIGHT, max(ROWS, triton.next_power_of_2(rows)))
    tiles = NIBBLES._replace(ins=group) if int4 else SHORT if height == ROWS else TALL
    columns, lines = triton.cdiv(outs, tiles.outs), triton.cdiv(rows, height)
    splits = _splits(tiles, columns * lines, ins, x.device)
    each = triton.cdiv(triton.cdiv(ins, tiles.ins), splits)
    out = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    partial = out if splits == 1 else torch.empty(splits, rows, outs, dtype=torch.float32, device=x.device)
    _few[(columns, lines, splits)](
        x, weight, scale, offset, partial, rows, outs, ins, each, INT4=int4, ROWS=height, OUTS=tiles.outs, INS=tiles.ins,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        _add[(triton.cdiv(rows * outs, 1024),)](partial, out, rows * outs, SPLITS=splits, WIDTH=1024)
    return out


def _splits(tiles: Tiles, programs: int, ins: int, device: torch.device) -> int:
    """The number of parts of the inputs that makes enough programs for the device. Each part has at least four tiles."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(tiles.programs * processors // programs, ins // (4 * tiles.ins), MOST_SPLITS))
