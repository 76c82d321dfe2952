"""Products with weights of int8, fp8 or int4 in Triton: a weight is a byte or half a byte in memory, and becomes a number of the
activations' type in the tile. It knows no layers.

Decodes are bound by reading weights, so half or a quarter of the bytes takes half or a quarter of the time. Prompts are bound by
the product, which is in the activations' type in any case.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _product(
    x, weight, scale, low, out, rows, outs, ins,
    INT4: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """A tile of `out` [rows, outs]: x [rows, ins] times weight. The weight is int8 or fp8 [outs, ins] with a scale for each output,
    or int4 [outs, ins / 2] with two neighbours in a byte, the first in the lower bits, and a scale and an offset for each `GROUP`
    inputs of an output.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    real, wanted = row < rows, column < outs
    x_at, w_at = x + row.to(tl.int64)[:, None] * ins, weight + column.to(tl.int64)[None, :] * (ins // 2 if INT4 else ins)
    sums = tl.zeros([ROWS, OUTS], tl.float32)
    for group in range(0, tl.cdiv(ins, GROUP)):
        if INT4:
            pair = group * (GROUP // 2) + tl.arange(0, GROUP // 2)
            both = tl.load(w_at + pair[:, None], mask=wanted[None, :], other=0)
            first = tl.load(x_at + 2 * pair[None, :], mask=real[:, None], other=0.0)
            second = tl.load(x_at + 2 * pair[None, :] + 1, mask=real[:, None], other=0.0)
            part = tl.dot(first, (both & 15).to(first.dtype), input_precision="ieee")
            part += tl.dot(second, (both >> 4).to(second.dtype), input_precision="ieee")
            own = column * (ins // GROUP) + group
            s, o = tl.load(scale + own, mask=wanted, other=0.0), tl.load(low + own, mask=wanted, other=0.0)
            total = tl.sum(first.to(tl.float32), 1) + tl.sum(second.to(tl.float32), 1)
            sums += part * s[None, :] + total[:, None] * o[None, :]
        else:
            at = group * GROUP + tl.arange(0, GROUP)
            inside = at < ins
            values = tl.load(w_at + at[:, None], mask=inside[:, None] & wanted[None, :], other=0.0)
            inputs = tl.load(x_at + at[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            sums += tl.dot(inputs, values.to(inputs.dtype), input_precision="ieee")
    if not INT4:
        sums *= tl.load(scale + column, mask=wanted, other=0.0)[None, :]
    to = out + row.to(tl.int64)[:, None] * outs + column[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=real[:, None] & wanted[None, :])


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None, group: int) -> torch.Tensor:
    """The product [rows, outs] of x [rows, ins] and a weight as `weights.Matrix` stores it. `low`: int4's offset, else None."""
    x = x.contiguous()
    rows, ins = x.shape
    outs = len(weight)
    out = torch.empty(rows, outs, dtype=x.dtype, device=x.device)
    tall, wide = (16, 64) if rows <= 16 else (64, 64)
    _product[(triton.cdiv(rows, tall), triton.cdiv(outs, wide))](
        x, weight, scale, scale if low is None else low, out, rows, outs, ins,
        INT4=low is not None, GROUP=group, ROWS=tall, OUTS=wide,
    )  # fmt: skip
    return out
