"""What LoRA adapters add to the iterations of a device, and what room they take: for each module of a layer two small products, in
kernels that read the weights of every adapter in the batch once (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285).

It knows dimensions and bytes. It does not know which requests have which adapter: an iteration's shape has the sum of their ranks.
"""

from math import ceil

from stallfree.core.nearest import nearest
from stallfree.perf.hardware import Hardware
from stallfree.perf.shape import Sharded

MODULES = {"attention": ("qkv", "output"), "all": ("qkv", "output", "up", "down")}
"""The matrices of a layer that adapters change, as `Sharded.layer` names them."""
PARTS = {"qkv": 3, "output": 1, "up": 2, "down": 1}
"""The modules in each of these matrices. Each has its own pair of products."""

BYTES = 2.0
"""Of a number in an adapter's weights."""

SHARE = 0.6
"""The share of the bandwidth that these kernels reach. Assumed: they read strips of few rows."""


class Adapters:
    """Adapters on `modules` (of `MODULES`) of the model that is `sharded` over such devices. Each of their kernels takes
    `kernel_s` besides the time of its bytes. Raises ValueError for modules that are not known."""

    def __init__(self, device: Hardware, sharded: Sharded, modules: str, kernel_s: float):
        if modules not in MODULES:
            raise ValueError(f"--adapter-modules {modules!r} is unknown{nearest(modules, MODULES)}; known: {', '.join(MODULES)}")
        self._bandwidth, self._kernel_s = SHARE * device.bandwidth, kernel_s
        self._sides: list[tuple[float, float]] = []  # inputs and outputs of each module, as one device holds them
        for matrix in sharded.layer():
            if matrix.name in MODULES[modules]:
                parts = PARTS[matrix.name]
                self._sides += [(float(matrix.columns), matrix.rows / parts)] * parts
        self._layers, self._kv_bytes = sharded.stages[0], sharded.kv_bytes_per_token

    def seconds(self, ranks: int, tokens: int) -> float:
        """Seconds that adapters of these ranks add to a layer of an iteration of so many tokens. The first product of a module
        writes little; the second reads what it adds to."""
        numbers = sum([inputs * (ranks + tokens) + outputs * (ranks + 2 * tokens) for inputs, outputs in self._sides])
        return 2 * len(self._sides) * self._kernel_s + BYTES * numbers / self._bandwidth

    def bytes(self, rank: int) -> float:
        """Bytes of an adapter of this rank on one device."""
        return BYTES * rank * sum([inputs + outputs for inputs, outputs in self._sides]) * self._layers

    def blocks(self, rank: int, block_size: int) -> int:
        """KV blocks, each of `block_size` tokens, that an adapter of this rank takes on a device."""
        return ceil(self.bytes(rank) / (block_size * self._kv_bytes))
