"""gpt-oss's experts as folders hold them: in each layer one tensor for all, in which the outputs of gate and up alternate.

Matrices are [experts, in, out] in 16 or 32 bits, or MXFP4: `_blocks` [experts, out, in / 32, 16 bytes] and `_scales` [experts, out,
in / 32]. MXFP4 has 4 bits for a number, and a scale for each 32 (OCP Microscaling Formats 1.0, sections 5.3.3 and 6.3). This module
takes the experts out of these tensors. It does not know config.json.
"""

from collections.abc import Mapping
from itertools import product
from typing import NamedTuple

import numpy as np

from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.config import ModelConfig
from stallfree.checkpoint.dimensions import CheckpointError
from stallfree.checkpoint.families import Experts
from stallfree.checkpoint.tensor_file import BITS, TYPES, Entry, read_tensor

BLOCK = 32
"""Numbers that share a scale."""
EVEN, ODD, ALL = slice(0, None, 2), slice(1, None, 2), slice(None)
STACKS = (("gate_up_proj", EVEN), ("gate_up_proj", ODD), ("down_proj", ALL))
"""Where gate, up and down are: the tensor, and which of its outputs."""


class Part(NamedTuple):
    """Some outputs of one expert: of its matrix [in, out] or its bias [out]; with `scales`, of its blocks [out, in / 32, 16]."""

    values: Entry
    outputs: slice
    scales: Entry | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] of a matrix, [out] of a bias."""
        shape = self.values[2]
        if self.scales is not None:
            return (len(range(shape[0])[self.outputs]), shape[1] * BLOCK)
        return (len(range(shape[-1])[self.outputs]), *shape[:-1])


def unstacked(config: ModelConfig, mixture: Experts, tensors: Mapping[str, Entry]) -> tuple[dict[str, Entry], dict[str, Part]]:
    """`tensors` without those of all experts, and the experts' own matrices and biases under their names in `config`. Raises
    CheckpointError for a tensor of another number of experts, and for scales that do not fit their blocks."""
    taken, parts = set[str](), dict[str, Part]()
    for layer, (place, (stack, outputs)) in product(range(config.num_layers), enumerate(STACKS)):
        stored = f"model.layers.{layer}.mlp.experts.{stack}"
        names = [f"{stored}{end}" for end in ("", "_bias", "_blocks", "_scales")]
        plain, bias, blocks, scales = (tensors.get(name) for name in names)
        taken.update(names)
        for expert in range(config.experts):
            name = f"model.layers.{layer}.{mixture.matrices(expert)[place]}"
            if plain:
                parts[f"{name}.weight"] = Part(_one(plain, 3, config.experts, expert), outputs)
            elif blocks and scales:
                packed, shared = _one(blocks, 4, config.experts, expert), _one(scales, 3, config.experts, expert)
                if packed[2][:-1] != shared[2]:
                    raise CheckpointError(
                        f"{blocks[0]}: {stored}_scales do not fit the blocks; the file is damaged, fetch it again"
                    )
                parts[f"{name}.weight"] = Part(packed, outputs, shared)
            if bias:
                parts[f"{name}.bias"] = Part(_one(bias, 2, config.experts, expert), outputs)
    return {name: entry for name, entry in tensors.items() if name not in taken}, parts


def _one(whole: Entry, rank: int, experts: int, expert: int) -> Entry:
    """The part of number `expert` of `experts` in a tensor of `rank` dimensions."""
    file, kind, shape, offset = whole
    if len(shape) != rank or shape[0] != experts or (rank == 4 and shape[-1] != BLOCK // 2):
        raise CheckpointError(f"{file}: a tensor of {experts} experts cannot have shape {shape}; it is of another model")
    width = np.dtype(TYPES.get(kind, np.uint8)).itemsize
    return file, kind, shape[1:], offset + expert * width * int(np.prod(shape[1:]))


def read_part(part: Part) -> np.ndarray:
    """The values, [*shape] float32, freshly allocated. Raises CheckpointError as `read_tensor` does."""
    if part.scales is None:
        values = read_tensor({"expert": part.values}, "expert")
        return np.ascontiguousarray(values[..., part.outputs].T)
    return part_blocks(part).dense()


def part_blocks(part: Part) -> Blocks:
    """A matrix in MXFP4. Raises CheckpointError as `read_part` does."""
    if part.scales is None:
        raise KeyError("this expert is not in MXFP4")
    blocks, scales = (_bytes(entry)[part.outputs] for entry in (part.values, part.scales))
    return Blocks.of_mxfp4(blocks.reshape(len(blocks), -1), scales)


def _bytes(entry: Entry) -> np.ndarray:
    file, kind, shape, offset = entry
    if kind != BITS:
        raise CheckpointError(f"{file}: MXFP4 experts are {kind}, expected {BITS}; fetch the file again")
    values = np.fromfile(file, np.uint8, int(np.prod(shape)), offset=offset)
    if values.size != np.prod(shape):
        raise CheckpointError(f"{file}: an expert's tensor ends early; the file changed after it was opened")
    return values.reshape(shape)
