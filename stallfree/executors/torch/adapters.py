"""The adapters that are loaded on this rank: how their weights lie in KV blocks, and which rows of a batch use which.

In each layer, an adapter has the same blocks. Their bytes are lines of `Packing.line` numbers. A row of A, and a column of B, is a
vector of whole lines. So any mix of ranks is read without padding (S-LoRA, Sheng et al. 2023, arXiv 2311.03285, section 5). This
module does not know how the products are computed (`lora` does), or when an adapter comes and goes.
"""

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import numpy as np
import torch

from stallfree.checkpoint import CheckpointError, ModelConfig
from stallfree.checkpoint.adapter import MAX_RANK, MODULES, Adapter, module_shapes
from stallfree.core.plan import Work
from stallfree.executors.torch.attention import Cache
from stallfree.executors.torch.batch import upload
from stallfree.executors.torch.weights import cut

BLOCK = 16
"""Tokens of a KV block."""
LINE = 128
"""The most numbers of a line: two lines of memory in bf16."""
SLOTS = 4096
"""The most adapters that are loaded at once. Besides its blocks, each takes a table of all blocks that an adapter can have."""
RUN = 64
"""The most rows of a run, if there are prompts. Decodes have runs of one row."""
SITES = {"qkv": (0, 3), "output": (3, 4), "up": (4, 6), "down": (6, 7)}
"""The modules that read the same input, as a part of `MODULES`. Their outputs are side by side."""
ADAPTABLE = ("llama", "mistral", "qwen2", "qwen3")
"""The families whose layers apply adapters."""
INWARD = ("o_proj", "down_proj")
"""Modules of which each rank has some inputs; of the others, some outputs."""


class Site(NamedTuple):
    """The modules of `MODULES` from number `first` on: their input's width, and the widths of their outputs, on this rank."""

    first: int
    inner: int
    outs: tuple[int, ...]


class Packing:
    """The places of an adapter's weights within its blocks, in a layer of a model of `config`. Rank `rank` of `tp` stores KV in
    numbers of `kv_bytes` bytes, and adapters in `dtype`.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kv_bytes: int, rank: int = 0, tp: int = 1):
        kv_heads = max(1, config.num_kv_heads // tp)
        self.dtype, self._rank, self._tp, self._family = dtype, rank, tp, config.family
        self.piece = BLOCK * kv_heads * config.head_dim * kv_bytes // dtype.itemsize
        """Numbers that the keys, or the values, of a block hold in a layer."""
        self.line = gcd(self.piece, LINE)
        query = config.num_heads * config.head_dim // tp
        self._cuts = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
        outs = {"q_proj": query, "k_proj": kv_heads * config.head_dim, "v_proj": kv_heads * config.head_dim}
        self.shapes = {
            module: (out, inner // tp) if module in INWARD else (outs.get(module, out // tp), inner)
            for module, (out, inner) in module_shapes(config).items()
        }
        self.sites = {
            name: Site(first, self.shapes[MODULES[first]][1], tuple(self.shapes[module][0] for module in MODULES[first:end]))
            for name, (first, end) in SITES.items()
            if MODULES[first] in self.shapes
        }

    def blocks(self, adapter: Adapter) -> int:
        """The KV blocks that the adapter takes. Raises ValueError for a family without adapters, and for too large a rank."""
        if self._family not in ADAPTABLE:
            raise ValueError(f"the torch executor runs no adapters of {self._family}, only of {', '.join(ADAPTABLE)}")
        if adapter.rank > MAX_RANK:
            raise ValueError(f"{adapter.path}: rank {adapter.rank}; the torch executor runs adapters of at most {MAX_RANK}")
        return self._needed(adapter.rank, adapter.modules)

    @property
    def most(self) -> int:
        """The KV blocks of the largest adapter."""
        return self._needed(MAX_RANK, self.shapes)

    def starts(self, adapter: Adapter) -> list[int]:
        """The first lines of A and of B of each module, or -1 twice for a module that the adapter does not change."""
        starts, line = [], 0
        for module in MODULES:
            if module not in adapter.modules:
                starts += [-1, -1]
                continue
            out, inner = self.shapes[module]
            starts += [line, line + adapter.rank * self.lines(inner)]
            line += adapter.rank * (self.lines(inner) + self.lines(out))
        return starts

    def lines(self, width: int) -> int:
        """The lines of a vector."""
        return -(-width // self.line)

    def pack(self, adapter: Adapter, layer: int) -> torch.Tensor:
        """This rank's part of the adapter's weights in a layer: what its blocks' keys hold, and their values, [2, blocks, piece].
        Raises as `Adapter.read` does.
        """
        packed = np.zeros((2, self.blocks(adapter), self.piece), np.float32)
        flat, at = packed.reshape(-1, self.line), 0
        for module in (module for module in MODULES if module in adapter.modules):
            (a,), (b,) = adapter.read(module, range(layer, layer + 1))
            for part, width in enumerate(reversed(self.shapes[module])):
                lines = self.lines(width) * adapter.rank
                flat[at : at + lines].reshape(adapter.rank, -1)[:, :width] = self._share(module, (a, b), part)
                at += lines
        return torch.from_numpy(packed).to(self.dtype)

    def _share(self, module: str, weights: tuple[np.ndarray, np.ndarray], part: int) -> np.ndarray:
        """This rank's part of A or of the transpose of B, [rank of the adapter, width]."""
        if (part == 0) != (module in INWARD):
            return weights[0] if part == 0 else weights[1].T
        return cut(weights[part].T if part == 0 else weights[part], self._cuts.get(module, self._tp), self._rank, self._tp).T

    def _needed(self, rank: int, modules: Collection[str]) -> int:
        lines = rank * sum(self.lines(width) for module in modules for width in self.shapes[module])
        return -(-lines * self.line // (2 * self.piece))


@dataclass(frozen=True, slots=True)
class Adapted:
    """The rows of a batch with adapters, as E runs of neighbouring rows with the same one.

    `runs` [3, E]: first row, number of rows (at most `height`), and slot (-1: no adapter). `metas` [slots, ...]: an adapter's rank,
    number of blocks, and `Packing.starts`. `tables` [slots, blocks]: its block numbers. `rank`: the largest of any adapter.
    `changed`: the names of the sites that any adapter changes.
    """

    packing: Packing
    runs: torch.Tensor
    metas: torch.Tensor
    tables: torch.Tensor
    height: int
    rank: int
    changed: frozenset[str]


class Loaded(NamedTuple):
    slot: int
    rank: int
    sites: frozenset[str]


class Adapters:
    """The adapters that are loaded for `layers`, by key."""

    def __init__(self, packing: Packing, layers: range, device: torch.device):
        self._packing, self._layers, self._device = packing, layers, device
        self._metas = torch.zeros(SLOTS, 2 + 2 * len(MODULES), dtype=torch.int64, device=device)
        self._tables = torch.zeros(SLOTS, packing.most, dtype=torch.int32, device=device)
        self._free = list(range(SLOTS))
        self._loaded: dict[str, Loaded] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._loaded

    def load(self, key: str, adapter: Adapter, blocks: Sequence[int], caches: Sequence[Cache]) -> None:
        """Read the adapter and write it into `blocks` of the layers' `caches`, while iterations run. Raises as `Adapter.read` does,
        and CheckpointError if the adapter needs other blocks than these.
        """
        if len(blocks) != self._packing.blocks(adapter):
            needed = self._packing.blocks(adapter)
            raise CheckpointError(f"{adapter.path}: the adapter takes {needed} KV blocks and got {len(blocks)}; load it again")
        if not self._free:
            raise CheckpointError(f"{adapter.path}: {SLOTS:,} adapters are loaded, the most at once; serve fewer at a time")
        aside = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        slot = self._free.pop()
        try:
            with torch.inference_mode(), nullcontext() if aside is None else torch.cuda.stream(aside):
                if aside is not None:  # an earlier plan may still write for the earlier owner of the blocks
                    aside.wait_stream(torch.cuda.default_stream(self._device))
                self._write(slot, adapter, blocks, caches)
                if aside is not None:
                    aside.synchronize()
        except BaseException:
            self._free.append(slot)
            raise
        sites = frozenset(name for name, (a, b) in SITES.items() if adapter.modules & set(MODULES[a:b]))
        self.drop(key)
        self._loaded[key] = Loaded(slot, adapter.rank, sites)

    def drop(self, key: str) -> None:
        loaded = self._loaded.pop(key, None)
        if loaded is not None:
            self._free.append(loaded.slot)

    def of(self, work: Sequence[Work]) -> Adapted | None:
        """The rows of a batch of `work` with adapters; None if there are none. If all work is decodes, each row is a run."""
        loaded = [self._loaded[w.adapter] for w in work if w.adapter]
        if not loaded:
            return None
        if all(w.count == 1 for w in work):
            slots = [self._loaded[w.adapter].slot if w.adapter else -1 for w in work]
            runs, height = [list(range(len(work))), [1] * len(work), slots], 1
        else:
            runs, height = self._runs(work), RUN
        changed = frozenset[str]().union(*(adapter.sites for adapter in loaded))
        rank = max(adapter.rank for adapter in loaded)
        return Adapted(self._packing, upload(runs, self._device), self._metas, self._tables, height, rank, changed)

    def decodes(self, number: int) -> Adapted:
        """The rows of a batch of `number` decodes, none with an adapter, for any adapters to come."""
        runs = torch.stack([torch.arange(number), torch.ones(number, dtype=torch.int64), torch.full((number,), -1)])
        sites = frozenset(self._packing.sites)
        return Adapted(self._packing, runs.to(self._device), self._metas, self._tables, 1, MAX_RANK, sites)

    def _runs(self, work: Sequence[Work]) -> list[list[int]]:
        runs: list[list[int]] = [[], [], []]
        row, last = 0, ""
        for w in work:
            slot = self._loaded[w.adapter].slot if w.adapter else -1
            begin = row
            if w.adapter and w.adapter == last and runs[1][-1] < RUN:  # the previous run goes on
                more = min(w.count, RUN - runs[1][-1])
                runs[1][-1] += more
                begin += more
            row += w.count
            last = w.adapter
            if w.adapter:
                for first in range(begin, row, RUN):
                    for column, number in zip(runs, (first, min(RUN, row - first), slot), strict=True):
                        column.append(number)
        return runs

    def _write(self, slot: int, adapter: Adapter, blocks: Sequence[int], caches: Sequence[Cache]) -> None:
        table = upload(list(blocks), self._device)
        for cache, layer in zip(caches, self._layers, strict=True):
            packed = self._packing.pack(adapter, layer)
            if self._device.type == "cuda":
                packed = packed.pin_memory()
            for pages, part in zip(cache, packed, strict=True):
                pages.view(torch.uint8).flatten(1)[table] = part.to(self._device, non_blocking=True).view(torch.uint8)
        self._metas[slot] = upload([adapter.rank, len(blocks), *self._packing.starts(adapter)], self._device)
        self._tables[slot, : len(blocks)] = table
