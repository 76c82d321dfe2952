"""A LoRA adapter on disk, as the library PEFT writes it, checked against the model that it is for.

An adapter adds scale * B A to some matrices of its base model (Hu et al. 2021, arXiv 2106.09685). The file with the weights decides
which; a configuration that contradicts it is refused. A server may have ten thousand adapters, so an open one takes little memory.
It never unpickles. It does not know executors, or which adapters a server has.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from io import BufferedReader
from pathlib import Path

import numpy as np

from stallfree.checkpoint.adapter_config import AGAIN, CONFIG, MERGE, AdapterConfig, read_config
from stallfree.checkpoint.config import ModelConfig
from stallfree.checkpoint.dimensions import CheckpointError
from stallfree.checkpoint.tensor_file import TYPES, Entry, as_float32, header_bytes, parse_header

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer that an adapter can change."""

PLACES = {module: f"{'self_attn' if module in MODULES[:4] else 'mlp'}.{module}" for module in MODULES}
"""The name of each module within a layer."""

MAX_RANK = 256
"""The largest rank of an adapter, unless the caller allows another one. It bounds the memory of an adapter. PEFT's default is 8."""

PART = 1 << 18
"""Bytes of float32 numbers that are read together, about: so few that they stay in a processor's cache, and so many that each
operation on them lets other threads run."""

WEIGHTS = "adapter_model.safetensors"

KEY = re.compile(r"base_model\.model\.model\.layers\.(0|[1-9]\d{0,5})\.(\w+\.\w+)\.lora_(A|B)\.weight", re.ASCII)

KINDS = tuple(TYPES)

PAIR = np.dtype([("rank", "u4"), ("scale", "f8"), ("A", "i8"), ("B", "i8"), ("A kind", "u1"), ("B kind", "u1")])
"""One module in one layer: its rank, 0 if the adapter does not change it; the factor on B; where the bytes of A and of B begin in
the file; their types, as indices of `KINDS`."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that fits its base model. Its tensors are not read yet.

    `rank`: the largest of any module; smaller ones are padded to it with zeros. `modules`: those of `MODULES` that it changes in
    any layer. `shapes`: [out, in] of each module. `pairs`: an array [layers, modules] of `PAIR`. `stamp`: the size of the file in
    bytes and the time when it was changed, in ns. A file that was replaced has other offsets.
    """

    path: Path
    rank: int
    modules: frozenset[str]
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    pairs: np.ndarray = field(repr=False, compare=False)
    stamp: tuple[int, int] = field(repr=False)

    def parts(self) -> Iterator[tuple[str, range]]:
        """All weights in parts, each of one module and some layers: what `read` takes."""
        for module in (module for module in MODULES if module in self.modules):
            step = max(1, PART // (4 * self.rank * max(self.shapes[module])))
            for first in range(0, len(self.pairs), step):
                yield module, range(first, min(first + step, len(self.pairs)))

    def read(self, module: str, layers: range) -> tuple[np.ndarray, np.ndarray]:
        """A [layers, rank, in] and B [layers, out, rank], float32, fresh, B times its scale; zeros where the adapter changes
        nothing. It opens the file once, and works on all layers together: operations on many numbers let other threads run. Raises
        CheckpointError for weights that are not finite or a file that has changed, and OSError if the disk fails."""
        (out, inner), pairs = self.shapes[module], self.pairs[layers.start : layers.stop, MODULES.index(module)]
        a = np.zeros((len(layers), self.rank, inner), np.float32)
        b = np.zeros((len(layers), out, self.rank), np.float32)
        with (self.path / WEIGHTS).open("rb") as stream, np.errstate(over="ignore", invalid="ignore"):
            if _stamp(stream.fileno()) != self.stamp:
                raise CheckpointError(f"{stream.name}: the file changed after it was opened; load the adapter again")
            for number, (rank, _, a_offset, b_offset, a_kind, b_kind) in enumerate(pairs.tolist()):
                if rank:
                    a[number, :rank] = _numbers(stream, a_offset, KINDS[a_kind], (rank, inner))
                    b[number, :, :rank] = _numbers(stream, b_offset, KINDS[b_kind], (out, rank))
            b *= pairs["scale"].astype(np.float32)[:, None, None]
        for half, values in (("A", a), ("B", b)):
            if not np.isfinite(values).all():
                number = int(np.argmin(np.isfinite(values).all(axis=(1, 2))))
                name = f"base_model.model.model.layers.{layers[number]}.{PLACES[module]}.lora_{half}.weight"
                times = f" times its scale {pairs['scale'][number]:g}" if half == "B" else ""
                what = f"tensor {name!r}{times} holds NaN or infinity"
                raise CheckpointError(f"{self.path / WEIGHTS}: {what}; fetch or train it again")
        return a, b

    def check(self) -> None:
        """Read everything once. Raises as `read` does."""
        for module, layers in self.parts():
            self.read(module, layers)


def _numbers(stream: BufferedReader, offset: int, kind: str, shape: tuple[int, int]) -> np.ndarray:
    """A tensor of a file as float32."""
    stream.seek(offset)
    values = np.empty(shape, TYPES[kind])
    if stream.readinto(values.data.cast("B")) != values.nbytes:
        raise CheckpointError(f"{stream.name}: the file ends early; it changed after it was opened, load the adapter again")
    return as_float32(values, kind)


def open_adapter(folder: str | Path, config: ModelConfig, max_rank: int = MAX_RANK) -> Adapter:
    """Open the PEFT folder of an adapter whose base model has `config`. Reads adapter_config.json and the header of the weights.
    Raises CheckpointError if the adapter cannot be used, or if one of its ranks is above `max_rank`."""
    path, shapes = Path(folder), module_shapes(config)
    if not shapes:
        raise CheckpointError(f"{path}: the family {config.family} cannot have adapters: it has none of {', '.join(MODULES)}")
    try:
        settings = read_config(path)
        file = _weights(path)
        stamp, header = _stamp(file), header_bytes(file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        pairs = _pairs(*header, settings, config, max_rank)
    except CheckpointError as error:
        raise CheckpointError(f"{path}{os.sep}{error}") from None
    modules = frozenset(MODULES[place] for place in np.flatnonzero(pairs["rank"].any(axis=0)))
    return Adapter(path, int(pairs["rank"].max()), modules, shapes, pairs, stamp)


@lru_cache(maxsize=64)
def _pairs(raw: bytes, file_bytes: int, settings: AdapterConfig, config: ModelConfig, max_rank: int) -> np.ndarray:
    """[layers, modules] of `PAIR`, from a file's header. Thousands of adapters have the same few headers, and share the result. Its
    errors do not say in which folder the file is."""
    shapes = module_shapes(config)
    halves: dict[tuple[int, str], dict[str, Entry]] = {}
    for name, entry in parse_header(Path(WEIGHTS), raw, file_bytes).items():
        layer, module, half = _parsed(name, config, shapes)
        halves.setdefault((layer, module), {})[half] = entry
    if not halves:
        raise CheckpointError(f"{WEIGHTS}: no tensors; {AGAIN}")
    pairs = np.zeros((config.num_layers, len(MODULES)), PAIR)
    for (layer, module), pair in halves.items():
        pairs[layer, MODULES.index(module)] = _pair(layer, module, pair, shapes[module], settings, max_rank)
    for number, module in enumerate(MODULES):
        pairs["scale"][:, number] *= config.factor(f"{module}.weight")  # what is added to a product must have its factor, too
    pairs.flags.writeable = False
    return pairs


@lru_cache(maxsize=16)
def module_shapes(config: ModelConfig) -> Mapping[str, tuple[int, int]]:
    """[out, in] of those of `MODULES` that the layers of a model have."""
    tensors = config.tensors()
    names = {module: f"model.layers.0.{place}.weight" for module, place in PLACES.items()}
    return {module: (tensors[name][0], tensors[name][1]) for module, name in names.items() if name in tensors}


def _weights(path: Path) -> Path:
    if (file := path / WEIGHTS).is_file():
        return file
    if others := sorted(other.name for kind in ("*.bin", "*.pt", "*.pth") for other in path.glob(kind)):
        why = f"only {others[0]}, and pickled weights are never loaded: they can run code"
        raise CheckpointError(f"{file}: missing; there is {why}; save it again with safe_serialization=True")
    raise CheckpointError(f"{file}: missing; the adapter is incomplete, fetch it again")


def _stamp(file: Path | int) -> tuple[int, int]:
    """Of a file, or of an open one by its descriptor."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _parsed(name: str, config: ModelConfig, shapes: Mapping[str, tuple[int, int]]) -> tuple[int, str, str]:
    """The layer, the module and the half, A or B, of a tensor. Raises CheckpointError if the model has no such module."""
    match = KEY.fullmatch(name)
    module = match[2].rpartition(".")[2] if match else ""
    if match is None or module not in shapes or PLACES[module] != match[2]:
        known = ", ".join(shapes)
        raise CheckpointError(
            f"{WEIGHTS}: tensor {name!r} is not A or B of a module that an adapter of a {config.family} model can change "
            f"({known}); {MERGE}"
        )
    layer = int(match[1])
    if layer >= config.num_layers:
        raise CheckpointError(
            f"{WEIGHTS}: tensor {name!r} is for layer {layer}, the model has layers 0 to {config.num_layers - 1}; "
            f"the adapter is for another base model"
        )
    return layer, module, match[3]


def _pair(
    layer: int, module: str, halves: Mapping[str, Entry], shape: tuple[int, int], settings: AdapterConfig, max_rank: int
) -> tuple[int, float, int, int, int, int]:
    """A `PAIR`. Raises CheckpointError unless A and B fit each other, the module's `shape` and the configuration."""
    place = f"model.layers.{layer}.{PLACES[module]}"
    if missing := {"A", "B"} - halves.keys():
        raise CheckpointError(f"{WEIGHTS}: {place} lacks lora_{missing.pop()}; the file is incomplete, fetch it again")
    (_, a_kind, a_shape, a_offset), (_, b_kind, b_shape, b_offset) = halves["A"], halves["B"]
    for kind in (a_kind, b_kind):
        if kind not in TYPES:
            raise CheckpointError(f"{WEIGHTS}: {place} is {kind}; supported are {', '.join(TYPES)}")
    out, inner = shape
    rank = a_shape[0] if a_shape else 0
    if a_shape != (rank, inner) or b_shape != (out, rank):
        raise CheckpointError(
            f"{WEIGHTS}: {place} has A {list(a_shape)} and B {list(b_shape)}, the model needs [rank, {inner}] and [{out}, rank]; "
            f"the adapter is for another base model"
        )
    if not 0 < rank <= max_rank:
        allowed = f"allowed are 1 to {max_rank}; allow more (--max-adapter-rank), or train it with less"
        raise CheckpointError(f"{WEIGHTS}: {place} has rank {rank}, {allowed}")
    if rank != (said := settings.rank_of(place)):
        raise CheckpointError(f"{WEIGHTS}: {place} has rank {rank}, {CONFIG} says {said}; {AGAIN}")
    if not settings.targeted(layer, place):
        raise CheckpointError(f"{WEIGHTS}: {place} has weights, but {CONFIG} leaves it out; correct that, or {AGAIN}")
    return rank, settings.scale(place, rank), a_offset, b_offset, KINDS.index(a_kind), KINDS.index(b_kind)
