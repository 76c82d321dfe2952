"""A model on disk: its numbers, its tensors under their Hugging Face names, and where its tokenizer is.

It knows nothing of what runs the model. `open_checkpoint` reads headers only; tensors are read when asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.config import ModelConfig
from stallfree.checkpoint.dimensions import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "ModelConfig", "open_checkpoint"]


def _none(name: str) -> Blocks:
    raise KeyError(f"{name!r} has no blocks")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model whose tensors have the right names and shapes, but are not read yet.

    `read(name)` gives one of `config.tensors()` as float32, freshly allocated. `metadata`: a GGUF file's key-value pairs as plain
    Python values, the tokenizer included; None for a folder, whose tokenizer files are in `path`. `files`: those with the tensors.
    `codes`: the quantised matrices whose own codes `blocks(name)` gives, with their form: int4, int8 or e2m1 (4 bits).
    """

    path: Path
    config: ModelConfig
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, object] | None
    files: tuple[Path, ...] = ()
    codes: Mapping[str, str] = field(default_factory=dict)
    blocks: Callable[[str], Blocks] = _none

    @property
    def num_bytes(self) -> int:
        """Of the files."""
        return sum(file.stat().st_size for file in self.files)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face folder. Raises CheckpointError (a ValueError) if it cannot be used."""
    path = Path(path)
    try:
        if path.is_dir():
            from stallfree.checkpoint.safetensors import read_folder

            return read_folder(path)
        if path.is_file():
            from stallfree.checkpoint.gguf import read_gguf

            return read_gguf(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    raise CheckpointError(f"{path}: no such file or folder; give a GGUF file or a Hugging Face folder")
