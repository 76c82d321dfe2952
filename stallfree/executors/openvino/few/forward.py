"""A model that computes tokens without the graph, a few at once, and more in parts. For one to four tokens, most of the graph's
time passes between its operators, and while its threads wait for each other. Without VNNI, the graph's products are slower for more
tokens, too: with weights of 4 bits for any number.

It fills the tables of `step.py` from stored weights and the executor's KV cache. It knows how a model is built, and no requests.
"""

import ctypes
import logging
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from stallfree.checkpoint import ModelConfig
from stallfree.core.plan import Capacity
from stallfree.executors.openvino.few.compiled import FOLDER, KEEPS, forget
from stallfree.executors.openvino.few.kernels import heads_attention, rows_product
from stallfree.executors.openvino.few.products import INT4, INT8, UINT4
from stallfree.executors.openvino.few.step import BY_HEAD, MOST, TOGETHER, WHOLE, Batch, Own, Sizes, Tables, compiled
from stallfree.executors.openvino.few.team import LINE, STOPPED, TURNS
from stallfree.executors.openvino.few.vectors import CHUNK, FEATURES
from stallfree.executors.openvino.stored import Stored
from stallfree.executors.openvino.weights import Weights

log = logging.getLogger(__name__)

VECTORS = (1, 2, 4, 4)
"""How many vectors products take for 1 to `AT_ONCE` tokens. With three, the fourth is any."""


LEAST_HALF, MOST_HALF = 2.0**-12, 2.0**15
"""Scales are read as float16, half of the bytes, if the largest of a matrix is between these: smaller ones then lose no more than
2^-13 of the largest."""
HALVES = bool(FEATURES.get("f16c"))
"""Whether the processor reads float16."""


class UnknownGroups(ValueError):
    """Weights in groups that `row_product` does not know."""


class FewTokens:
    """A model of `source`'s weights. `cache`: the bytes of each layer's keys and values in 8 bits, [blocks, KV heads, tokens, scale
    and zero point in float32 and a head's numbers]. `threads`: how many compute. It compiles, which takes seconds where numba has
    not `kept` the result, and runs once, which writes into `blocks`.

    Raises UnknownGroups.
    """

    def __init__(
        self,
        source: Weights,
        config: ModelConfig,
        cache: Sequence[np.ndarray],
        capacity: Capacity,
        threads: int,
        blocks: Sequence[int],
        *,
        kept: bool,
    ) -> None:
        self._alive: list[object] = [cache]
        self._parts: list[list[int]] = []
        self._numbers: list[np.ndarray] = []
        self._length = 0
        self._functions: dict[tuple[int, ...], list[int]] = {}
        self._size, self._kept = 1, kept
        self._halved: list[tuple[np.ndarray, np.ndarray]] = []
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        embedding = self._product(source.stored(["model.embed_tokens.weight"]), rows_are_read=True)
        products, vectors = [], []
        for layer in range(config.num_layers):
            attention, mlp = (f"model.layers.{layer}.{part}." for part in ("self_attn", "mlp"))
            linears = [
                ([f"{attention}{name}_proj" for name in "qkv"], config.qkv_bias),
                ([f"{attention}o_proj"], config.output_bias),
                ([f"{mlp}gate_proj", f"{mlp}up_proj"], config.mlp_bias),
                ([f"{mlp}down_proj"], config.mlp_bias),
            ]
            products.append([self._product(source.stored([f"{name}.weight" for name in names])) for names, _ in linears])
            norms = [f"model.layers.{layer}.{name}.weight" if name else "" for name in config.norms]
            norms += [f"{attention}{name}_norm.weight" if config.qk_norm else "" for name in "qk"]
            biases = [[f"{name}.bias" for name in names] if bias else [] for names, bias in linears]
            vectors.append([self._vector(source, names) for names in [*([name] if name else [] for name in norms), *biases]])
        head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        products.append([self._product(source.stored([f"{head}.weight"])), embedding, (0, 0), (0, 0)])
        vectors.append([self._vector(source, ["model.norm.weight"]), *[-1] * (len(vectors[0]) - 1)])

        kinds = list(dict.fromkeys(config.turns(layer) for layer in range(config.num_layers)))
        self._turns = [(np.array(frequencies), np.where(np.array(frequencies) > 0, scale, 1)) for frequencies, scale in kinds]
        block_size, longest = capacity.block_size, capacity.max_model_len
        sizes = Sizes(
            layers=config.num_layers, hidden=config.hidden_size, heads=config.num_heads, kv_heads=config.num_kv_heads,
            dim=config.head_dim, ffn=config.ffn_size, widest=max(config.hidden_size, query + 2 * kv, 2 * config.ffn_size),
            longest=longest, block=block_size, kv_bytes=8 + config.head_dim, gelu=config.gelu,
            qk_norm={"": 0, "head": BY_HEAD, "whole": WHOLE}[config.qk_norm], eps=config.norm_eps,
        )  # fmt: skip
        tables = Tables(
            parts=np.array(self._parts, np.int64), products=np.array(products, np.int64), numbers=np.concatenate(self._numbers),
            vectors=np.array(vectors, np.int64), windows=np.array(config.windows, np.int64),
            turns=np.array([kinds.index(config.turns(layer)) for layer in range(config.num_layers)], np.int64),
            caches=np.array([layer.ctypes.data for layer in cache], np.int64).reshape(-1, 2),
            attend=np.array([heads_attention(config.head_dim, block_size, n + 1, kept).address for n in range(TOGETHER)], np.int64),
        )  # fmt: skip
        self._batch = Batch(
            counts=np.zeros(2, np.int64), tokens=np.zeros(MOST, np.int64), positions=np.zeros(MOST, np.int64),
            wanted=np.zeros(MOST, np.int64), blocks=np.zeros((MOST, -(-longest // block_size)), np.int64),
            angles=np.zeros((len(kinds), MOST, 2, config.head_dim // 2), np.float32),
            products=np.zeros((2, MOST, sizes.widest), np.float32), attended=np.zeros((MOST, query), np.float32),
            logits=np.zeros((MOST, config.vocab_size), np.float32),
        )  # fmt: skip
        team = np.zeros((TURNS + threads) * LINE, np.uint8)
        self._run = partial(compiled(kept), sizes, tables, self._batch)
        self._own, self._team = Own.of(sizes), team.ctypes.data
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_halve, self._halved))
        del self._halved
        self.logits({
            "input_ids": np.zeros(1, np.int32), "position_ids": np.zeros(1, np.int32), "sampled_rows": np.zeros(1, np.int32),
            "subsequence_begins": np.array([0, 1], np.int32), "block_indices": np.array(blocks[:1], np.int32),
            "block_indices_begins": np.array([0, 1], np.int32),
        })  # fmt: skip
        semaphores = [ctypes.c_void_p(team.ctypes.data + (TURNS + rank) * LINE) for rank in range(threads)]
        for semaphore in semaphores:
            ctypes.CDLL(None).sem_init(semaphore, 0, 0)
        others = [
            threading.Thread(
                target=self._run, args=(Own.of(sizes), self._team, rank, threads), daemon=True, name=f"few tokens {rank}"
            )
            for rank in range(1, threads)
        ]
        for thread in others:
            thread.start()
        self._end = weakref.finalize(self, _end, team, semaphores, others)
        self._size = threads

    def logits(self, feed: dict[str, np.ndarray]) -> np.ndarray:
        """What the graph gives for these inputs. More than `MOST` tokens are computed in parts, one after the other. Valid until
        the next call."""
        tokens, rows = len(feed["input_ids"]), feed["sampled_rows"]
        if tokens <= MOST:
            return self._part(feed, 0, tokens, rows)
        logits = np.empty((len(rows), self._batch.logits.shape[1]), np.float32)
        for first in range(0, tokens, MOST):
            last = min(tokens, first + MOST)
            here = np.flatnonzero((first <= rows) & (rows < last))
            logits[here] = self._part(feed, first, last, rows[here] - first)
        return logits

    def _part(self, feed: dict[str, np.ndarray], first: int, last: int, rows: np.ndarray) -> np.ndarray:
        """The logits of `rows` of the tokens from `first` to before `last`."""
        batch, begins, tables = self._batch, feed["subsequence_begins"], feed["block_indices_begins"]
        tokens = last - first
        batch.counts[:] = tokens, len(rows)
        batch.tokens[:tokens], batch.positions[:tokens] = feed["input_ids"][first:last], feed["position_ids"][first:last]
        batch.wanted[: len(rows)] = rows
        for sequence in range(len(begins) - 1):
            begin, end = max(first, begins[sequence]) - first, min(last, begins[sequence + 1]) - first
            if begin < end:
                blocks = feed["block_indices"][tables[sequence] : tables[sequence + 1]]
                batch.blocks[begin:end, : len(blocks)] = blocks
        for table, (frequencies, scales) in enumerate(self._turns):
            angles = batch.positions[:tokens, None] * frequencies
            batch.angles[table, :tokens, 0], batch.angles[table, :tokens, 1] = np.cos(angles) * scales, np.sin(angles) * scales
        self._run(self._own, self._team, 0, self._size)
        return batch.logits[: len(rows)]

    def close(self) -> None:
        """End the other threads. The model must not run afterwards."""
        self._end()

    def _product(self, matrices: Sequence[Stored], rows_are_read: bool = False) -> tuple[int, int]:
        """The parts of a product: the first, and the one behind the last."""
        first = len(self._parts)
        for matrix in matrices:
            out, groups, width = matrix.shape
            kind = INT8 if matrix.codes.dtype == np.int8 else INT4 if matrix.zeros is None else UINT4
            shared = 0 if matrix.least is None else matrix.least.shape[2]
            if not _known(matrix, groups, width, shared):
                raise UnknownGroups(f"a matrix has groups of {width} weights in {matrix.codes.dtype}, {groups} in a row")
            if half := not rows_are_read and HALVES and LEAST_HALF <= matrix.scales.max() <= MOST_HALF:
                scales = np.empty(matrix.scales.shape, np.float16)
                self._halved.append((scales, matrix.scales))
                matrix = matrix._replace(scales=scales)
            own = CHUNK if kind != INT8 else width  # groups of activations
            number = groups * width // own
            together = 0 if kind == INT8 else 2 if number % 4 else 4
            if (form := (kind, width, shared, int(half), together)) not in self._functions:
                self._functions[form] = [rows_product(*form, vectors, self._kept).address for vectors in VECTORS]
            fields = matrix.codes, matrix.zeros, matrix.scales, matrix.least, matrix.least_scales
            addresses = [0 if array is None else array.ctypes.data for array in fields]
            self._parts.append([together, own, out, number, *addresses, *self._functions[form]])
            self._alive.append(matrix)
        return first, len(self._parts)

    def _vector(self, source: Weights, names: Sequence[str]) -> int:
        """Where a small vector begins; -1 for none."""
        if not names:
            return -1
        at = self._length
        self._numbers.append(source.numbers(*names))
        self._length += len(self._numbers[-1])
        return at


def _halve(scales: tuple[np.ndarray, np.ndarray]) -> None:
    """Write the second into the first, of float16."""
    np.copyto(*scales, casting="same_kind")


def _known(matrix: Stored, groups: int, width: int, shared: int) -> bool:
    """Whether `row_product` knows such a matrix."""
    if matrix.codes.dtype == np.int8:
        return not width % CHUNK
    if matrix.codes.dtype != np.uint8 or groups * width % (2 * CHUNK):
        return False
    return width == CHUNK or (not width % (2 * CHUNK) and not shared)


def _end(team: np.ndarray, semaphores: Sequence[ctypes.c_void_p], others: Sequence[threading.Thread]) -> None:
    team[STOPPED * LINE] = 1
    for semaphore in semaphores:
        ctypes.CDLL(None).sem_post(semaphore)
    for thread in others:
        thread.join()


def few_tokens(source: Weights, config: ModelConfig, *rest: Any) -> FewTokens | None:
    """`FewTokens` with these arguments, compiled again if what was kept is damaged, or cannot be kept; None if that fails."""
    for kept in (KEEPS, False):
        try:
            return FewTokens(source, config, *rest, kept=kept)
        except UnknownGroups as error:
            log.info("few tokens take the graph: %s", error)
            return None
        except Exception as error:  # numba's, LLVM's, or the disk's: the graph can do without all of them
            what = "it is compiled again, and not kept" if kept else "few tokens take the graph"
            log.warning("what few tokens take cannot be compiled, or kept in %s (%r); %s", FOLDER, error, what)
            forget()
    return None
