"""The graph with adapters, and a working copy of the weights that an iteration needs, in the order in which the graph takes them.

Adapters that stay from one iteration to the next are not touched. One that enters is copied from its KV blocks (0.5 ms for 1.8 MB),
and one that leaves makes room for it. It knows no files and no requests.

Iterations without adapters use the graph that has none. One graph for both would do, with matrices of no ranks: the logits are the
same, but 16 decodes took 1.03 times as long. The second graph of a model with 135 million int8 weights takes 266 MB, because the
runtime packs weights for each graph, and 2.0 s to compile; iterations take 1.8 times as long meanwhile. Then, against 16 decodes
without adapters at 512 tokens of context: 1.09 times with one adapter of rank 8 on attention, 1.23 times with sixteen (two cores of
a Zen 4 EPYC).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import openvino as ov

from stallfree.checkpoint.adapter import MODULES, Adapter
from stallfree.executors.openvino.deltas import UNIT, Group, groups
from stallfree.executors.openvino.graph import INPUTS
from stallfree.executors.openvino.memory import huge_pages
from stallfree.executors.openvino.recipe import Recipe
from stallfree.executors.openvino.weights import bfloat16


def packed_bytes(adapter: Adapter, kind: ov.Type) -> int:
    """The bytes that an adapter takes in KV blocks."""
    numbers = sum(out + inner for out, inner in (adapter.shapes[module] for module in adapter.modules))
    return len(adapter.pairs) * adapter.rank * numbers * int(kind.size)


def pack(adapter: Adapter, kind: ov.Type, num_bytes: int) -> np.ndarray:
    """The weights in `num_bytes` bytes: of each module, A [layers, rank, in] and B [layers, rank, out] in the type `kind`. Zeros
    fill the rest. Raises as `Adapter.read` does."""
    memory = np.zeros(num_bytes, np.uint8)
    views = {module: halves for module, *halves in unpacked(memory, adapter, kind)}
    for module, layers in adapter.parts():
        a, b = adapter.read(module, layers)
        for view, values in zip(views[module], (a, b.transpose(0, 2, 1)), strict=True):
            view[layers.start : layers.stop] = bfloat16(values) if kind == ov.Type.bf16 else values
    return memory


def unpacked(memory: np.ndarray, adapter: Adapter, kind: ov.Type) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Views of a pack: each module, its A [layers, rank, in] and its B [layers, rank, out]. A bfloat16 is a uint16."""
    values, at = memory[: packed_bytes(adapter, kind)].view(_number(kind)), 0
    for module in MODULES:
        if module in adapter.modules:
            halves = []
            for width in reversed(adapter.shapes[module]):
                shape = (len(adapter.pairs), adapter.rank, width)
                halves.append(values[at : at + int(np.prod(shape))].reshape(shape))
                at += int(np.prod(shape))
            yield module, halves[0], halves[1]


def _number(kind: ov.Type) -> type[np.uint16] | type[np.float32]:
    return np.uint16 if kind == ov.Type.bf16 else np.float32


@dataclass(frozen=True, eq=False, slots=True)
class Loaded:
    """An adapter whose weights are in KV blocks. It is equal only to itself: one that is loaded again is another."""

    adapter: Adapter
    blocks: tuple[int, ...]


class AdaptedGraph:
    """A graph that adds adapters to `modules`, over the KV `cache` that it shares with the graph without. `read` gives the pack of
    a loaded adapter."""

    def __init__(
        self, recipe: Recipe, modules: Collection[str], cache: Sequence[ov.Tensor], read: Callable[[Loaded], np.ndarray]
    ) -> None:
        config = recipe.config
        self.modules = frozenset(modules)
        self._groups = groups(config, modules)
        compiled = recipe.compiled(self._groups)
        self.request = compiled.create_infer_request()
        for tensor, i in zip(cache, compiled.inputs[len(INPUTS) :], strict=False):
            self.request.set_tensor(i, tensor)
        self._copy = WorkingCopy(self._groups, config.num_layers, recipe.compute, read)

    def arranged(self, rows: Sequence[Loaded | None], counts: Sequence[int]) -> dict[str, np.ndarray]:
        """Take the adapters of `rows`: for each piece of work, its adapter and the number of its tokens. Returns the inputs that
        say which token has which adapter; the others are set."""
        self._copy.arrange([loaded for loaded in dict.fromkeys(rows) if loaded is not None])
        for name, tensor in self._copy.tensors():
            self.request.set_tensor(name, tensor)
        own = self._copy.own(rows, counts)
        return {f"own.{n}": np.repeat(own, n * UNIT, axis=0) for n in {len(group.modules) for group in self._groups}}


class WorkingCopy:
    """Buffers for each group: A [layers, units, modules, UNIT, inputs] and B [layers, units, modules, UNIT, outputs]; a row of B is
    zero outside of its module. The first units are in use, each by one adapter."""

    def __init__(self, groups: Sequence[Group], num_layers: int, kind: ov.Type, read: Callable[[Loaded], np.ndarray]) -> None:
        self._groups, self._num_layers, self._kind, self._read = groups, num_layers, kind, read
        self._owners: list[Loaded] = []
        self._buffers: dict[Group, tuple[np.ndarray, np.ndarray]] = {}
        self._room = self._shown = 0

    def arrange(self, wanted: Sequence[Loaded]) -> None:
        """Have the adapters `wanted`, and no others."""
        present, stay = set(self._owners), set(wanted)
        if present == stay:
            return
        free = [unit for unit, owner in enumerate(self._owners) if owner not in stay]
        entering = [(loaded, -(-loaded.adapter.rank // UNIT)) for loaded in wanted if loaded not in present]
        self._grow(len(self._owners) - len(free) + sum(count for _, count in entering))
        for loaded, count in entering:
            units, free = free[:count], free[count:]
            for unit in units:
                self._owners[unit] = loaded
            end = len(self._owners) + count - len(units)
            units += range(len(self._owners), end)
            self._owners += [loaded] * (end - len(self._owners))
            self._enter(loaded, units)
        self._close(free)

    def own(self, rows: Sequence[Loaded | None], counts: Sequence[int]) -> np.ndarray:
        """Which units, [units], belong to the adapter of each token, [tokens]. `rows` has that of each piece of work."""
        numbers = {loaded: number for number, loaded in enumerate(dict.fromkeys(self._owners))}
        units = np.full(shown(len(self._owners)), -1)
        units[: len(self._owners)] = [numbers[owner] for owner in self._owners]
        tokens = np.repeat([-2 if loaded is None else numbers[loaded] for loaded in rows], counts)
        result: np.ndarray = units[:, None] == tokens
        return result

    def tensors(self) -> Iterator[tuple[str, ov.Tensor]]:
        """The graph's inputs that are not the same as in the last call, by name. Their memory is this object's."""
        if (units := shown(len(self._owners))) == self._shown:
            return
        self._shown = units
        for group, halves in self._buffers.items():
            for half, buffer in zip("AB", halves, strict=True):
                for layer in range(self._num_layers):
                    values = buffer[layer, :units]
                    shape = [units * len(group.modules) * UNIT, buffer.shape[-1]]
                    yield group.input(layer, half), ov.Tensor(values, shape, self._kind)

    def _enter(self, loaded: Loaded, units: list[int]) -> None:
        """Copy an adapter from its blocks. What it has no weights for is zero."""
        halves = {module: pair for module, *pair in unpacked(self._read(loaded), loaded.adapter, self._kind)}
        for group, (a, b) in self._buffers.items():
            a[:, units], b[:, units] = 0, 0
            for place, (module, begin, end) in enumerate(zip(group.modules, group.begins, group.ends, strict=True)):
                if module in halves:
                    _scatter(a[:, :, place], units, halves[module][0])
                    _scatter(b[:, :, place, :, begin:end], units, halves[module][1])

    def _close(self, free: Sequence[int]) -> None:
        """Move the last units into those that nobody uses."""
        used, unused = len(self._owners) - len(free), set(free)
        gaps = [unit for unit in free if unit < used]
        moved = [unit for unit in range(used, len(self._owners)) if unit not in unused]
        if gaps:
            for buffer in chain.from_iterable(self._buffers.values()):
                buffer[:, gaps] = buffer[:, moved]
        for gap, unit in zip(gaps, moved, strict=True):
            self._owners[gap] = self._owners[unit]
        del self._owners[used:]

    def _grow(self, units: int) -> None:
        """Have room for `units`."""
        if (room := shown(units)) <= self._room:
            return
        number = _number(self._kind)
        for group in self._groups:
            halves = []
            for half, width in enumerate((group.inputs, group.outputs)):
                shape = (self._num_layers, room, len(group.modules), UNIT, width)
                values = huge_pages(int(np.prod(shape)) * int(self._kind.size)).view(number).reshape(shape)
                if self._room:
                    values[:, : self._room] = self._buffers[group][half]
                halves.append(values)
            self._buffers[group] = halves[0], halves[1]
        self._room, self._shown = room, 0


def shown(units: int) -> int:
    """The units that the graph computes when `units` are in use: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... The runtime compiles kernels for
    each number, so that there should be few."""
    power = 1 << (units - 1).bit_length()
    between = 3 * power // 4
    return between if units <= between else power


def _scatter(target: np.ndarray, units: list[int], source: np.ndarray) -> None:
    """Copy `source` [layers, rank, width] into `units` of `target` [layers, units, UNIT, width]."""
    layers, rank, width = source.shape
    whole = rank // UNIT
    target[:, units[:whole]] = source[:, : whole * UNIT].reshape(layers, whole, UNIT, width)
    if rank % UNIT:
        target[:, units[whole], : rank % UNIT] = source[:, whole * UNIT :]
