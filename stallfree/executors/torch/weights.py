"""From a checkpoint's tensors to this rank's part of them, on its device, in the number format that was asked for.

Tensors pass one at a time, so that the model is never in memory twice. It knows number formats, and nothing of transformers.
"""

import torch
from torch.nn.functional import linear

from stallfree.checkpoint import Checkpoint

FORMATS = ("f32", "bf16", "fp16", "fp8", "int8", "int4")
QUANTISED = {"fp8", "int8", "int4"}
"""Formats in which nobody computes: the product is in the activations' type."""
GROUP = 64
"""Weights of a row that share a scale, and an offset, in int4."""


class Matrix:
    """[out, in], stored as `form` says; applied to activations it gives their type."""

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
            low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
            self._scale = ((high - low) / 15).clamp_min(1e-12)
            self._low = low
            steps = torch.round((grouped - low) / self._scale).to(torch.uint8).view(len(values), -1)
            self._values = steps[:, ::2] | (steps[:, 1::2] << 4)
        else:
            self._values = values

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and self._form in QUANTISED:
            from stallfree.executors.torch.quantised import product

            found = product(x, self._values, self._scale, self._low, GROUP)
            return found if self.bias is None else found + self.bias
        return linear(x, self.dense(x.dtype), self.bias)

    def rows(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows of these numbers: a matrix of embeddings is looked up by them."""
        if self._form in QUANTISED:
            raise ValueError("embeddings are not quantised")
        return self._values[tokens].to(dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The values that it stands for."""
        if self._form in ("int8", "fp8"):
            return self._values.to(dtype) * self._scale.to(dtype)
        if self._form == "int4":
            steps = torch.stack((self._values & 15, self._values >> 4), 2).view(*self._scale.shape[:2], GROUP)
            return (steps * self._scale + (0 if self._low is None else self._low)).to(dtype).view(self._shape)
        return self._values.to(dtype)


class Weights:
    """The tensors of `checkpoint` on `device`, matrices in `form`, the rest in `dtype`; `tp` ranks share them, and this one is
    `rank`."""

    def __init__(self, checkpoint: Checkpoint, form: str, dtype: torch.dtype, device: torch.device, rank: int = 0, tp: int = 1):
        self._checkpoint, self._form = checkpoint, form
        self.dtype, self.device, self.rank, self.tp = dtype, device, rank, tp

    def vector(self, name: str) -> torch.Tensor:
        """All of a vector."""
        return self._read(name).to(self.device, self.dtype)

    def outputs(self, *parts: tuple[str, int], bias: bool = False) -> Matrix:
        """Matrices under each other of which each rank has some outputs: (name, in how many parts it is cut). Where these are fewer
        than the ranks, several ranks have the same.
        """
        values = torch.cat([self._share(f"{name}.weight", pieces) for name, pieces in parts])
        added = torch.cat([self._share(f"{name}.bias", pieces) for name, pieces in parts]) if bias else None
        return self._stored(values, added)

    def whole(self, name: str) -> Matrix:
        """A small matrix that every rank has all of, and that is not quantised."""
        return Matrix(self._read(f"{name}.weight").to(self.device, self.dtype), "", None)

    def fused(self, name: str, heads: int, kv_heads: int, size: int, *, bias: bool = False) -> Matrix:
        """As `outputs`, of one matrix that holds, for each KV head, the rows of its queries, its keys and its values."""

        def share(values: torch.Tensor) -> torch.Tensor:
            grouped = values.view(kv_heads, heads // kv_heads + 2, size, -1)
            parts = grouped[:, :-2].reshape(heads * size, -1), grouped[:, -2].reshape(kv_heads * size, -1), grouped[:, -1]
            found = [
                self._cut(part.reshape(-1, part.shape[-1]), cut)
                for part, cut in zip(parts, (heads, kv_heads, kv_heads), strict=True)
            ]
            return torch.cat(found)

        weight = share(self._read(f"{name}.weight"))
        added = share(self._read(f"{name}.bias")).view(-1) if bias else None
        return self._stored(weight, added)

    def inputs(self, name: str, *, bias: bool = False) -> Matrix:
        """A matrix of which each rank has some inputs: the ranks' products are to be added up. The first rank has the bias."""
        whole = self._read(f"{name}.weight")
        width = whole.shape[1] // self.tp
        added = self._read(f"{name}.bias") if bias and self.rank == 0 else None
        return self._stored(whole[:, self.rank * width : (self.rank + 1) * width], added)

    def vocabulary(self, name: str) -> Matrix:
        """A matrix with a row for each token, of which each rank has as many; the last one's may be fewer. Not quantised."""
        whole = self._read(name)
        height = -(-len(whole) // self.tp)
        return Matrix(whole[self.rank * height : (self.rank + 1) * height].to(self.device, self.dtype), "", None)

    def _read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint. One that a benchmark makes on the device stays there."""
        return torch.as_tensor(self._checkpoint.read(name))

    def _share(self, name: str, pieces: int) -> torch.Tensor:
        return self._cut(self._read(name), pieces)

    def _cut(self, whole: torch.Tensor, pieces: int) -> torch.Tensor:
        cut = min(pieces, self.tp)  # fewer KV heads than ranks: neighbours have the same
        height, place = len(whole) // cut, self.rank * cut // self.tp
        return whole[place * height : (place + 1) * height]

    def _stored(self, values: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        kind = torch.float32 if self._form in QUANTISED else self.dtype
        added = None if bias is None else bias.to(self.device, self.dtype)
        return Matrix(values.to(self.device, kind), self._form, added)
