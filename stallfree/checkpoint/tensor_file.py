"""Single safetensors files: their header, which is JSON, and their tensors. Every size in a header is checked against the file
before use. It does not know which tensors a model has.
"""

import json
from pathlib import Path

import numpy as np

from stallfree.checkpoint.dimensions import CheckpointError

HEADER_LIMIT = 100 * 2**20
"""The longest header that the safetensors format allows, in bytes."""

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""The types of numbers that are read, as numpy's types of their bits."""

WORDS = {"I32": "<i4", "I64": "<i8"}
"""The types of whole numbers: packed codes, and counts."""

BITS = "U8"
"""The type of numbers that another format has packed into bytes."""

Entry = tuple[Path, str, tuple[int, ...], int]
"""A tensor in a file: the file, its type, its shape and the offset of its bytes."""


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor of a file, by name: the file, its type, its shape and the offset of its bytes. Raises CheckpointError for a
    damaged file."""
    return parse_header(file, *header_bytes(file))


def header_bytes(file: Path) -> tuple[bytes, int]:
    """The header of a file, which is JSON, and the size of the file in bytes. Raises CheckpointError if it is no such file."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if file_bytes < 8 or length > min(HEADER_LIMIT, file_bytes - 8):
            raise CheckpointError(f"{file}: not a safetensors file, or truncated at {file_bytes} bytes; fetch it again")
        return stream.read(length), file_bytes


def parse_header(file: Path, raw: bytes, file_bytes: int) -> dict[str, Entry]:
    """What `read_header` returns, from what `header_bytes` returns."""
    first = 8 + len(raw)
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        tensors = {}
        for name, entry in entries.items():
            shape, (begin, end), kind = tuple(map(int, entry["shape"])), entry["data_offsets"], entry["dtype"]
            tensors[name] = (file, kind, shape, first + begin)
            if kind not in (*TYPES, *WORDS, BITS):
                continue
            num_bytes = np.dtype((TYPES | WORDS).get(kind, np.uint8)).itemsize
            for extent in shape:
                num_bytes *= extent
            if min(shape, default=0) < 0 or begin < 0 or num_bytes != end - begin:
                raise CheckpointError(f"{file}: tensor {name!r} of shape {shape} does not fit its bytes; fetch the file again")
            if first + end > file_bytes:
                raise CheckpointError(f"{file}: the file ends early, at {file_bytes} bytes; it is truncated, fetch it again")
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: damaged safetensors header ({type(error).__name__}); fetch it again") from None
    return tensors


def read_tensor(tensors: dict[str, Entry], name: str) -> np.ndarray:
    """A tensor of a header as float32, freshly allocated. Raises CheckpointError if its type is unknown or the file is too
    short."""
    file, kind, shape, offset = tensors[name]
    if kind not in TYPES:
        raise CheckpointError(f"{file}: tensor {name!r} is {kind}; supported are {', '.join(TYPES)}")
    count = int(np.prod(shape))
    values = np.fromfile(file, TYPES[kind], count, offset=offset)
    if values.size != count:
        raise CheckpointError(f"{file}: tensor {name!r} ends early; the file changed after it was opened")
    return as_float32(values, kind).reshape(shape)


def as_float32(values: np.ndarray, kind: str) -> np.ndarray:
    """The numbers that a file holds as `kind`, a key of `TYPES`, in the same shape. Float32 numbers are not copied."""
    if kind == "BF16":
        # A bfloat16 is the upper half of a float32.
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)
