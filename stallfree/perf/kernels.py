"""The time of one kernel on one device: the peak rates of its data sheet, and the few ways in which kernels fall short of them.

A matrix product is cut into tiles. Processors take them in waves, and the last wave may be nearly empty. Attention reads the KV
once per KV head. A message takes its latency and the time of its bytes. This module does not know which kernels run, nor how often.
"""

from dataclasses import dataclass
from math import ceil

from stallfree.perf.hardware import Hardware, Link
from stallfree.perf.shape import WEIGHT_BYTES, Matrix

SPLITS = (1, 2, 4)
"""The parts into which a tile's sum may be split, if the tiles alone do not occupy the processors."""

EDGE = 0.2 * 64
"""How much its edges slow a tile: a tile of r x c reads (r + c) / (r c) numbers per operation from the cache. Fitted on the
profiles of three devices together; 0.15 to 0.25 describes each about as well."""

TILES = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
"""Rows (tokens) and columns (outputs) of the tiles that a library's matrix product chooses from. The model assumes that it chooses
the best."""

LOW = ((16, 64), (32, 64), *TILES)
"""Tiles for weights in fewer bits, whose kernels are made for few tokens (Marlin, arXiv 2408.11743)."""

OVERLAP = 3.0
"""Computing and reading overlap, but not completely: a kernel's time is the norm of this order of both. 2.5 to 4 describes profiles
equally well."""

STEP = 32
"""Columns that the inner loop of a matrix product takes at once."""


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A kernel on rows: `passes` over them, at most `bytes_per_clock` per processor, and at least `floor_s` in all.

    Fitted on the profiles of an A100, H100 and A40 together. The median error is 8 % and the P90 22 %, of times that are mostly a
    few microseconds.
    """

    passes: int
    bytes_per_clock: float
    floor_s: float


ELEMENTWISE = {
    "embedding": Elementwise(2, 2.2, 4.9e-6),
    "norm": Elementwise(3, 7.3, 4.8e-6),
    "rope": Elementwise(2, 5.8, 3.0e-6),
    "gated activation": Elementwise(3, 6.4, 3.0e-6),
    "activation": Elementwise(2, 6.4, 3.0e-6),
    "add": Elementwise(3, 13.4, 2.0e-6),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """`seconds` of a kernel, and the seconds of each limit alone: arithmetic, memory and link at their peak rates, and its
    launch."""

    seconds: float
    compute_s: float = 0.0
    bandwidth_s: float = 0.0
    link_s: float = 0.0
    launch_s: float = 0.0

    @property
    def limit(self) -> tuple[str, float]:
        """The largest of the limits, and its seconds."""
        limits = {"compute": self.compute_s, "bandwidth": self.bandwidth_s, "link": self.link_s, "launch": self.launch_s}
        return max(limits.items(), key=lambda item: item[1])


def arithmetic(device: Hardware, precision: str) -> str:
    """The precision of the arithmetic for weights of `precision`: the same if the device has a rate for it, else fp16."""
    return precision if precision in device.peak else "fp16"


def matmul(device: Hardware, tokens: int, matrix: Matrix) -> Cost:
    """`tokens` rows of activations times `matrix`. Of a mixture of experts, the expected number that at least one token meets."""
    copies, rows, columns = matrix.copies, matrix.rows, matrix.columns
    met = copies * (1 - (1 - matrix.active / copies) ** tokens)
    each = tokens * matrix.active / met
    measured, precision = device.measured, arithmetic(device, matrix.precision)
    peak, size = device.peak[precision], 1.0 if precision in ("fp8", "int8") else 2.0
    weight_bytes = WEIGHT_BYTES[matrix.precision]
    moved = met * (rows * columns * weight_bytes + each * (columns * size + rows * 2.0))
    memory = moved / (device.bandwidth * measured.bandwidth)
    processors = device.processors
    rate = peak / processors * measured.compute
    best = float("inf")
    for parts in SPLITS:
        deep = ceil(columns / parts / STEP) * STEP
        quickest = float("inf")
        for tall, wide in TILES if weight_bytes == 2.0 else LOW:
            work = 2 * tall * wide * (1 + EDGE / tall + EDGE / wide) / rate
            tiles = met * ceil(each / tall) * ceil(rows / wide) * parts
            if parts == 1 or tiles <= processors:
                quickest = min(quickest, ceil(tiles / processors) * (work * deep + measured.wave_s))
        partial = 8.0 * tokens * matrix.active * rows * (parts - 1) / (device.bandwidth * measured.bandwidth)
        best = min(best, (quickest**OVERLAP + (memory + partial) ** OVERLAP) ** (1 / OVERLAP))
    operations = 2 * tokens * matrix.active * rows * columns
    return Cost(measured.kernel_s + best, operations / peak, moved / device.bandwidth, launch_s=measured.kernel_s)


def elementwise(device: Hardware, name: str, tokens: int, width: float) -> Cost:
    """The kernel `name` of `ELEMENTWISE` over `tokens` rows of `width` fp16 numbers."""
    kernel = ELEMENTWISE[name]
    moved = kernel.passes * width * 2.0 * tokens
    memory = moved / (device.bandwidth * device.measured.stream)
    issue = moved / (device.processors * device.clock * kernel.bytes_per_clock)
    seconds = (kernel.floor_s**OVERLAP + max(memory, issue) ** OVERLAP) ** (1 / OVERLAP)
    return Cost(seconds, bandwidth_s=moved / device.bandwidth, launch_s=kernel.floor_s)


class Attention:
    """Attention of one layer on one device: `heads` query heads, `kv_heads` heads with `kv_bytes` of KV for each token.

    `masked`: the share of the masked half of a chunk's own square that the kernel computes. It is 1 for kernels of early 2024. It
    is 0 for later ones, which compute only the tiles on the diagonal.
    """

    def __init__(self, device: Hardware, heads: int, kv_heads: int, head_dim: int, kv_bytes: float, masked: float):
        measured, self.masked = device.measured, masked
        self._launch_s, self._split_s = measured.attention_s, measured.split_s
        self._compute_s, self._read_s = 4 * heads * head_dim / device.peak["fp16"], kv_bytes / device.bandwidth
        self._pair_s, self._token_s = self._compute_s / measured.attention, self._read_s / measured.stream
        # Tokens whose tiles occupy all processors: each KV head has tiles of TALL queries of its heads.
        self._enough = device.processors // kv_heads * TALL * kv_heads / heads

    def decodes(self, context: int) -> float:
        """Seconds of decodes with `context` tokens of KV before them in total: the KV is read once."""
        return self._split_s + context * self._token_s

    def chunks(self, tokens: int, cached: int, pairs: float) -> float:
        """Seconds of chunks with `tokens` in total, and `cached` tokens of KV before them in total. `pairs`: the sum of
        `self.pairs`. Chunks too small to occupy the processors are split along their KV, as decodes always are.
        """
        split = self._split_s if cached and tokens < self._enough else 0.0
        return self._launch_s + split + max(pairs * self._pair_s, (cached + tokens) * self._token_s)

    def pairs(self, start: int, count: int) -> float:
        """Pairs of query and key that a chunk's kernel computes: all with the KV before it, and those of its own that it does not
        skip."""
        own = count * (count + min(count, TALL)) / 2
        return count * start + own + self.masked * (count * count - own)

    def cost_of_decodes(self, requests: int, context: int) -> Cost:
        return Cost(self.decodes(context), (context + requests) * self._compute_s, context * self._read_s, launch_s=self._split_s)

    def cost_of_chunks(self, tokens: int, cached: int, pairs: float) -> Cost:
        launch = self.chunks(tokens, cached, 0.0) - (cached + tokens) * self._token_s
        seconds = self.chunks(tokens, cached, pairs)
        return Cost(seconds, pairs * self._compute_s, (cached + tokens) * self._read_s, launch_s=launch)


TALL = 128
"""Rows of queries in a tile of attention."""


TREE = 700_000
"""Bytes per rank below which a sum over nodes of at least 4 devices takes a tree, through one network card. Larger ones take rings
through all cards. Measured on 2 nodes of 4 and of 8 A100."""


def all_reduce(link: Link, devices: int, per_node: int, size: float, in_step: bool) -> Cost:
    """A sum of `size` bytes over `devices`, `per_node` of them in each node. In a ring each device sends all parts but its own,
    twice (Patarasuk and Yuan 2009). A tree moves all bytes up and down at once. `in_step`: the ranks start together, as from one
    CUDA graph. Between nodes the latency grows with the number of ranks.
    """
    latency = link.step_s if in_step else link.collective_s
    moved, ring = 2 * (devices - 1) / devices * size, link.ring
    if not link.span:
        latency = max(latency, devices * link.latency_s)
        if per_node >= 4 and size < TREE * devices:
            moved = size
        elif per_node >= 4:
            ring = link.node_ring
    return Cost(latency + moved / ring, link_s=moved / ring, launch_s=latency)


def send(link: Link, size: float) -> Cost:
    """`size` bytes from one device to another."""
    moving = size / link.bandwidth
    return Cost(link.latency_s + moving, link_s=moving, launch_s=link.latency_s)
