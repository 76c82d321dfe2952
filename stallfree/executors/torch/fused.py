"""The steps between a layer's matrix products: norms, rotary positions, activations. It knows no layers or models.

On a GPU each is one Triton kernel, because a tensor's way to memory and back costs as much as a small product. Elsewhere torch
computes it, which is also the reference for the kernel.
"""

import torch
from torch.nn.functional import rms_norm, silu

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for processors comes without it
    triton = None

Turns = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of the rotary angles of a batch's tokens, [tokens, head size / 2] float32."""


def add_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta, and the RMSNorm of this sum, both [tokens, hidden]."""
    if x.is_cuda:
        return _add_norm(x, delta, weight, eps)
    whole = x + delta
    return whole, rms_norm(whole, weight.shape, weight, eps)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of `x` [tokens, 2 x channels], times the second half."""
    if x.is_cuda:
        return _swiglu(x)
    gate, other = x.chunk(2, -1)
    return silu(gate) * other


def rotate(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Rotary positions on `x` [tokens, heads, head size], computed in float32. The two of a pair are half a head apart."""
    if x.is_cuda:
        return _rotate(x, turns)
    cos, sin = (table[:, None] for table in turns)
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


if triton is not None:

    @triton.jit
    def _add_norm_kernel(x, delta, weight, whole, normed, size, eps, WIDTH: tl.constexpr):
        """One token."""
        token, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        real = at < size
        own = token * size + at
        added = tl.load(x + own, mask=real, other=0.0).to(tl.float32) + tl.load(delta + own, mask=real, other=0.0).to(tl.float32)
        kept = added.to(whole.dtype.element_ty)
        tl.store(whole + own, kept, mask=real)
        value = kept.to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 0) / size + eps)
        gain = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
        tl.store(normed + own, (value * scale * gain).to(normed.dtype.element_ty), mask=real)

    @triton.jit
    def _swiglu_kernel(x, out, channels, WIDTH: tl.constexpr):
        """Some channels of one token."""
        token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        real = at < channels
        gate = tl.load(x + token * 2 * channels + at, mask=real, other=0.0).to(tl.float32)
        other = tl.load(x + (token * 2 + 1) * channels + at, mask=real, other=0.0).to(tl.float32)
        tl.store(out + token * channels + at, (gate * tl.sigmoid(gate) * other).to(out.dtype.element_ty), mask=real)

    @triton.jit
    def _rotate_kernel(x, cos, sin, out, x_token, x_head, heads, half, HEADS: tl.constexpr, WIDTH: tl.constexpr):
        """All heads of one token."""
        token = tl.program_id(0).to(tl.int64)
        head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        real = (head < heads) & (at < half)
        turn = token * half + at
        c, s = tl.load(cos + turn, mask=at < half, other=0.0), tl.load(sin + turn, mask=at < half, other=0.0)
        where = x + token * x_token + head * x_head + at
        first, second = (
            tl.load(where, mask=real, other=0.0).to(tl.float32),
            tl.load(where + half, mask=real, other=0.0).to(tl.float32),
        )
        to = out + (token * heads + head) * 2 * half + at
        tl.store(to, (first * c - second * s).to(out.dtype.element_ty), mask=real)
        tl.store(to + half, (second * c + first * s).to(out.dtype.element_ty), mask=real)


def _add_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    x, delta = x.contiguous(), delta.contiguous()
    whole, normed = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    _add_norm_kernel[(len(x),)](x, delta, weight, whole, normed, size, eps, WIDTH=triton.next_power_of_2(size))
    return whole, normed


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    channels = x.shape[-1] // 2
    out = torch.empty(len(x), channels, dtype=x.dtype, device=x.device)
    width = min(1024, triton.next_power_of_2(channels))
    _swiglu_kernel[(len(x), triton.cdiv(channels, width))](x, out, channels, WIDTH=width)
    return out


def _rotate(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    tokens, heads, size = x.shape
    out = torch.empty(tokens, heads, size, dtype=x.dtype, device=x.device)
    rows, width = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
    _rotate_kernel[(tokens,)](x, *turns, out, x.stride(0), x.stride(1), heads, size // 2, HEADS=rows, WIDTH=width)
    return out
