"""The steps between a layer's matrix products: norms, rotary positions with the writing of KV, activations. It knows no
layers or models.

On a GPU each is one Triton kernel, because a tensor's way to memory and back costs as much as a small product. Elsewhere torch
computes it, which is also the reference for the kernel.
"""

import torch
from torch.nn.functional import rms_norm, silu

from stallfree.executors.torch.attention import Cache, write

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


def gated(x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """The gate, silu (or GELU by tanh) of the first half of `x` [tokens, 2 x channels], times the second half."""
    if not gelu:
        return swiglu(x)
    gate, other = x.chunk(2, -1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * other


def clamped(x: torch.Tensor, slope: float, limit: float) -> torch.Tensor:
    """gpt-oss's activation of `x` [tokens, 2 x channels]: the gate, from the first half up to `limit`, times 1 + the second half,
    which is kept within `limit` of 0.
    """
    gate, other = x.chunk(2, -1)
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(slope * gate) * (other.clamp(-limit, limit) + 1)


def keep(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: Turns, cache: Cache, slots: torch.Tensor) -> torch.Tensor:
    """Write rotated keys `k` and values `v` to their `slots` in the cache. Returns the rotated queries. `q`, `k` and `v` are
    [tokens, their heads, head size], and contiguous in the last dimension.
    """
    if q.is_cuda:
        return _keep(q, k, v, turns, cache, slots)
    write(cache[0], rotate(k, turns), slots)
    write(cache[1], v, slots)
    return rotate(q, turns)


def rotate(x: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Rotary positions on `x` [tokens, heads, head size], computed in float32. The two of a pair are half a head apart."""
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
    def _turn(source, to, c, s, half, real):
        """Store the rotated heads of `source` at `to`."""
        first, second = tl.load(source, mask=real, other=0.0), tl.load(source + half, mask=real, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        # Rounded to the activations' type first, because the cache may have fewer bits.
        tl.store(to, (a * c - b * s).to(first.dtype).to(to.dtype.element_ty), mask=real)
        tl.store(to + half, (b * c + a * s).to(first.dtype).to(to.dtype.element_ty), mask=real)

    @triton.jit
    def _keep_kernel(
        q, k, v, cos, sin, slots, out, keys, values, q_token, q_head, k_token, k_head, v_token, v_head,
        heads, kv_heads, half, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """All queries, keys or values of one token."""
        token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        turn, inside = token * half + at, at < half
        c, s = tl.load(cos + turn, mask=inside, other=0.0), tl.load(sin + turn, mask=inside, other=0.0)
        place = (tl.load(slots + token) * kv_heads + head) * 2 * half + at
        if part == 0:
            to = out + (token * heads + head) * 2 * half + at
            _turn(q + token * q_token + head * q_head + at, to, c, s, half, inside & (head < heads))
        elif part == 1:
            _turn(k + token * k_token + head * k_head + at, keys + place, c, s, half, inside & (head < kv_heads))
        else:
            source, real = v + token * v_token + head * v_head + at, inside & (head < kv_heads)
            tl.store(values + place, tl.load(source, mask=real, other=0.0).to(values.dtype.element_ty), mask=real)
            tl.store(values + place + half, tl.load(source + half, mask=real, other=0.0).to(values.dtype.element_ty), mask=real)


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


def _keep(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turns: Turns, cache: Cache, slots: torch.Tensor) -> torch.Tensor:
    tokens, heads, size = q.shape
    out = torch.empty(tokens, heads, size, dtype=q.dtype, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    rows, width = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
    _keep_kernel[(tokens, 3)](
        q, k, v, *turns, slots, out, *cache, *strides, heads, k.shape[1], size // 2, HEADS=rows, WIDTH=width
    )  # fmt: skip
    return out
