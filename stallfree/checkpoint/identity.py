"""Is it the same model? A short name for what is in a checkpoint's files, from their sizes and a sample of their bytes: a file
of gigabytes is told from another one in milliseconds. It is no proof against somebody who wants to deceive.
"""

from hashlib import blake2b

from stallfree.checkpoint import Checkpoint

PIECES, PIECE = 256, 4096
"""How many pieces of each file are looked at, evenly spread, and their bytes: other weights of the same shape differ everywhere."""


def identity(checkpoint: Checkpoint) -> str:
    """The same for copies of the same files, wherever they lie; another for other weights, or other numbers in config.json."""
    digest = blake2b(repr(checkpoint.config).encode(), digest_size=12)
    for file in checkpoint.files:
        size = file.stat().st_size
        digest.update(f"{size}".encode())
        with file.open("rb") as opened:
            for number in range(PIECES):
                opened.seek(number * max(0, size - PIECE) // (PIECES - 1))
                digest.update(opened.read(PIECE))
    return digest.hexdigest()
