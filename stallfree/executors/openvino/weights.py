"""From a checkpoint's float32 tensors to constants of an OpenVINO graph, in the wanted number format; and its inputs.

Tensors pass one at a time, so the whole float32 model is never in memory. It knows number formats and nothing of transformers.
"""

import numpy as np
import openvino as ov
from numpy.typing import ArrayLike, DTypeLike
from openvino import opset13 as ops

from stallfree.checkpoint import Checkpoint, ModelConfig

FORMATS = ("int8", "bf16", "f32")

GROUPS = (64, 96, 32)
"""Widths of quantisation groups, the preferred first; docs/log.md has the measurements."""


def quantisation_group(config: ModelConfig) -> int:
    """How many inputs of an int8 matrix, and of the activations before it, share a scale: the first of `GROUPS` that divides the
    width of every matrix. 0 if none does: then each output channel has one scale, and products are float."""
    widths = (config.hidden_size, config.num_heads * config.head_dim, config.ffn_size)
    return next((group for group in GROUPS if not any(width % group for width in widths)), 0)


class Weights:
    """The tensors of `checkpoint` as graph nodes of type float32. Matrices are stored as `form`, vectors as float32.

    int8 is symmetric: round(w / s), with one scale s = max|w| / 127 for each `group` of an output channel's weights, or for all of
    them (`group` 0).
    """

    def __init__(self, checkpoint: Checkpoint, form: str, group: int) -> None:
        self._checkpoint, self._form, self._group = checkpoint, form, group
        self._shared: dict[tuple[str, ...], ov.Node] = {}

    def vector(self, *names: str) -> ov.Node:
        """The concatenation of vectors, [out] float32; or of matrices that stay exact, [out, in]."""
        return constant(np.concatenate([self._checkpoint.read(name) for name in names]))

    def matrix(self, *names: str) -> ov.Node:
        """The rows of several matrices, one below the other, [out, in]. The same names give the same node."""
        if names not in self._shared:
            self._shared[names] = self._stored(np.concatenate([self._checkpoint.read(name) for name in names]))
        return self._shared[names]

    def _stored(self, values: np.ndarray) -> ov.Node:
        if self._form == "f32":
            return constant(values)
        if self._form == "bf16":
            stored = ov.op.Constant(ov.Tensor(bfloat16(values), list(values.shape), ov.Type.bf16), shared_memory=False)
            return ops.convert(stored, np.float32)
        grouped = values.reshape(len(values), -1, self._group) if self._group else values
        scale = np.maximum(np.abs(grouped).max(axis=-1, keepdims=True) / 127, np.float32(1e-12))
        quantised = constant(np.rint(grouped / scale).astype(np.int8))
        restored = ops.multiply(ops.convert(quantised, np.float32), constant(scale))
        return ops.reshape(restored, constant(values.shape, np.int64), False) if self._group else restored


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, as uint16: to nearest, ties to even. A bfloat16 is the upper half of a float32."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def constant(values: ArrayLike, kind: DTypeLike | None = None) -> ov.Node:
    """A graph constant with its own copy of `values`, because it may live longer than numpy's memory."""
    return ov.op.Constant(np.asarray(values, kind, order="C"), shared_memory=False)


def parameter(name: str, shape: object, kind: object) -> ov.op.Parameter:
    """A graph's input under its name."""
    node = ops.parameter(shape, kind, name)
    node.output(0).get_tensor().set_names({name})
    return node
