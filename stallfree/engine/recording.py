"""A run written to a file as it happens, one line per iteration, and read back. It does not know what records mean. If the disk
fails, the recording ends and serving goes on."""

import logging
from pathlib import Path
from typing import BinaryIO

from stallfree.core.record import Run, StepRecord, read

log = logging.getLogger(__name__)


class RecordFile:
    """A new file at `path`: one line for the run (`begin`), one for each iteration (`write`). Raises ValueError if the file exists,
    so that no run is overwritten.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file: BinaryIO | None = path.open("xb", buffering=0)
        except FileExistsError:
            raise ValueError(f"the record file {path} exists; name another one or remove it") from None
        except OSError as error:
            raise ValueError(f"the record file {path} cannot be written: {error.strerror}") from error

    def begin(self, run: Run) -> None:
        self._write(run.to_json())

    def write(self, record: StepRecord) -> None:
        if self._file is not None:
            self._write(record.to_json())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: str) -> None:
        try:
            if self._file is not None:
                self._file.write(f"{line}\n".encode())
        except OSError as error:
            log.error("recording to %s has ended: %s", self._path, error)
            self.close()


def load(path: Path) -> tuple[Run, list[StepRecord]]:
    """The run and records that a `RecordFile` wrote to `path`. Raises ValueError that names the file, the line and the way out."""
    try:
        with path.open(encoding="utf-8") as lines:
            return read(lines)
    except OSError as error:
        raise ValueError(
            f"the record file {path} cannot be read: {error.strerror}; `stallfree serve --record FILE` makes one"
        ) from error
    except ValueError as error:  # also UnicodeDecodeError, for a binary file
        raise ValueError(f"{path}: {error}") from None
