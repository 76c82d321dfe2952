"""A trace: requests that were once served somewhere, read from a csv. It knows the file's columns and nothing of their use."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

COLUMNS = ("arrived_at", "prompt_tokens", "output_tokens")
_HEADER = f"a trace's first line names its columns: {','.join(COLUMNS)}; arrived_at may be left out"


@dataclass(frozen=True, slots=True)
class Trace:
    """`lengths`: (prompt, output) tokens of each request. `times`: seconds of their arrivals from the first one's, in order; None
    if the file does not say.
    """

    lengths: tuple[tuple[int, int], ...]
    times: tuple[float, ...] | None = None

    @property
    def rate(self) -> float:
        """Mean arrivals per second. Raises ValueError if there are no times, or all are the same."""
        if self.times is None or self.times[-1] == 0:
            raise ValueError("the trace has no times from which a rate could be told; give it a column arrived_at")
        return (len(self.times) - 1) / self.times[-1]

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """The lengths of any of its requests."""
        return self.lengths[rng.integers(len(self.lengths))]

    def within(self, max_total: int) -> Self:
        """Only the requests with at most `max_total` tokens, prompt and output together. Raises ValueError if there are none."""
        kept = [i for i, (prompt, output) in enumerate(self.lengths) if prompt + output <= max_total]
        if not kept:
            raise ValueError(f"no request of the trace has at most {max_total} tokens; raise the limit")
        times = None if self.times is None else tuple(self.times[i] - self.times[kept[0]] for i in kept)
        return type(self)(tuple(self.lengths[i] for i in kept), times)

    @classmethod
    def read(cls, path: Path) -> Self:
        """A csv with a header; columns other than `COLUMNS` are not looked at. Raises ValueError naming file, line and column."""
        lengths: list[tuple[int, int]] = []
        times: list[float] = []
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                rows = csv.DictReader(file, restval="")
                found = [name for name in COLUMNS if name in (rows.fieldnames or ())]
                if not {"prompt_tokens", "output_tokens"} <= set(found):
                    raise ValueError(f"{path}: line 1 is {','.join(rows.fieldnames or ())[:80]!r}; {_HEADER}")
                for row in rows:
                    where = f"{path}: line {rows.line_num}"
                    lengths.append((_count(row, "prompt_tokens", where), _count(row, "output_tokens", where)))
                    if "arrived_at" in found:
                        times.append(_time(row, times, where))
        except OSError as error:
            raise ValueError(f"the trace {path} cannot be read: {error.strerror}; give the name of a csv") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a csv: {error}") from None
        if not lengths:
            raise ValueError(f"{path}: no request follows the header")
        return cls(tuple(lengths), tuple(t - times[0] for t in times) or None)


def _count(row: dict[str, str], column: str, where: str) -> int:
    text = row[column].strip()
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"{where}: {column} is {text!r}; write a whole number above 0")
    return int(text)


def _time(row: dict[str, str], before: list[float], where: str) -> float:
    text = row["arrived_at"].strip()
    try:
        time = float(text)
    except ValueError:
        time = float("nan")
    if not abs(time) < float("inf"):
        raise ValueError(f"{where}: arrived_at is {text!r}; write seconds")
    if before and time < before[-1]:
        raise ValueError(f"{where}: arrived_at is {text}, before the line above; sort the file by arrived_at")
    return time
