"""The common part of the model families: embedding, rotary positions, layers over a paged KV cache, head; for one rank's part of
some of the layers. It does not know what is in a layer (the family's file does), or how ranks add their parts (`parallel` does).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from stallfree.checkpoint import ModelConfig
from stallfree.executors.torch.attention import Cache, attend
from stallfree.executors.torch.batch import Batch
from stallfree.executors.torch.fused import Turns, keep
from stallfree.executors.torch.lora import adapt
from stallfree.executors.torch.parallel import Ranks
from stallfree.executors.torch.placed import Placed
from stallfree.executors.torch.striped import Striped
from stallfree.executors.torch.weights import Matrix, Weights


class Model(ABC):
    """The `layers` of a model of `config`, with the embedding if the first layer is among them, and the head if the last is."""

    embedding = "model.embed_tokens.weight"
    """The name of the embedding's tensor in the checkpoint."""
    recordable = True
    """Whether an iteration launches the same kernels for any values in the tensors."""

    def __init__(self, config: ModelConfig, weights: Weights, ranks: Ranks, layers: range, max_model_len: int):
        self.config, self.layers = config, layers
        self._ranks, self._dtype = ranks, weights.dtype
        self._first, self._last = layers.start == 0, layers.stop == config.num_layers
        self.num_heads = config.num_heads // ranks.size
        self.num_kv_heads = max(1, config.num_kv_heads // ranks.size)
        self._embedding = weights.vocabulary(self.embedding) if self._first else None
        self._head: Matrix | None = None
        if self._last:
            tied = config.tie_embeddings
            self._head = (
                self._embedding if tied and self._first else weights.vocabulary(self.embedding if tied else "lm_head.weight")
            )
            self._norm = self.norm(weights)
        self._layers = [self.layer(weights, number) for number in layers]
        self._turns = [config.turns(number) for number in layers]
        self._tables = {turns: _tables(*turns, max_model_len, weights.device) for turns in dict.fromkeys(self._turns)}

    @abstractmethod
    def layer(self, weights: Weights, number: int) -> Any:
        """The weights of layer `number`, for `block`."""

    @abstractmethod
    def block(
        self, layer: Any, hidden: torch.Tensor, delta: torch.Tensor | None, batch: Batch, turns: Turns, cache: Cache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`hidden` and `delta` after a layer, both [tokens, hidden]. Their sum is the layer's output; the next norm adds them."""

    @abstractmethod
    def norm(self, weights: Weights) -> Any:
        """The weights of the norm before the head, for `normed`."""

    @abstractmethod
    def normed(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        """`x` normalised in its last dimension."""

    def __call__(
        self,
        batch: Batch,
        hidden: torch.Tensor | None,
        caches: list[Cache],
        computed: Callable[[int], None] = lambda layers: None,
    ) -> torch.Tensor:
        """From tokens, or the previous stage's output [tokens, hidden], to the logits [rows, vocabulary] float32 of the batch's
        `rows`, or to the next stage's input. `computed` is called after each layer, with the number of layers so far.
        """
        if batch.striped is not None and not len(batch.tokens):
            hidden = self._assist(batch.striped, caches)
            return self._logits(hidden, batch) if self._last else hidden
        if hidden is None:
            hidden = self._embed(batch.tokens)
        turns = {kind: (cos[batch.positions], sin[batch.positions]) for kind, (cos, sin) in self._tables.items()}
        delta = None
        for number, (layer, kind, cache) in enumerate(zip(self._layers, self._turns, caches, strict=True), 1):
            hidden, delta = self.block(layer, hidden, delta, batch, turns[kind], cache)
            computed(number)
        hidden = hidden if delta is None else hidden + delta
        return self._logits(hidden[batch.rows], batch) if self._last else hidden

    def attention(
        self,
        qkv: torch.Tensor,
        batch: Batch,
        turns: Turns,
        cache: Cache,
        window: int = 0,
        norms: Any = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The attention's output, [tokens, heads x head size]. `qkv`: queries, keys and values side by side. `norms`: of queries
        and keys, if there are any. `sinks`: see `attention.attend`.
        """
        heads, kv_heads = self.num_heads, self.num_kv_heads
        q, k, v = qkv.view(len(qkv), -1, self.config.head_dim).split([heads, kv_heads, kv_heads], 1)
        if norms is not None:
            q, k = (
                self.normed(x.reshape(len(qkv), -1, len(norm)), norm).view(x.shape) for x, norm in zip((q, k), norms, strict=True)
            )
        q = keep(q, k, v, turns, cache if batch.striped is None else batch.striped.written(cache), batch.slots)
        return attend(q, *cache, batch, window, sinks).reshape(len(qkv), -1)

    def adapted(self, site: str, x: torch.Tensor, product: torch.Tensor, batch: Batch, cache: Cache) -> torch.Tensor:
        """`product`, the result of the site's matrix for `x`, with what the batch's adapters add. It is changed in place."""
        if batch.adapted is not None:
            adapt(batch.adapted, site, x, product, cache)
        return product

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' parts."""
        return self._ranks.add(values)

    def _assist(self, striped: Striped | Placed, caches: list[Cache]) -> torch.Tensor:
        """Take part in the attention of other groups' tokens. Returns the layers' output for no token."""
        none = caches[0][0].new_empty(0, self.num_heads, self.config.head_dim, dtype=self._dtype)
        for number, cache in zip(self.layers, caches, strict=True):
            striped.attend(none, *cache, self.config.windows[number], None)
        return none.new_empty(0, self.config.hidden_size)

    def _logits(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The logits of the rows `hidden` [rows, hidden], [rows, vocabulary] float32; of groups of ranks, the first has all rows
        and the others none."""
        if batch.striped is not None:
            hidden = batch.striped.gathered(hidden)
        if self._head is None or not len(hidden):
            return hidden.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        return self._ranks.join(self._head(self.normed(hidden, self._norm)).float(), self.config.vocab_size)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._embedding is None:
            raise ValueError("this stage has no embedding; pass the output of the previous stage as `hidden`")
        if self._ranks.size == 1:
            return self._embedding.rows(tokens, self._dtype)
        height = -(-self.config.vocab_size // self._ranks.size)
        local = tokens - self._ranks.rank * height
        is_local = (local >= 0) & (local < height)
        return self.add(self._embedding.rows(local.where(is_local, 0), self._dtype) * is_local[:, None])


def _tables(
    frequencies: tuple[float, ...], scale: float, max_model_len: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles of each position, [positions, head size / 2] float32."""
    turning = torch.tensor(frequencies, dtype=torch.float64)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float64), turning)
    scales = torch.where(turning > 0, scale, 1.0)
    return (scales * angles.cos()).to(device, torch.float32), (scales * angles.sin()).to(device, torch.float32)
