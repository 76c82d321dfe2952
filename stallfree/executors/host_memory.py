"""How much of this machine's memory a model and its KV cache take on a processor, and whether they fit. The sizes come from the
headers of the checkpoint, so nothing has to be loaded. It does not know how executors allocate.
"""

import math
from collections.abc import Sequence

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.executors.machine import memory

WEIGHT_BYTES = {"int4": 0.625, "int8": 1.0625, "fp8": 1.0, "bf16": 2.0, "fp16": 2.0, "f32": 4.0}
"""Bytes of a matrix's number in each format, with the scales in float32 that 64 numbers share (int4 also has an offset)."""

OWN_BYTES = {"int4": 0.66, "e2m1": 0.66, "int8": 1.125}
"""Bytes of a matrix's number that keeps the file's bits, with the scales in float32 that 32 numbers share (4 bits: and a least
number in 8 bits)."""

KV_BYTES = {"u4": 1.5, "u8": 2.0, "fp8": 2.0, "bf16": 4.0, "fp16": 4.0, "f32": 8.0}
"""Bytes of a key's and a value's number together, in each format of the KV cache."""

KV_SCALES = {"u4": 16, "u8": 16}
"""Bytes that a key and a value of a head have besides: each a scale and a zero point in float32."""

MOST_KV = 4 << 30
"""The default KV cache takes at most this many bytes."""

SPARE = 0.9
"""The share of the free memory that weights and KV may take by default. The rest is for the runtime and for iterations."""

FEW_TOKENS = 512
"""A KV cache for fewer tokens than this is no advice: it would hold one short chat."""


def check_memory(needed: int) -> None:
    """Raises MemoryError if a KV cache of `needed` bytes does not fit."""
    room = memory()
    if room is not None and needed > room.free:
        raise MemoryError(
            f"the KV cache needs {gib(needed)} and {gib(room.free)} of memory ({room}) is available; "
            "give a smaller kv_bytes (--kv-memory on the command line), or store KV in fewer bits"
        )


def default_kv_bytes(weights: int) -> int:
    """The default size of the KV cache, in bytes: a quarter of the free memory, at most `MOST_KV`, and at most what `weights`
    bytes, which are still to be loaded, leave of `SPARE`."""
    room = memory()
    return MOST_KV if room is None else max(0, min(room.free // 4, int(SPARE * room.free) - weights, MOST_KV))


def weight_bytes(checkpoint: Checkpoint, form: str) -> int:
    """Bytes of the weights with matrices in the format `form`; in "file", those that keep the file's bits, and the others int8. For
    a format that is not in `WEIGHT_BYTES`: as in the files."""
    if form not in WEIGHT_BYTES and form != "file":
        return checkpoint.num_bytes

    def each(name: str, rank: int) -> float:
        if rank < 2:
            return 4
        return OWN_BYTES.get(checkpoint.codes.get(name, ""), WEIGHT_BYTES["int8"]) if form == "file" else WEIGHT_BYTES[form]

    return sum(math.ceil(math.prod(shape) * each(name, len(shape))) for name, shape in checkpoint.config.tensors().items())


def kv_bytes_per_token(config: ModelConfig, kv: str) -> int:
    """Bytes of the keys and values of a token in the format `kv`, one of `KV_BYTES`."""
    return math.ceil(config.num_layers * config.num_kv_heads * (config.head_dim * KV_BYTES[kv] + KV_SCALES.get(kv, 0)))


def check_model(checkpoint: Checkpoint, weights: str, kv: str, kv_bytes: int, formats: Sequence[str], copies: int = 1) -> None:
    """Raises MemoryError if `copies` of the weights do not fit beside `kv_bytes` of KV. Nothing has been loaded yet. `formats`:
    those that the executor has for weights, for the advice."""
    room, size = memory(), copies * weight_bytes(checkpoint, weights)
    if room is None or (kv_bytes and size + kv_bytes <= room.free):
        return
    what = f"{weights} weights take" if copies == 1 else f"{copies} copies of {weights} weights take"
    raise MemoryError(
        f"{checkpoint.path.name} does not fit: {what} {gib(size)} and the KV cache {gib(kv_bytes)}, and {gib(room.free)} of memory "
        f"({room}) is available; {what_fits(checkpoint, weights, kv, room.free // copies, formats)}"
        + (" for each copy; or take fewer groups (--sp)" if copies > 1 else "")
    )


def what_fits(checkpoint: Checkpoint, weights: str, kv: str, free: int, formats: Sequence[str]) -> str:
    """What to change so that the model fits `SPARE` of `free` bytes: the KV cache, or the format of the weights, or the model."""
    least = FEW_TOKENS * kv_bytes_per_token(checkpoint.config, kv)
    sizes = {form: weight_bytes(checkpoint, form) for form in formats}
    free = int(SPARE * free)
    left = free - weight_bytes(checkpoint, weights)
    if left >= least:
        return f"give --kv-memory {mib(left)} or less"
    if smaller := [form for form, size in sizes.items() if size + least <= free]:
        best = max(smaller, key=lambda form: sizes[form])
        return f"give --weights {best}, which take {gib(sizes[best])}"
    most = checkpoint.config.parameters * max(0, free - least) / min(sizes.values())
    return f"take a model of at most {most / 1e9:.2g} billion weights, or allow this process more memory"


def gib(num_bytes: float) -> str:
    """Bytes in GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def mib(num_bytes: int) -> str:
    """Bytes in whole MiB, as the command line takes them."""
    return f"{num_bytes // 2**20}MiB"
