"""The file at which both ends of a line between two engines' devices meet (`base.LinksKV`). The decode side makes it, in the folder
of the memory that both share. It loses its name once they have met. It does not know what a line carries.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stallfree.transfer.frames import Broken
from stallfree.transfer.ring import FOLDER

_NAME = re.compile(r"stallfree-line-[0-9a-f]{32}")


@contextmanager
def meeting() -> Iterator[Path]:
    """A new file at which two ends may meet until the `with` is left. Raises OSError."""
    path = FOLDER / f"stallfree-line-{secrets.token_hex(16)}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


def meeting_at(name: object) -> Path:
    """The file of this name, which another engine of this user has made. Raises Broken if there is none."""
    path = FOLDER / str(name)
    if _NAME.fullmatch(str(name)):
        with suppress(OSError):
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                return path
    raise Broken(f"there is no place {str(name)[:80]!r} at which to meet")
