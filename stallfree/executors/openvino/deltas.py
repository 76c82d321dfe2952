"""Adapters in the graph: each fused product y = x W^T becomes y + h B, with h = x A^T of the row's own adapter.

The matrices of all adapters of an iteration lie end to end along their ranks, and one product computes them all. For each row, a
selection keeps the columns of h that belong to the row's adapter, and sets the others to zero. So ranks may differ, and each
adapter's weights are read once, however many rows it has. It knows nothing of where the matrices come from.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import openvino as ov
from openvino import opset13 as ops

from stallfree.checkpoint import ModelConfig
from stallfree.checkpoint.adapter import module_shapes
from stallfree.executors.openvino.weights import parameter

UNIT = 8
"""Ranks that are stored, moved and computed together. An adapter takes whole units, so at most seven ranks are wasted."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Modules that the graph computes in one product, because they read the same input."""


class Group(NamedTuple):
    """The modules of a fused product that adapters change. `inputs`: columns of A. `outputs`: columns of B, those of the whole
    fused product; the outputs of each of `modules` begin at its entry of `begins`, and end at that of `ends`."""

    modules: tuple[str, ...]
    inputs: int
    outputs: int
    begins: tuple[int, ...]
    ends: tuple[int, ...]

    def input(self, layer: int, half: str) -> str:
        """The name of the graph's input for A or B."""
        return f"adapters.{layer}.{self.modules[0]}.{half}"


def groups(config: ModelConfig, modules: Collection[str]) -> list[Group]:
    """The groups of each layer, if adapters change `modules`."""
    shapes, found = module_shapes(config), []
    for fused in (fused for fused in FUSED if fused[0] in shapes):
        ends = [sum(shapes[name][0] for name in fused[: i + 1]) for i in range(len(fused))]
        spans = {name: (end - shapes[name][0], end) for name, end in zip(fused, ends, strict=True) if name in modules}
        if spans:
            begins, ends_of = zip(*spans.values(), strict=True)
            found.append(Group(tuple(spans), shapes[fused[0]][1], ends[-1], begins, ends_of))
    return found


class Deltas:
    """Adds the adapters' products to a graph that computes in `kind`. `parameters`: the inputs that this takes, of type `kind`: for
    each layer and group, A [ranks, inputs] and B [ranks, outputs]; a rank is one of a module's, so that a group of three modules
    has three for each rank of an adapter. For each number of modules in a group, `own` [ranks, tokens] says with booleans which
    ranks belong to the adapter of a token."""

    def __init__(self, groups: Sequence[Group], kind: ov.Type) -> None:
        self._groups = {module: group for group in groups for module in group.modules}
        self._kind = kind
        self.parameters: dict[str, ov.op.Parameter] = {}

    def added(self, y: ov.Node, x: ov.Node, names: Sequence[str]) -> ov.Node:
        """`y`, the fused product of `x` with the matrices `names`, plus what adapters add."""
        group = next((self._groups[m] for name in names if (m := name.rpartition(".")[2]) in self._groups), None)
        if group is None:
            return y
        layer = int(names[0].split(".")[2])
        a = self._input(group.input(layer, "A"), [-1, group.inputs], self._kind)
        b = self._input(group.input(layer, "B"), [-1, group.outputs], self._kind)
        own = self._input(f"own.{len(group.modules)}", [-1, -1], ov.Type.boolean)
        # A comes first: the runtime reads the first matrix as it lies, and reorders the second, which here is the small one.
        h = ops.matmul(a, ops.convert(x, self._kind), False, True)
        h = ops.select(own, h, ov.op.Constant(self._kind, ov.Shape([]), [0.0]))
        return ops.add(y, ops.convert(ops.matmul(h, b, True, False), ov.Type.f32))

    def _input(self, name: str, shape: list[int], kind: ov.Type) -> ov.op.Parameter:
        if name not in self.parameters:
            self.parameters[name] = parameter(name, shape, kind)
        return self.parameters[name]
