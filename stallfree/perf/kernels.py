"""The time of one kernel on one device: the peak rates of its data sheet, and the few ways in which kernels fall short of them.

A matrix product is cut into tiles. Processors take them in waves, and the last wave may be nearly empty. Attention has tiles, too:
at least one for each sequence and KV head, which reads the KV once. A message takes its latency and the time of its bytes. This
module does not know which kernels run, nor how often.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, inf
from typing import NamedTuple

from stallfree.perf.hardware import Attending, Hardware, Link, Measured, Product, Switched
from stallfree.perf.shape import WEIGHT_BYTES, Matrix

SPLITS = (1, 2, 4)
"""The parts into which a tile's sum may be split, if the tiles alone do not occupy the processors."""

EDGE = 0.2 * 64
"""How much its edges slow a tile: a tile of r x c reads (r + c) / (r c) numbers per operation from the cache. Fitted on the
profiles of three devices together; 0.15 to 0.25 describes each about as well."""


class Tile(NamedTuple):
    """Rows (tokens) and columns (outputs) that a processor computes at once. The library takes it for products of `least` to `most`
    tokens. Tiles come `together` in this number, below each other, because they share what they read."""

    rows: int
    columns: int
    least: int = 1
    most: float = inf
    together: int = 1


CHOICES = tuple(Tile(*sides) for sides in ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128)))
"""Tiles that a library's 16-bit product chooses from. The model assumes that it chooses the best."""
TILES = {
    "fp16": CHOICES,
    # Kernels for weights in fewer bits are made for few tokens (Marlin, arXiv 2408.11743).
    "widened": (Tile(16, 64), Tile(32, 64), *CHOICES),
    # vLLM's CUTLASS products choose by the number of tokens.
    "fp8": (Tile(64, 64, most=64), Tile(64, 128, 65, 128), Tile(128, 128, 129, together=2)),
    "fp8-block": (Tile(64, 64), Tile(64, 128), Tile(128, 128)),
}
"""Tiles by the arithmetic of a product (see `arithmetic`)."""

OVERLAP = 3.0
"""Computing and reading overlap, but not completely: a kernel's time is the norm of this order of both. 2.5 to 4 describes profiles
equally well."""

TILE_OVERLAP = 1.5
"""The same order for the fixed work of attention's tiles and for reading KV, which overlap less."""

STEPS = {"fp16": 32, "widened": 32, "fp8": 128, "fp8-block": 128}
"""Columns that the inner loop of a matrix product takes at once."""

QUANTISE_S = 2.3e-6
"""The least time to quantise activations to fp8. With block scales it is part of the product's latency instead."""


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


def _norm(order: float, *seconds: float) -> float:
    """The norm of `order` of times that overlap, but not completely: at least the longest, at most their sum. `Attention` writes it
    out, because a simulation asks it for every iteration; the other kernels are remembered by their tokens."""
    total = 0.0
    for each in seconds:
        total += each**order
    return float(total ** (1 / order))


def arithmetic(device: Hardware, precision: str) -> str:
    """How weights of `precision` are multiplied, a key of `TILES`: in fp8 if the device has a rate for it. Weights of fewer bits
    are widened to 16 bits on the way."""
    if precision in ("bf16", "fp16"):
        return "fp16"
    return precision if precision in TILES and "fp8" in device.peak else "widened"


def _product(device: Hardware, measured: Measured, precision: str) -> tuple[str, Product]:
    """The arithmetic of weights of `precision`, and its coefficients: its own, or those of the nearest that was measured."""
    how, known = arithmetic(device, precision), measured.products
    near = known["fp8"] if how.startswith("fp8") and "fp8" in known else known["fp16"]
    return how, known.get(how, near)


def matmul(device: Hardware, measured: Measured, tokens: int, matrix: Matrix) -> Cost:
    """`tokens` rows of activations times `matrix`, and before it their quantisation. Of a mixture of experts, those that a token
    meets (`Matrix.met`), each with an equal part of the tokens.
    """
    rows, columns, met = matrix.rows, matrix.columns, matrix.met(tokens)
    each = tokens * matrix.active / met
    how, product = _product(device, measured, matrix.precision)
    eight = how.startswith("fp8")
    peak, size = device.peak["fp8" if eight else "fp16"], 1.0 if eight else 2.0
    moved = met * (rows * columns * WEIGHT_BYTES[matrix.precision] + each * (columns * size + rows * 2.0))
    bandwidth = device.bandwidth * product.bandwidth
    memory = moved / bandwidth
    processors = device.processors
    rate = peak / processors * product.compute
    best = inf
    for parts in (1,) if eight else SPLITS:
        deep = ceil(columns / parts / STEPS[how]) * STEPS[how]
        quickest = inf
        for tile in TILES[how]:
            if not tile.least - 1 < each <= tile.most:
                continue
            tall, wide = tile.rows, tile.columns
            work = 2 * tall * wide * (1 + EDGE / tall + EDGE / wide) / rate
            tiles = met * ceil(each / tall / tile.together) * tile.together * ceil(rows / wide) * parts
            if parts == 1 or tiles <= processors:
                quickest = min(quickest, ceil(tiles / processors) * (work * deep + product.wave_s))
        partial = 8.0 * tokens * matrix.active * rows * (parts - 1) / bandwidth
        best = min(best, _norm(OVERLAP, quickest, memory + partial))
    operations = 2 * tokens * matrix.active * rows * columns
    before = quantise(device, measured, tokens, matrix)
    return Cost(product.kernel_s + before + best, operations / peak, moved / device.bandwidth, launch_s=product.kernel_s)


def quantise(device: Hardware, measured: Measured, tokens: int, matrix: Matrix) -> float:
    """Seconds to quantise `tokens` rows of activations for a product with `matrix`; 0.0 if they stay in 16 bits."""
    how, product = _product(device, measured, matrix.precision)
    if not product.quantise:
        return 0.0
    moving = 3.0 * tokens * matrix.columns / (device.bandwidth * product.quantise)
    return moving if how == "fp8-block" else _norm(OVERLAP, QUANTISE_S, moving)


def elementwise(device: Hardware, measured: Measured, name: str, tokens: int, width: float) -> Cost:
    """The kernel `name` of `ELEMENTWISE` over `tokens` rows of `width` fp16 numbers."""
    kernel = ELEMENTWISE[name]
    moved = kernel.passes * width * 2.0 * tokens
    memory = moved / (device.bandwidth * measured.stream)
    issue = moved / (device.processors * device.clock * kernel.bytes_per_clock)
    seconds = _norm(OVERLAP, kernel.floor_s, max(memory, issue))
    return Cost(seconds, bandwidth_s=moved / device.bandwidth, launch_s=kernel.floor_s)


class Attention:
    """Attention of one layer on one device: `heads` query heads, `kv_heads` heads with `kv_bytes` of KV for each token.

    `masked`: the share of the masked half of a chunk's own square that the kernel computes. It is 1 for kernels of early 2024. It
    is 0 for later ones, which compute only the tiles on the diagonal. `warm`: the KV is in the device's cache as far as it fits,
    as when a benchmark repeats a kernel.
    """

    def __init__(
        self,
        device: Hardware,
        measured: Attending,
        heads: int,
        kv_heads: int,
        head_dim: int,
        kv_bytes: float,
        masked: float = 0.0,
        warm: bool = False,
    ):
        self.masked, self._kv_heads, self._kv_bytes = masked, kv_heads, kv_bytes
        self._cache, self._warm = device.cache if warm else 0.0, measured.warm
        self._compute_s, self._read_s = 4 * heads * head_dim / device.peak["fp16"], kv_bytes / device.bandwidth
        self._pair_s, self._token_s = self._compute_s / measured.compute, self._read_s / measured.stream
        self._row_s = max(4.0 * (heads + kv_heads) * head_dim / (device.bandwidth * measured.rows), self._token_s)
        self._launch_s, self._split_s = measured.launch_s, measured.split_s
        self._tile_s, self._alone_s = measured.tile_s / device.processors, self._token_s * measured.alone
        self._longest_s = self._pair_s * device.processors / heads
        self._heads, self._group = heads, heads // kv_heads
        self._packs = not measured.regroup_s  # the kernel puts the heads of a group into one tile
        self._regroup_s = measured.regroup_s if self._group > 1 and kv_heads > 1 else 0.0
        self._pace_s = measured.pace_s if self._group == 1 else 0.0
        # Tokens whose tiles occupy all processors: each KV head has tiles of TALL queries of its heads.
        self._enough = device.processors // kv_heads * TALL * kv_heads / heads

    def decodes(self, requests: int, context: int) -> float:
        """Seconds of decodes with `context` tokens of KV before them in total. The KV is read once, by a tile for each sequence and
        KV head, which is split unless its KV is short."""
        tiles, seconds = requests * self._kv_heads, self._launch_s
        reading = context * (self._token_s + self._alone_s / tiles)
        if self._cache:
            reading *= self._cold(context * self._kv_bytes)
        if self._pace_s:
            reading = max(reading, context / requests * self._pace_s)
        elif context > TALL * requests:
            seconds += self._split_s
        if requests > 1:
            seconds += self._regroup_s
        norm: float = ((tiles * self._tile_s) ** TILE_OVERLAP + reading**TILE_OVERLAP) ** (1 / TILE_OVERLAP)
        return seconds + norm

    def _cold(self, size: float) -> float:
        """The time to read `size` bytes of KV, of which what fits is in the cache, over that of reading it from memory. About two
        thirds of the cache serve; beyond all of it, nothing stays."""
        missing = min(1.0, max(0.0, 2 * size / self._cache - 1.2))
        return missing + (1 - missing) / self._warm

    def chunks(self, sums: "Chunks") -> float:
        """Seconds of chunks. Tiles of the same head take the processors in turn; no chunk ends before its longest tile."""
        tokens, cached, pairs, tiles, longest, split = sums
        reading = cached * self._token_s + tokens * self._row_s
        computing = pairs * self._pair_s + tiles * self._tile_s
        norm: float = (computing**OVERLAP + (longest * self._longest_s) ** OVERLAP + reading**OVERLAP) ** (1 / OVERLAP)
        return self._launch_s + (self._split_s if split else 0.0) + norm

    def sums(self, chunks: Iterable[tuple[int, int]]) -> "Chunks":
        """What the time of these chunks depends on. A chunk's kernel computes the pairs of its queries with the KV before it, and
        those of its own that it does not skip. A chunk that is too small to occupy the processors, and has KV before it, is split
        along its KV."""
        tokens = cached = tiles = 0
        pairs = longest = 0.0
        split = False
        for start, count in chunks:
            tall = count if count < TALL else TALL
            own = count * (count + tall) / 2
            pairs += count * start + own
            if self.masked:
                pairs += self.masked * (count * count - own)
            tokens += count
            cached += start
            if self._packs and count < TALL:
                tiles += self._kv_heads * -(-count * self._group // TALL)
            else:
                tiles += self._heads * -(-count // TALL)
            if start and count < self._enough:
                split = True
            elif tall * (start + count) > longest:
                longest = tall * (start + count)
        return Chunks(tokens, cached, pairs, tiles, longest, split)

    def alike(self, number: int, count: int, start: int = 0) -> "Chunks":
        """The same for `number` chunks of this size."""
        tokens, cached, pairs, tiles, longest, split = self.sums([(start, count)])
        return Chunks(number * tokens, number * cached, number * pairs, number * tiles, longest, split)

    def cost_of_decodes(self, requests: int, context: int) -> Cost:
        read = context * self._read_s
        return Cost(self.decodes(requests, context), (context + requests) * self._compute_s, read, launch_s=self._launch_s)

    def cost_of_chunks(self, sums: "Chunks") -> Cost:
        read = (sums.cached + sums.tokens) * self._read_s
        return Cost(self.chunks(sums), sums.pairs * self._compute_s, read, launch_s=self._launch_s)


class Chunks(NamedTuple):
    """What the attention of an iteration's chunks depends on: their tokens, and tokens of KV before them; pairs of query and key;
    tiles, and the pairs of the longest; whether any is split along its KV."""

    tokens: int
    cached: int
    pairs: float
    tiles: int
    longest: float
    split: bool


NONE = Chunks(0, 0, 0.0, 0, 0.0, False)


TALL = 128
"""Rows of queries in a tile of attention."""


SMALL = 8_000_000
"""Bytes from which a sum inside a CUDA graph is NCCL's: the limit of vLLM's own all-reduce."""
TREE = 700_000
"""Bytes per rank below which a sum over nodes of at least 4 devices takes a tree, through one network card. Larger ones take rings
through all cards. Measured on 2 nodes of 4 and of 8 A100."""


def all_reduce(link: Link, devices: int, per_node: int, size: float, in_step: bool) -> Cost:
    """A sum of `size` bytes over `devices`, `per_node` of them in each node. In a ring each device sends all parts but its own,
    twice (Patarasuk and Yuan 2009). A tree moves all bytes up and down at once. `in_step`: the ranks start together, as from one
    CUDA graph. Between nodes the latency grows with the number of ranks.
    """
    if in_step and link.graph is not None:
        return _in_graph(link.graph, devices, devices == link.span, size)
    latency = link.step_s if in_step else link.collective_s
    moved, ring = 2 * (devices - 1) / devices * size, link.ring
    if not link.span:
        latency = max(latency, devices * link.latency_s)
        if per_node >= 4 and size < TREE * devices:
            moved = size
        elif per_node >= 4:
            ring = link.node_ring
    return Cost(latency + moved / ring, link_s=moved / ring, launch_s=latency)


def _in_graph(link: Switched, devices: int, whole: bool, size: float) -> Cost:
    """See `Switched`; `whole`: the devices are a whole node."""
    if size >= SMALL:
        return nccl(link, devices, whole, size)
    ways = ((1, (devices - 1) * size), (2, 2 * (devices - 1) / devices * size))
    seconds, latency, read = min((steps * link.step_s + read / link.read, steps * link.step_s, read) for steps, read in ways)
    return Cost(seconds, link_s=read / link.read, launch_s=latency)


def nccl(link: Switched, devices: int, whole: bool, size: float) -> Cost:
    """NCCL's all-reduce; `whole`: the devices are a whole node."""
    moved = 2 * (devices - 1) / devices * size
    latency = link.start_s + link.rank_s * devices
    bandwidth = link.ring * (link.whole if whole else 1.0)
    return Cost(latency + (moved + (moved * link.half) ** 0.5) / bandwidth, link_s=moved / bandwidth, launch_s=latency)


def send(link: Link, size: float) -> Cost:
    """`size` bytes from one device to another."""
    moving = size / link.bandwidth
    return Cost(link.latency_s + moving, link_s=moving, launch_s=link.latency_s)
