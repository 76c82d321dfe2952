"""How functions are compiled here, and where numba keeps them, so that the next start need not compile them.

numba notices a change of the file that a function is in, and none of the files whose functions it calls. So the folder has a name
that depends on all of them. It knows no function.
"""

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

import numba

from stallfree.checkpoint.fetch import cache_folder


def _folder() -> Path:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return cache_folder() / "compiled" / digest.hexdigest()[:16]


def _kept(folder: Path) -> bool:
    """Whether numba can keep what it compiles in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]  # numba makes its settings when it is imported
    return os.access(folder, os.W_OK)


FOLDER = _folder()
KEEPS = _kept(FOLDER)
"""Whether what is compiled can be kept."""

exact = partial(numba.njit, nogil=True, error_model="numpy")
quick = partial(numba.njit, nogil=True, error_model="numpy", fastmath=True)
"""Compile a function that does not hold Python's lock; `quick` may change the order of sums."""


def first() -> bool:
    """Whether nothing is kept yet, so that all has to be compiled."""
    return not KEEPS or not any(FOLDER.rglob("*.nbi"))


def forget() -> None:
    """Remove what is kept."""
    shutil.rmtree(FOLDER, ignore_errors=True)
