"""Which models can compute a few tokens without the graph: what `step.py` knows, and what memory allows. It loads nothing."""

import sys

from stallfree.checkpoint import Checkpoint
from stallfree.executors.host_memory import gib, weight_bytes
from stallfree.executors.machine import memory
from stallfree.executors.openvino.weights import quantisation_group

SHARE = 8
"""Weights may be this part of the memory. The runtime has packed a copy of them, and those that are read here are another: pages of
the file that keeps them, which the system may take back."""


def obstacle(checkpoint: Checkpoint, weights: str, kv: str, copies: int = 2) -> str:
    """What this way lacks, or wants, for the model, in words; "" if it can be taken. `copies`: 1 if the graph packs no weights."""
    config, room = checkpoint.config, memory()
    if sys.platform != "linux":
        return f"needs Linux's semaphores, and this is {sys.platform}"
    if config.mixture is not None or config.sinks:
        return f"knows no {'mixtures of experts' if config.mixture is not None else 'attention sinks'}"
    if weights not in ("int8", "file") or kv != "u8":
        return f"knows weights 'int8' and 'file' with KV 'u8', not {weights!r} with {kv!r}"
    if config.head_dim % 32 or not quantisation_group(config):
        return f"wants sizes of a multiple of 32; a head has {config.head_dim}, the hidden state {config.hidden_size}"
    if copies > 1 and room is not None and SHARE * (needed := weight_bytes(checkpoint, weights)) > room.limit:
        return f"reads a second copy of the weights, and their {gib(needed)} are more than an eighth of memory ({room})"
    return ""
