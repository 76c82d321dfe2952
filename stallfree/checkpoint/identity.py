"""A short name for the contents of a checkpoint's or an adapter's files, to see whether two engines have the same.

It hashes sizes and a sample of the bytes, so gigabytes take milliseconds. It does not protect against deliberate forgery.
"""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.adapter import WEIGHTS, Adapter
from stallfree.checkpoint.adapter_config import CONFIG
from stallfree.checkpoint.safetensors import quantisation

PIECES, PIECE = 256, 4096
"""Pieces of each file that are hashed, evenly spread, and bytes of a piece. A smaller file is hashed whole. Different weights of
one shape differ everywhere."""


def identity(checkpoint: Checkpoint) -> str:
    """The same name for copies of the same files in any place; another one for other weights or another configuration."""
    packed = quantisation(checkpoint.path) if checkpoint.metadata is None else None
    return _name(repr(checkpoint.config) + (repr(packed) if packed else ""), checkpoint.files)


def adapter_identity(adapter: Adapter) -> str:
    """As `identity`, for an adapter. Raises OSError if its files cannot be read."""
    return _name("", [adapter.path / CONFIG, adapter.path / WEIGHTS])


def _name(text: str, files: Iterable[Path]) -> str:
    digest = blake2b(text.encode(), digest_size=12)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}".encode())
        with file.open("rb", buffering=0) as opened:
            if size <= PIECES * PIECE:
                digest.update(opened.read())
                continue
            for number in range(PIECES):
                opened.seek(number * (size - PIECE) // (PIECES - 1))
                digest.update(opened.read(PIECE))
    return digest.hexdigest()
