"""One iteration of a few tokens through a dense transformer, on all threads of a team, from memory at known addresses.

Each thread computes its share of the rows of every matrix, and of the heads of attention. What is small, such as norms, every
thread computes for itself, so that they meet only five times in a layer. It knows nothing of requests; `forward.py` fills its
tables.
"""

from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np
from numba import carray

from stallfree.executors.openvino.few.compiled import exact, quick
from stallfree.executors.openvino.few.kernels import BYTE_LEVELS, exp, quantised
from stallfree.executors.openvino.few.products import SUMS
from stallfree.executors.openvino.few.team import LINE, STOPPED, TURNS, meet, sleep, wake
from stallfree.executors.openvino.few.vectors import call, look_at, pointer

MOST = 128
"""The most tokens at once. What each thread computes for itself, and attention, which reads the keys once for each token,
grow with them."""

USUAL = 4
"""Up to so many tokens this way is quicker than the graph on all processors that were measured."""

AT_ONCE = 4
"""The most vectors that a row of a matrix is multiplied with at once."""

TILE = 16
"""Rows of a matrix that are multiplied with all vectors before the next ones are, so that their codes stay in the cache."""

FOUR, WIDTH, ROWS, GROUPS, CODES, ZEROS, SCALES, LEAST, LEAST_SCALES, FUNCTIONS = range(10)
"""The columns of `Tables.parts`: of a matrix, how many groups of 4-bit codes are multiplied together (0: its codes have 8 bits),
weights in a group, rows, groups of a row, and addresses, 0 for what it does not have; then those of `rows_product` for 1 to
`AT_ONCE` vectors."""

TOGETHER = 4
"""The most heads that attention computes at once."""

QKV, OUTPUT, UP, DOWN = range(4)
"""The products of a layer."""

BEFORE, AFTER, BEFORE_FFN, AFTER_FFN, Q_NORM, K_NORM, QKV_BIAS, OUTPUT_BIAS, UP_BIAS, DOWN_BIAS = range(10)
"""The vectors of a layer: the columns of `Tables.vectors`."""

BY_HEAD, WHOLE = 1, 2
"""How queries and keys are normalised, in `Sizes.qk_norm`."""


class Sizes(NamedTuple):
    """A model's sizes. `block`: tokens of a KV block. `kv_bytes`: bytes of a token's keys, or values, for one head: a scale, a zero
    point, and a byte for each number."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    ffn: int
    widest: int
    longest: int
    block: int
    kv_bytes: int
    gelu: bool
    qk_norm: int
    eps: float


class Tables(NamedTuple):
    """Where everything is.

    `parts`: one row for each matrix. `products` [layers + 1, 4, 2]: for each product, its first part and the one behind its last;
    in the last row, those of the head and of the embedding. `numbers`: all small vectors, end to end. `vectors` [layers + 1, 10]:
    where each begins, -1 for one that a layer does not have; in the last row, the last norm. `windows`, `turns`: for each layer,
    its window and its rotary table. `caches` [layers, 2]: addresses of keys and values. `attend`: those of
    `heads_attention` for 1 to `TOGETHER` heads.
    """

    parts: np.ndarray
    products: np.ndarray
    numbers: np.ndarray
    vectors: np.ndarray
    windows: np.ndarray
    turns: np.ndarray
    caches: np.ndarray
    attend: np.ndarray


class Batch(NamedTuple):
    """The iteration. `counts`: tokens, and tokens whose logits are wanted. `tokens`, `positions` [MOST]. `wanted` [MOST]: which
    tokens have logits. `blocks` [MOST, blocks]: each token's block table. `angles` [rotary tables, MOST, 2, dim / 2]: cosines and
    sines. `products` [2, MOST, widest]: results of matrices, which all threads read, used in turn. `attended` [MOST, heads * dim].
    `logits` [MOST, vocabulary]."""

    counts: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    wanted: np.ndarray
    blocks: np.ndarray
    angles: np.ndarray
    products: np.ndarray
    attended: np.ndarray
    logits: np.ndarray


class Own(NamedTuple):
    """A thread's own numbers. `hidden`, `x` [MOST, widest]: the residual stream, and the input of the next product. `codes`
    [MOST * widest] int16, `scales`, `sums`: that input, quantised. `scores`: room for `heads_attention`. `heads` [TOGETHER, dim]:
    queries, or a key."""

    hidden: np.ndarray
    x: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    sums: np.ndarray
    scores: np.ndarray
    heads: np.ndarray

    @classmethod
    def of(cls, sizes: Sizes) -> Self:
        number = MOST * sizes.widest
        hidden, x = np.zeros((2, MOST, sizes.widest), np.float32)
        codes, scales = _in_line(number, np.int16), _in_line(number, np.float32)
        scores = np.zeros(TOGETHER * (sizes.longest + sizes.dim + 2), np.float32)
        return cls(hidden, x, codes, scales, np.zeros(number, np.float32), scores, np.zeros((TOGETHER, sizes.dim), np.float32))


def _in_line(number: int, kind: type) -> np.ndarray:
    """Zeros that begin with a line of the caches, so that no vector of them is in two."""
    size = number * np.dtype(kind).itemsize
    memory = np.zeros(size + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size].view(kind)


@quick()
def inverse_norm(x: np.ndarray, eps: float) -> float:
    """What RMSNorm multiplies x by."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    return np.float32(1 / np.sqrt(total / len(x) + eps))


@quick()
def normed(x: np.ndarray, weight: np.ndarray, eps: float, out: np.ndarray) -> None:
    """RMSNorm of x, as long as `weight`; or x, if that is empty."""
    if not len(weight):
        for i in range(len(x)):
            out[i] = x[i]
        return
    scale = inverse_norm(x, eps)
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@quick()
def quantise(own: Own, tokens: int, groups: int, width: int, four: int) -> None:
    """Write the inputs of a product as codes, in groups, as `row_product` wants them. `four`: how many groups it takes together, 0
    for a matrix of 8 bits."""
    size, levels, bytes_ = groups * width, np.float32(BYTE_LEVELS), own.codes.view(np.int8)
    for token in range(tokens):
        if not four:
            rows = carray(pointer(own.x[token].ctypes.data), (groups, width), np.float32)
            scales, sums = own.scales[token * groups :].ctypes.data, own.sums[token * groups :].ctypes.data
            quantised(rows, own.codes[token * size :].ctypes.data, scales, sums)
            continue
        for group in range(groups):
            start, place = group * width, token * groups + group
            x = own.x[token, start : start + width]
            largest, total = np.float32(1e-30), np.int32(0)
            for i in range(width):
                largest = max(largest, abs(x[i]))
            scale, factor = largest / levels, levels / largest
            at = token * size + group // four * four * width + group % four * (width // 2)
            for i in range(width // 2):
                even, odd = np.int32(np.rint(x[2 * i] * factor)), np.int32(np.rint(x[2 * i + 1] * factor))
                bytes_[at + i], bytes_[at + four * width // 2 + i] = even, odd
                total += even + odd
            own.sums[place] = np.float32(total) * scale
            for i in range(SUMS):
                own.scales[place * SUMS + i] = scale


@exact()
def product(
    tables: Tables, span: np.ndarray, bias: np.ndarray, tokens: int, own: Own, out: np.ndarray, rank: int, size: int
) -> None:
    """This thread's rows of the product of `own.x` with the matrices of `span`, one below the other: [tokens, rows] in `out`."""
    before, quantised = 0, (np.int64(-1), np.int64(-1))
    for at in range(span[0], span[1]):
        part = tables.parts[at]
        width, rows, groups, form = part[WIDTH], part[ROWS], part[GROUPS], (part[WIDTH], part[FOUR])
        if form != quantised:
            quantise(own, tokens, groups, width, part[FOUR])
            quantised = form
        begin, end = rows * rank // size, rows * (rank + 1) // size
        codes, scales, sums, size_x = own.codes.ctypes.data, own.scales.ctypes.data, own.sums.ctypes.data, groups * width
        bytes_each, scales_each = (size_x, 4 * SUMS * groups) if part[FOUR] else (2 * size_x, 4 * groups)
        matrix = part[CODES], part[ZEROS], part[SCALES], part[LEAST], part[LEAST_SCALES], groups
        tile = end - begin if tokens <= AT_ONCE else TILE
        for first in range(begin, end, max(1, tile)):
            last = min(end, first + tile)
            for token in range(0, tokens, AT_ONCE):
                x = codes + token * bytes_each, scales + token * scales_each, sums + 4 * token * groups
                out_at = out.ctypes.data + 4 * (token * out.shape[1] + before)
                call(part[FUNCTIONS + min(tokens - token, AT_ONCE) - 1], (first, last, *matrix, *x, out_at, out.shape[1]))
        if len(bias):
            for token in range(tokens):
                for row in range(before + begin, before + end):
                    out[token, row] += bias[row]
        before += rows


@exact()
def vector(tables: Tables, at: int, size: int) -> np.ndarray:
    """The small vector that begins at `at`; empty for -1."""
    return tables.numbers[at : at + size] if at >= 0 else tables.numbers[:0]


@quick()
def placed(x: np.ndarray, norm: np.ndarray, scale: float, angles: np.ndarray, out: np.ndarray) -> None:
    """A head of queries or keys in `out`: times `scale`, and its weights if there is a norm, and turned."""
    half = len(out) // 2
    for i in range(len(out)):
        out[i] = x[i] * scale
    for i in range(len(norm)):
        out[i] *= norm[i]
    for i in range(half):
        first, second = out[i], out[half + i]
        out[i] = first * angles[0, i] - second * angles[1, i]
        out[half + i] = second * angles[0, i] + first * angles[1, i]


@quick()
def keep(x: np.ndarray, cache: int) -> None:
    """Write a head's keys or values of a token into the cache, in 8 bits."""
    low = high = x[0]
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
    scale = max((high - low) / np.float32(255), np.float32(1e-8))
    zero = -low / scale
    about = carray(pointer(cache), 2, np.float32)
    about[0], about[1] = scale, zero
    codes = carray(pointer(cache + 8), len(x), np.uint8)
    for i in range(len(x)):
        codes[i] = np.uint8(np.int32(min(max(np.rint(x[i] / scale + zero), np.float32(0)), np.float32(255))))


@exact()
def head_norm(sizes: Sizes, weights: np.ndarray, all_heads: np.ndarray, head: int) -> tuple[np.ndarray, float]:
    """The weights of a head's norm, and what it multiplies by, as `placed` takes them."""
    start, end = head * sizes.dim, (head + 1) * sizes.dim
    if sizes.qk_norm == BY_HEAD:
        return weights[: sizes.dim], inverse_norm(all_heads[start:end], sizes.eps)
    if sizes.qk_norm == WHOLE:
        return weights[start:end], inverse_norm(all_heads, sizes.eps)
    return weights[:0], np.float32(1)


@exact()
def attention(sizes: Sizes, tables: Tables, batch: Batch, own: Own, layer: int, tokens: int, rank: int, size: int) -> None:
    """This thread's heads. It writes the keys and values that they read; another thread may write the same bytes."""
    heads, kv_heads, dim = sizes.heads, sizes.kv_heads, sizes.dim
    begin, end, each = heads * rank // size, heads * (rank + 1) // size, heads // kv_heads
    angles, bytes_each, window = batch.angles[tables.turns[layer]], sizes.kv_bytes, tables.windows[layer]
    stride, query, key = kv_heads * sizes.block * bytes_each, heads * dim, (heads + kv_heads) * dim
    begins = tables.vectors[layer]
    q_weights, k_weights = vector(tables, begins[Q_NORM], query), vector(tables, begins[K_NORM], kv_heads * dim)
    if begin == end:
        return
    for shared in range(begin // each, (end - 1) // each + 1):
        keys = tables.caches[layer, 0] + shared * sizes.block * bytes_each
        values = tables.caches[layer, 1] + shared * sizes.block * bytes_each
        for token in range(tokens):
            mixed, position = batch.products[0, token], batch.positions[token]
            place = batch.blocks[token, position // sizes.block] * stride + position % sizes.block * bytes_each
            own_keys, own_values = mixed[query:key], mixed[key : key + kv_heads * dim]
            norm, scale = head_norm(sizes, k_weights, own_keys, shared)
            placed(own_keys[shared * dim : (shared + 1) * dim], norm, scale, angles[token], own.heads[0])
            keep(own.heads[0], keys + place)
            keep(own_values[shared * dim : (shared + 1) * dim], values + place)
        head, stop = max(begin, shared * each), min(end, (shared + 1) * each)
        while head < stop:
            number = min(stop - head, TOGETHER)
            for token in range(tokens):
                queries = batch.products[0, token, :query]
                for i in range(number):
                    norm, scale = head_norm(sizes, q_weights, queries, head + i)
                    scale /= np.float32(np.sqrt(dim))
                    placed(queries[(head + i) * dim : (head + i + 1) * dim], norm, scale, angles[token], own.heads[i])
                last = batch.positions[token] + 1
                first = max(0, last - window) if window else 0
                past = keys, values, batch.blocks[token].ctypes.data, stride, first, last
                out = batch.attended[token, head * dim :].ctypes.data
                call(tables.attend[number - 1], (own.heads.ctypes.data, *past, own.scores.ctypes.data, out))
            head += number


@quick()
def activate(gelu: bool, both: np.ndarray, out: np.ndarray) -> None:
    """The activation of the first half of `both`, the gate, times the other half."""
    ffn = len(both) // 2
    for i in range(ffn):
        x = both[i]
        inner = np.float32(1.5957691216057308) * (x + np.float32(0.044715) * x * x * x) if gelu else x
        out[i] = x / (np.float32(1) + exp(-inner)) * both[ffn + i]


@quick()
def embed(tables: Tables, layers: int, token: int, out: np.ndarray) -> None:
    """A token's row of the embedding, whose codes have 8 bits."""
    part = tables.parts[tables.products[layers, 1, 0]]
    width, groups = part[WIDTH], part[GROUPS]
    codes = carray(pointer(part[CODES] + token * groups * width), groups * width, np.int8)
    scales = carray(pointer(part[SCALES] + 4 * token * groups), groups, np.float32)
    for group in range(groups):
        for i in range(group * width, (group + 1) * width):
            out[i] = np.float32(codes[i]) * scales[group]


@quick()
def added(tables: Tables, norm: int, eps: float, x: np.ndarray, out: np.ndarray, hidden: np.ndarray) -> None:
    """Add `x` to the residual stream, normalised if `norm` is where the weights for that begin. `out` is overwritten."""
    normed(x, vector(tables, norm, len(x)), eps, out)
    for i in range(len(x)):
        hidden[i] += out[i]


@exact()
def iterate(sizes: Sizes, tables: Tables, batch: Batch, own: Own, team: int, rank: int, size: int) -> None:
    """The iteration of `batch`, as thread `rank` of `size`."""
    tokens, wanted, width = batch.counts[0], batch.counts[1], sizes.hidden
    first, second = batch.products[0], batch.products[1]
    for token in range(tokens):
        embed(tables, sizes.layers, batch.tokens[token], own.hidden[token])
    for layer in range(sizes.layers):
        spans, begins = tables.products[layer], tables.vectors[layer]
        for token in range(tokens):
            normed(own.hidden[token, :width], vector(tables, begins[BEFORE], width), sizes.eps, own.x[token])
        queries, kept = sizes.heads * sizes.dim, 2 * sizes.kv_heads * sizes.dim
        product(tables, spans[QKV], vector(tables, begins[QKV_BIAS], queries + kept), tokens, own, first, rank, size)
        meet(team, size)
        attention(sizes, tables, batch, own, layer, tokens, rank, size)
        meet(team, size)
        for token in range(tokens):
            normed(batch.attended[token], tables.numbers[:0], sizes.eps, own.x[token])
        product(tables, spans[OUTPUT], vector(tables, begins[OUTPUT_BIAS], width), tokens, own, second, rank, size)
        meet(team, size)
        for token in range(tokens):
            added(tables, begins[AFTER], sizes.eps, second[token, :width], own.x[token], own.hidden[token])
            normed(own.hidden[token, :width], vector(tables, begins[BEFORE_FFN], width), sizes.eps, own.x[token])
        product(tables, spans[UP], vector(tables, begins[UP_BIAS], 2 * sizes.ffn), tokens, own, first, rank, size)
        meet(team, size)
        for token in range(tokens):
            activate(sizes.gelu, first[token, : 2 * sizes.ffn], own.x[token])
        product(tables, spans[DOWN], vector(tables, begins[DOWN_BIAS], width), tokens, own, second, rank, size)
        meet(team, size)
        for token in range(tokens):
            added(tables, begins[AFTER_FFN], sizes.eps, second[token, :width], own.x[token], own.hidden[token])
    for row in range(wanted):
        hidden = own.hidden[batch.wanted[row], :width]
        normed(hidden, vector(tables, tables.vectors[sizes.layers, BEFORE], width), sizes.eps, own.x[row])
    if wanted:
        product(tables, tables.products[sizes.layers, 0], tables.numbers[:0], wanted, own, batch.logits, rank, size)
    meet(team, size)


def run(sizes: Sizes, tables: Tables, batch: Batch, own: Own, team: int, rank: int, size: int) -> None:
    """Thread 0 wakes the others, and returns after one iteration. They take part in each until the team ends."""
    while True:
        if rank:
            sleep(team + (TURNS + rank) * LINE)
            if look_at(team + STOPPED * LINE):
                return
        else:
            for other in range(1, size):
                wake(team + (TURNS + other) * LINE)
        iterate(sizes, tables, batch, own, team, rank, size)
        if not rank:
            return


@cache
def compiled(kept: bool) -> Any:
    """`run`, compiled for what it is called with first; `kept`, once it is."""
    return exact(cache=kept)(run)
