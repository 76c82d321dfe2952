"""KV with fewer bits on its way between two engines. It knows how an executor's bytes hold numbers, and no connection.

A quantised number is `low + step * q`, with a whole number q of 8 or 4 bits. For values, both forms keep one `low` and one `step`
for each head of a token. u8 does the same for keys. u4 keeps them for each channel of a head of keys, over the tokens of a block: a
few channels of keys are far larger than the others in all tokens (KIVI, arXiv 2402.02750).
"""

import math
from collections.abc import Iterator
from typing import Self

import numpy as np

from stallfree.executors.base import Executor, KVNumbers, NumbersKV

BITS = {"u8": 8, "u4": 4}
"""Bits of a number in transfer."""
SCALE_BYTES = 8
"""Bytes of a `low` and a `step`, both float32. A row of u8 KV in OpenVINO has as many: its scale, and its zero point."""
FLOATS = {"f32": np.float32, "fp16": np.float16, "bf16": np.uint16}
"""KV formats without scales, as numpy reads them; numpy has no bf16."""


class Form:
    """The form `name` (of `BITS`) of KV in transfer, for blocks of `block_size` tokens that hold `numbers`."""

    def __init__(self, name: str, numbers: KVNumbers, block_size: int) -> None:
        self._bits, self._numbers = BITS[name], numbers
        self._shape = (numbers.heads, block_size, numbers.size)
        by_channel = name == "u4"
        self._axes = (2 if by_channel else 3, 3)
        """Over which axis of [blocks, heads, tokens, head size] keys and values have one `low` and one `step`."""

    @classmethod
    def of(cls, name: str, executor: Executor) -> Self | None:
        """The form `name` for the KV of `executor`; None for "same". Raises ValueError for KV that cannot be sent in this form."""
        if name == "same":
            return None
        if name not in BITS:
            raise ValueError(f"--transfer-kv {name!r} is unknown; known are same, {', '.join(BITS)}")
        if not isinstance(executor, NumbersKV):
            raise ValueError(f"--transfer-kv {name}: {type(executor).__name__} does not tell how its KV holds numbers; take same")
        numbers = executor.numbers
        if numbers.form not in FLOATS and (numbers.form, name) != ("u8", "u4"):
            known = "f32, bf16 and fp16 as u8 or u4, and u8 as u4"
            raise ValueError(f"--transfer-kv {name}: KV in {numbers.form} cannot be sent so; KV in {known} can; take same")
        return cls(name, numbers, executor.capacity.block_size)

    def size(self, blocks: int, layers: int | None = None) -> int:
        """Bytes of `layers` layers (None: all) of `blocks` blocks in this form."""
        return (self._numbers.layers if layers is None else layers) * sum(self._sizes(blocks))

    def pack(self, memory: memoryview, blocks: int, tokens: int, layers: int | None = None) -> bytearray:
        """`layers` layers (None: all) of `blocks` blocks in this form, of an executor's bytes in `memory`. The last block has
        `tokens` tokens; the bytes after them need not be numbers, and are not sent.
        """
        out = bytearray(self.size(blocks, layers))
        with np.errstate(all="ignore"):
            for kind, raw, packed in self._pieces(memory, memoryview(out), blocks):
                values = self._read(raw, blocks)
                values[-1, :, tokens:] = values[-1, :, tokens - 1 : tokens]
                self._quantise(values, self._axes[kind], packed)
        return out

    def unpack(self, packed: memoryview, blocks: int, layers: int | None = None) -> bytearray:
        """An executor's bytes of `layers` layers (None: all) of `blocks` blocks, from this form."""
        out = bytearray(blocks * (self._numbers.layers if layers is None else layers) * 2 * self._raw_size)
        with np.errstate(all="ignore"):  # a peer may send what is no number
            for kind, raw, piece in self._pieces(memoryview(out), packed, blocks):
                self._write(self._restored(piece, self._axes[kind], blocks), raw)
        return out

    @property
    def _raw_size(self) -> int:
        """Bytes of the keys of one block and layer in the executor."""
        heads, tokens, size = self._shape
        kind = FLOATS.get(self._numbers.form)
        return heads * tokens * (size + SCALE_BYTES if kind is None else size * np.dtype(kind).itemsize)

    def _sizes(self, blocks: int) -> tuple[int, int]:
        """Bytes of a layer's keys and of its values in this form."""
        shape = (blocks, *self._shape)
        numbers = math.prod(shape) * self._bits // 8
        keys, values = (numbers + SCALE_BYTES * math.prod(shape) // shape[axis] for axis in self._axes)
        return keys, values

    def _pieces(self, raw: memoryview, packed: memoryview, blocks: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Keys (0) and values (1) of each layer: their bytes in the executor's order, and in this form."""
        source, target, each = np.frombuffer(raw, np.uint8), np.frombuffer(packed, np.uint8), blocks * self._raw_size
        begin = at = 0
        while begin < len(source):
            for kind, size in enumerate(self._sizes(blocks)):
                yield kind, source[begin : begin + each], target[at : at + size]
                begin, at = begin + each, at + size

    def _read(self, raw: np.ndarray, blocks: int) -> np.ndarray:
        """The numbers in an executor's bytes, [blocks, heads, tokens, head size] float32, writable."""
        heads, tokens, size = self._shape
        if self._numbers.form == "u8":
            rows = raw.reshape(-1, SCALE_BYTES + size)
            scales = rows[:, :SCALE_BYTES].copy().view(np.float32)
            values = (rows[:, SCALE_BYTES:] - scales[:, 1:]) * scales[:, :1]
        else:
            values = raw.view(FLOATS[self._numbers.form])
            values = (
                (values.astype(np.uint32) << 16).view(np.float32) if self._numbers.form == "bf16" else values.astype(np.float32)
            )
        if self._numbers.heads_first:
            return values.reshape(blocks, heads, tokens, size)
        return values.reshape(blocks, tokens, heads, size).transpose(0, 2, 1, 3)

    def _write(self, values: np.ndarray, raw: np.ndarray) -> None:
        """The inverse of `_read`, into `raw`."""
        values = values if self._numbers.heads_first else values.transpose(0, 2, 1, 3)
        if self._numbers.form == "u8":
            rows = raw.reshape(-1, SCALE_BYTES + self._numbers.size)
            low, step, whole = _quantised(values.reshape(-1, self._numbers.size), 8, 1)
            rows[:, :SCALE_BYTES] = np.concatenate([step, -low / step], 1).view(np.uint8)
            rows[:, SCALE_BYTES:] = whole
        elif self._numbers.form == "bf16":
            bits = np.ascontiguousarray(values).view(np.uint32)
            raw.view(np.uint16)[:] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).ravel()  # to the nearest, ties to even
        else:
            raw.view(FLOATS[self._numbers.form])[:] = values.ravel()

    def _quantise(self, values: np.ndarray, axis: int, packed: np.ndarray) -> None:
        """Write `low`, `step` and the whole numbers of `values` into `packed`."""
        low, step, whole = _quantised(values, self._bits, axis)
        scales = packed[: SCALE_BYTES * low.size].view(np.float32).reshape(2, -1)
        scales[0], scales[1] = low.ravel(), step.ravel()
        flat = whole.ravel()
        packed[SCALE_BYTES * low.size :] = flat if self._bits == 8 else flat[::2] | flat[1::2] << 4

    def _restored(self, packed: np.ndarray, axis: int, blocks: int) -> np.ndarray:
        """The numbers in `packed`, [blocks, heads, tokens, head size] float32."""
        shape = (blocks, *self._shape)
        groups = math.prod(shape) // shape[axis]
        scales = packed[: SCALE_BYTES * groups].view(np.float32)
        flat = packed[SCALE_BYTES * groups :]
        whole = flat if self._bits == 8 else np.stack([flat & 15, flat >> 4], -1)
        low, step = scales.reshape(2, *(1 if at == axis else length for at, length in enumerate(shape)))
        restored: np.ndarray = whole.reshape(shape) * step + low
        return restored


def _quantised(values: np.ndarray, bits: int, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lowest of `values` along `axis`, the step, and whole numbers of `bits` bits."""
    low = values.min(axis, keepdims=True)
    step = (values.max(axis, keepdims=True) - low) / np.float32(2**bits - 1)
    step[step == 0] = 1  # all are equal
    return low, step, np.rint((values - low) / step).astype(np.uint8)
