"""The packed matrices of a folder's safetensors files under the names of the model's own, as numbers and as `Blocks`.

`packing.py` knows the layouts. This module does not know config.json.
"""

from collections.abc import Mapping

import numpy as np

from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.config import ModelConfig
from stallfree.checkpoint.families import FAMILIES
from stallfree.checkpoint.folding import fused_rows
from stallfree.checkpoint.packing import Packing
from stallfree.checkpoint.tensor_file import WORDS, Entry, read_tensor

PARTS = (
    "qweight", "qzeros", "scales", "g_idx",
    "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
)  # fmt: skip
"""The ends of the names of what a packed matrix is stored as."""


class PackedMatrices:
    """The packed matrices among `tensors`, under the names that `config` has for them. `source`: of messages.

    `shapes`: theirs, [out, in]. `rest`: the other tensors. A bias of zeros that the model does not have is left out: GPTQ's tools
    write one for each matrix.
    """

    def __init__(self, packing: Packing, config: ModelConfig, tensors: Mapping[str, Entry], source: str) -> None:
        self._packing, self._tensors, self._source = packing, dict(tensors), source
        self._whole = packing.matrices({name: shape for name, (_, _, shape, _) in tensors.items()})
        self._rows: dict[str, tuple[str, slice]] = {}
        for name, (rows, _) in self._whole.items():
            module = name.split(".")[-2]
            parts = fused_rows(config).get(module, {}) if FAMILIES[config.family].fused else {}
            at = 0
            for part, height in (parts or {module: rows}).items():
                self._rows[name.replace(module, part)] = name, slice(at, at + height)
                at += height
        self.shapes = {name: (rows.stop - rows.start, self._whole[of][1]) for name, (of, rows) in self._rows.items()}
        ends, wanted = tuple(f".{part}" for part in PARTS), config.tensors()
        self.rest = {
            name: entry
            for name, entry in tensors.items()
            if not (name.endswith(ends) and f"{name.rpartition('.')[0]}.weight" in self._whole)
            and not (name.endswith(".bias") and name not in wanted and not read_tensor(self._tensors, name).any())
        }

    def dense(self, name: str) -> np.ndarray:
        """Matrix `name`, [out, in] float32. Raises CheckpointError if its parts do not fit together."""
        whole, rows = self._rows[name]
        values = self._packing.dense(self._stored, self._tensors, whole, self._whole[whole], self._source)
        return np.ascontiguousarray(values[rows])

    def blocks(self, name: str) -> Blocks:
        """The same with its own codes; for `codes` only."""
        whole, rows = self._rows[name]
        blocks = self._packing.blocks(self._stored, self._tensors, whole, self._whole[whole], self._source)
        return Blocks(*(part[rows] for part in blocks))

    @property
    def codes(self) -> dict[str, str]:
        """The matrices whose inputs of a group are side by side, with the form of their codes."""
        usual = {
            whole: self._packing.side_by_side(self._stored, self._tensors, whole, shape) for whole, shape in self._whole.items()
        }
        return {name: "int4" for name, (whole, _) in self._rows.items() if usual[whole]}

    def _stored(self, name: str) -> np.ndarray:
        """A tensor in the type that it has in the file, if that is one of whole numbers; otherwise as float32."""
        file, kind, shape, offset = self._tensors[name]
        if kind not in WORDS:
            return read_tensor(self._tensors, name)
        values = np.fromfile(file, WORDS[kind], int(np.prod(shape)), offset=offset)
        return values.reshape(shape)  # a ValueError if the file ends early
