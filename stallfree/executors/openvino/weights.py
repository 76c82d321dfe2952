"""From a checkpoint's tensors to constants of an OpenVINO graph, in the wanted number format, and products with them; and its
inputs.

Tensors pass one at a time, so the whole float32 model is never in memory. It knows number formats and nothing of transformers.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
import openvino as ov
from numpy.typing import ArrayLike, DTypeLike
from openvino import opset13 as ops

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.executors.openvino.kept import Kept
from stallfree.executors.openvino.stored import Stored, eight_bits, own_bits

FORMATS = ("file", "int8", "bf16", "f32")

GROUPS = (64, 96, 32)
"""Widths of quantisation groups, the preferred first; docs/log.md has the measurements."""
OWN_GROUP = 32
"""How many activations share a scale before matrices that keep the file's own codes, whose groups have 32 weights or a multiple."""


def quantisation_group(config: ModelConfig) -> int:
    """How many inputs of an int8 matrix, and of the activations before it, share a scale: the first of `GROUPS` that divides the
    width of every matrix. 0 if none does: then each output channel has one scale, and products are float."""
    widths = (config.hidden_size, config.num_heads * config.head_dim, config.ffn_size)
    return next((group for group in GROUPS if not any(width % group for width in widths)), 0)


class Weights:
    """The tensors of `checkpoint` as graph nodes of type float32. Matrices are stored as `form`, vectors as float32.

    int8 is symmetric: round(w / s), with one scale s = max|w| / 127 for each `group` of an output channel's weights, or for all of
    them (`group` 0). "file" keeps the codes of the matrices that have 4 or 8 bits in the file; the others become int8. What is
    converted is `kept` in a file, if one is given, and read from there the next time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        form: str,
        group: int,
        kept: Kept | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        self._checkpoint, self._form, self._group, self._kept, self._progress = checkpoint, form, group, kept, progress
        self._done, self._of = 0, sum(len(shape) == 2 for shape in checkpoint.config.tensors().values())
        self._shared: dict[tuple[str, ...], ov.Node] = {}
        self._own: dict[tuple[str, ...], tuple[ov.Node, ov.Node | None]] = {}
        self._made: dict[tuple[str, ...], Stored] = {}
        """What constants are made from: their memory does not belong to them, and another graph needs them again."""

    def vector(self, *names: str) -> ov.Node:
        """The concatenation of vectors, [out] float32; or of matrices that stay exact, [out, in]."""
        return constant(self.numbers(*names))

    def matrix(self, *names: str) -> ov.Node:
        """The rows of several matrices, one below the other, [out, in], of which rows are looked up. The same names give the same
        node."""
        if names not in self._shared:
            self._shared[names] = self._dense(names)
        return self._shared[names]

    def product(self, x: ov.Node, names: Sequence[str]) -> ov.Node:
        """The products of `x` [tokens, in] with the rows of several matrices, one below the other: [tokens, out]."""
        parts = [self._own_product(x, run, form) for run, form in self._runs(names)]
        return parts[0] if len(parts) == 1 else ops.concat(parts, 1)

    def stored(self, names: Sequence[str]) -> list[Stored]:
        """What `product` multiplies with, for weights of 8 or 4 bits."""
        return [self._own_stored(run) if form else self._eight_bits(run) for run, form in self._runs(names)]

    def numbers(self, *names: str) -> np.ndarray:
        """The concatenation of vectors, [out] float32."""
        return np.concatenate([self._checkpoint.read(name) for name in names])

    def _runs(self, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], str]]:
        """Matrices side by side that have one form of codes in a product, and this form; "" if they are dense."""
        if self._form != "file":
            yield tuple(names), ""
            return
        for form, run in groupby(names, self._codes):
            yield tuple(run), form

    def _rows(self, names: Sequence[str]) -> np.ndarray:
        """The rows of several matrices, one below the other. A single one, which may have gigabytes, is not copied."""
        parts = [self._checkpoint.read(name) for name in names]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _codes(self, name: str) -> str:
        """The form of the codes in the file that a product can use; "" if there are none, or if rows of the matrix are looked
        up."""
        return "" if (name,) in self._shared else self._checkpoint.codes.get(name, "")

    def _own_product(self, x: ov.Node, names: tuple[str, ...], form: str) -> ov.Node:
        if not form:
            return ops.matmul(x, self.matrix(*names), False, True)
        stored = self._own_stored(names)
        if names not in self._own:
            least = None
            if stored.least is not None and stored.least_scales is not None:
                least = self._node(Stored(stored.least, stored.least_scales))
            self._own[names] = self._node(stored), least
        weights, least = self._own[names]
        y = ops.matmul(x, weights, False, True)
        if least is None:
            return y
        _, groups, width = stored.shape
        sums = ops.reduce_sum(ops.reshape(x, constant([-1, groups, width], np.int64), False), constant([2], np.int64), False)
        return ops.add(y, ops.matmul(sums, least, False, True))

    def _dense(self, names: tuple[str, ...]) -> ov.Node:
        if self._form == "f32":
            return constant(self._rows(names))
        if self._form == "bf16":
            numbers = self._rows(names)
            stored = ov.op.Constant(ov.Tensor(bfloat16(numbers), list(numbers.shape), ov.Type.bf16), shared_memory=False)
            return ops.convert(stored, np.float32)
        return self._node(self._eight_bits(names))

    def _eight_bits(self, names: tuple[str, ...]) -> Stored:
        return self._stored(names, lambda: eight_bits(self._rows(names), self._group))

    def _own_stored(self, names: tuple[str, ...]) -> Stored:
        return self._stored(names, lambda: own_bits([self._checkpoint.blocks(name) for name in names]))

    def _stored(self, names: tuple[str, ...], make: Callable[[], Stored]) -> Stored:
        """What `make` gives, from the file that keeps it, if there is one; made once."""
        if names not in self._made:
            self._made[names] = self._converted("+".join(names), make)
            self._done += len(names)
            if self._kept is None or not self._kept.whole:
                self._progress(self._done, self._of)
        return self._made[names]

    def _converted(self, name: str, make: Callable[[], Stored]) -> Stored:
        if self._kept is None:
            return make()
        parts = {field: self._kept.get(f"{name}:{field}") for field in Stored._fields}
        if parts["codes"] is None:
            kept, made = self._kept, make()._asdict()
            parts = {field: None if part is None else kept.put(f"{name}:{field}", part) for field, part in made.items()}
        return Stored(**parts)  # type: ignore[arg-type]  # with codes there are scales

    def _node(self, stored: Stored) -> ov.Node:
        """[..., out, in] float32, restored from its codes by the products that use it."""
        shape = stored.shape
        kind = ov.Type.i4 if stored.zeros is None else ov.Type.u4
        kind = {np.dtype(np.int8): ov.Type.i8, np.dtype(np.uint16): ov.Type.f4e2m1}.get(stored.codes.dtype, kind)
        memory = stored.codes.view(np.uint8) if kind == ov.Type.f4e2m1 else stored.codes
        codes = ov.op.Constant(ov.Tensor(memory, list(shape), kind), shared_memory=True)
        restored = ops.convert(codes, np.float32)
        if stored.zeros is not None:
            restored = ops.subtract(restored, ops.convert(self._array(stored.zeros), np.float32))
        restored = ops.multiply(restored, self._array(stored.scales))
        return ops.reshape(restored, constant([*shape[:-2], shape[-2] * shape[-1]], np.int64), False)

    @staticmethod
    def _array(values: np.ndarray) -> ov.Node:
        return ov.op.Constant(values, shared_memory=True)


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
