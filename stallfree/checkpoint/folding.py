"""What differs between families and can be had by changing the weights once, when they are read: factors, shifts, and the order of
rows. No executor knows of it.

A factor on a matrix's output is a factor on its rows. So the multipliers of Granite, the scaled embedding of Gemma and any scale of
attention go into matrices and norms. A norm that multiplies by 1 + weight has weights that are larger by 1. Rotary positions on a
part of the head are positions on all of it, of which some turn by nothing; that needs the two of each pair half a head apart, and
queries and keys may have any order, as long as it is the same for both.
"""

import math
from collections.abc import Callable

import numpy as np

from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.config import ModelConfig
from stallfree.checkpoint.dimensions import Dimensions

Read = Callable[[str], np.ndarray]


def folded(config: ModelConfig, read: Read, name: str) -> np.ndarray:
    """Tensor `name`, [*shape] float32, as the executors want it. `read` gives it as it is in the file."""
    values = read(name)
    module = name.split(".")[-2]
    if config.norm_shift and "norm" in module:
        values += np.float32(config.norm_shift)
    if (factor := config.factor(name)) != 1:
        values *= np.float32(factor)
    order = _rows(config, name, len(values))
    return values if order is None else values[order]


def folded_blocks(config: ModelConfig, read: Callable[[str], Blocks], name: str) -> Blocks:
    """As `folded`, for a matrix that `read` gives as blocks."""
    blocks, factor = read(name), config.factor(name)
    order = _rows(config, name, len(blocks.codes))
    blocks = blocks if order is None else blocks.ordered(order)
    return blocks if factor == 1 else blocks.times(factor)


def _rows(config: ModelConfig, name: str, rows: int) -> np.ndarray | None:
    """`rotary_order` for all heads of a matrix or bias of `rows` rows; None for those that it does not concern."""
    if name.split(".")[-2] not in ("q_proj", "k_proj") or (order := rotary_order(config)) is None:
        return None
    return np.arange(rows).reshape(-1, config.head_dim)[:, order].ravel()


def rotary_order(config: ModelConfig) -> np.ndarray | None:
    """The order of the rows of a head that puts the two of each rotary pair half a head apart; None if they are already."""
    half = config.rotated // 2
    if config.rotated == config.head_dim:
        return None
    rest = np.arange(config.rotated, config.head_dim)
    first, second = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    return np.concatenate([np.arange(half), first, np.arange(half, config.rotated), second])


def granite(sizes: Dimensions, embedding: float, logits: float, residual: float, attention: float) -> tuple[tuple[str, float], ...]:
    """Granite's multipliers: of the embedding, the divisor of the logits, of what attention and FFN add, and of a query and a
    key."""
    head = 1 / logits / (embedding if sizes.tie_embeddings else 1)
    return (
        ("embed_tokens", embedding),
        ("model.norm", head),
        ("o_proj", residual),
        ("down_proj", residual),
        ("q_proj", attention * math.sqrt(sizes.head_dim)),
    )


def gemma(sizes: Dimensions, scalar: float) -> tuple[tuple[str, float], ...]:
    """Gemma's embedding is scaled by the root of its width, and a query and a key by that of `scalar`."""
    scale = math.sqrt(sizes.hidden_size)
    head = 1 / scale if sizes.tie_embeddings else 1.0
    return ("embed_tokens", scale), ("model.norm", head), ("q_norm", math.sqrt(sizes.head_dim / scalar))


def fused_rows(sizes: Dimensions) -> dict[str, dict[str, int]]:
    """The matrices of which a fused one is made, with their rows, in order."""
    query, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    return {
        "qkv_proj": {"q_proj": query, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": sizes.ffn_size, "up_proj": sizes.ffn_size},
    }
