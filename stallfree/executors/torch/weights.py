"""From a checkpoint's tensors to this rank's part of them, on its device, in the wanted number format.

Tensors pass one at a time, so the model is never in memory twice. It knows number formats, and nothing of transformers.
"""

from typing import TypeVar

import numpy as np
import torch
from torch.nn.functional import linear

from stallfree.checkpoint import Checkpoint

FORMATS = ("f32", "bf16", "fp16", "fp8", "int8", "int4")
QUANTISED = {"fp8", "int8", "int4"}
"""Formats for storage only: products are computed in the activations' type."""
GROUP = 64
"""How many weights of a row share a scale and an offset in int4."""


Rows = TypeVar("Rows", torch.Tensor, np.ndarray)


class Matrix:
    """A matrix [out, in], stored as `form` says. Applied to activations, it returns their type.

    int8 and fp8 have a scale for each output. int4 has a scale and an offset for each group of an output, [groups, out]. Byte i of
    a group has its input i in the lower bits, and its input i + GROUP / 2 in the higher, so activations are read without gaps.
    """

    def __init__(self, values: torch.Tensor, form: str, bias: torch.Tensor | None):
        self.bias = bias
        self._form = form
        self._shape = values.shape
        self._low: torch.Tensor | None = None
        if form in ("int8", "fp8"):
            kind = torch.int8 if form == "int8" else torch.float8_e4m3fn
            most = 127 if form == "int8" else torch.finfo(kind).max
            self._scale = (values.float().abs().amax(1, keepdim=True) / most).clamp_min(1e-12)
            scaled = values.float() / self._scale
            self._values = (torch.round(scaled) if form == "int8" else scaled).to(kind)
        elif form == "int4":
            grouped = values.float().view(len(values), -1, GROUP)
            low, high = grouped.amin(2), grouped.amax(2)
            scale = ((high - low) / 15).clamp_min(1e-12)
            steps = torch.round((grouped - low[..., None]) / scale[..., None]).to(torch.uint8)
            lower, upper = steps.chunk(2, 2)
            self._values = (lower | (upper << 4)).reshape(len(values), -1)
            self._scale, self._low = scale.T.contiguous(), low.T.contiguous()
        else:
            self._values = values

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and self._form in QUANTISED:
            from stallfree.executors.torch.quantised import product

            out = product(x, self._values, self._scale, self._low, GROUP)
            return out if self.bias is None else out + self.bias
        return linear(x, self.dense(x.dtype), self.bias)

    def rows(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows for these tokens, if this is a matrix of embeddings."""
        if self._form in QUANTISED:
            raise ValueError("embeddings are not quantised")
        return self._values[tokens].to(dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The values for which the stored numbers stand."""
        if self._form in ("int8", "fp8"):
            return self._values.to(dtype) * self._scale.to(dtype)
        if self._form == "int4":
            both = self._values.view(len(self._values), -1, GROUP // 2)
            steps, low = torch.cat((both & 15, both >> 4), 2), 0 if self._low is None else self._low.T[..., None]
            return (steps * self._scale.T[..., None] + low).to(dtype).view(self._shape)
        return self._values.to(dtype)


def cut(whole: Rows, pieces: int, rank: int, tp: int) -> Rows:
    """The rows of rank `rank` of `tp`, of a matrix whose rows can be cut in `pieces`. If there are fewer pieces than ranks,
    neighbours have the same.
    """
    number = min(pieces, tp)
    height, place = len(whole) // number, rank * number // tp
    return whole[place * height : (place + 1) * height]


class Weights:
    """The tensors of `checkpoint` on `device`: matrices in `form`, all else in `dtype`. `tp` ranks share them; this one is
    `rank`."""

    def __init__(self, checkpoint: Checkpoint, form: str, dtype: torch.dtype, device: torch.device, rank: int = 0, tp: int = 1):
        self._checkpoint, self._form = checkpoint, form
        self.dtype, self.device, self.rank, self.tp = dtype, device, rank, tp

    def vector(self, name: str) -> torch.Tensor:
        """A whole tensor, not quantised."""
        return self._read(name).to(self.device, self.dtype)

    def part(self, name: str, pieces: int) -> torch.Tensor:
        """This rank's part of a vector that can be cut in `pieces`."""
        return self._share(name, pieces).to(self.device, self.dtype)

    def outputs(self, *parts: tuple[str, int], bias: bool = False) -> Matrix:
        """Matrices, one below the other, of which each rank has some outputs. `parts`: (name, number of parts in which it is cut).
        If there are fewer parts than ranks, several ranks have the same part.
        """
        values = torch.cat([self._share(f"{name}.weight", pieces) for name, pieces in parts])
        added = torch.cat([self._share(f"{name}.bias", pieces) for name, pieces in parts]) if bias else None
        return self._stored(values, added)

    def whole(self, name: str, *, bias: bool = False) -> Matrix:
        """A small matrix, not quantised, of which every rank has all."""
        return Matrix(self.vector(f"{name}.weight"), "", self.vector(f"{name}.bias") if bias else None)

    def fused(self, name: str, heads: int, kv_heads: int, size: int, *, bias: bool = False) -> Matrix:
        """As `outputs`, for one matrix that holds, for each KV head, the rows of its queries, its keys and its values."""

        def share(values: torch.Tensor) -> torch.Tensor:
            grouped = values.view(kv_heads, heads // kv_heads + 2, size, -1)
            parts = grouped[:, :-2].reshape(heads * size, -1), grouped[:, -2].reshape(kv_heads * size, -1), grouped[:, -1]
            shares = [
                self._cut(part.reshape(-1, part.shape[-1]), cut)
                for part, cut in zip(parts, (heads, kv_heads, kv_heads), strict=True)
            ]
            return torch.cat(shares)

        weight = share(self._read(f"{name}.weight"))
        added = share(self._read(f"{name}.bias")).view(-1) if bias else None
        return self._stored(weight, added)

    def inputs(self, name: str, *, bias: bool = False) -> Matrix:
        """A matrix of which each rank has some inputs, so the ranks' products must be added. Only the first rank has the bias."""
        whole = self._read(f"{name}.weight")
        width = whole.shape[1] // self.tp
        added = self._read(f"{name}.bias") if bias and self.rank == 0 else None
        return self._stored(whole[:, self.rank * width : (self.rank + 1) * width], added)

    def vocabulary(self, name: str) -> Matrix:
        """A matrix with a row for each token, not quantised. Ranks have equally many rows; the last one may have fewer."""
        whole = self._read(name)
        height = -(-len(whole) // self.tp)
        return Matrix(whole[self.rank * height : (self.rank + 1) * height].to(self.device, self.dtype), "", None)

    def _read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint. If a benchmark made it on the device, it stays there."""
        return torch.as_tensor(self._checkpoint.read(name))

    def _share(self, name: str, pieces: int) -> torch.Tensor:
        return self._cut(self._read(name), pieces)

    def _cut(self, whole: torch.Tensor, pieces: int) -> torch.Tensor:
        return cut(whole, pieces, self.rank, self.tp)

    def _stored(self, values: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        kind = torch.float32 if self._form in QUANTISED else self.dtype
        added = None if bias is None else bias.to(self.device, self.dtype)
        return Matrix(values.to(self.device, kind), self._form, added)
