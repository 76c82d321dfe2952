"""Reads a trace, the requests that some server once got, from a file. It knows the files' columns and nothing of their use.

A .csv has a header: this project's own columns, or those of BurstGPT (HPMLL/BurstGPT), of Azure's LLM inference traces
(Azure/AzurePublicDataset) or of vidur (microsoft/vidur); and perhaps `OWNERS`. A .jsonl is Mooncake's (kvcache-ai/Mooncake,
FAST'25): requests with the numbers of their prompts' prefix blocks. Equal numbers mean an equal prompt up to the block's end. Blank
lines are skipped in both.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from stallfree.workload.prompt import BLOCK

COLUMNS = ("arrived_at", "prompt_tokens", "output_tokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
"""The same three columns in BurstGPT, in seconds and tokens. A request with 0 response tokens failed there."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""The same three columns in Azure's traces; the first is a date and time, such as 2023-11-16 18:17:03.9799600."""
VIDUR = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
"""The same three columns in vidur's traces, in seconds and tokens."""
OWNERS = ("tenant", "class", "priority")
"""Columns that say whose a request is, its service class, and its priority (a whole number; lower is served first). An empty cell
is none, and priority 0."""
MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
_HEADER = (
    f"a trace's first line names its columns: {','.join(COLUMNS)}, or those of Azure, BurstGPT or vidur; the time may be left out"
)

Row = tuple[int, int] | tuple[int, int, tuple[int, ...]] | tuple[int, int, tuple[int, ...], str, str, int]
"""A request's prompt and output tokens and, if the trace has them, the numbers of its prompt's prefix blocks, and its `OWNERS`."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests of a file. `lengths`: of each request. `times`: seconds from the first arrival to each, in order; None if the
    file has none. `name`: of the file. `lines`: the numbers of the requests' lines in it.
    """

    lengths: Sequence[Row]
    times: Sequence[float] | None = None
    name: str = field(default="the trace", compare=False)
    lines: Sequence[int] = field(default=(), compare=False)

    @property
    def owned(self) -> bool:
        """Whether the file says whose its requests are."""
        return len(self.lengths[0]) > 3

    @property
    def classes(self) -> set[str]:
        """The service classes that it names."""
        return {row[4] for row in self.lengths if len(row) > 3 and row[4]}

    @property
    def rate(self) -> float:
        """Mean arrivals per second. Raises ValueError if there are no times, if there is one request, or if all times are equal."""
        if self.times is None:
            raise ValueError(f"{self.name} has no times, so it has no rate; add a column arrived_at")
        if len(self.times) == 1:
            raise ValueError(f"{self.name} has one request, and a rate needs two; add requests, or simulate it without --rate")
        if self.times[-1] == 0:
            raise ValueError(
                f"all {len(self.times)} requests of {self.name} arrive at the same time, so it has no rate that could be changed; "
                "give them different times, or simulate it without --rate"
            )
        return (len(self.times) - 1) / self.times[-1]

    def begun_at(self, number: int) -> Self:
        """The trace from request `number` on. It goes on after its end with its first request, a mean gap later. It has times."""
        if not number or self.times is None:
            return self
        again = self.times[-1] * (1 + 1 / (len(self.times) - 1))
        times = [*self.times[number:], *(at + again for at in self.times[:number])]
        lines = [*self.lines[number:], *self.lines[:number]]
        lengths = [*self.lengths[number:], *self.lengths[:number]]
        return type(self)(lengths, [at - times[0] for at in times], self.name, lines)

    def draw(self, rng: np.random.Generator) -> Row:
        """The lengths of a request, drawn at random."""
        return self.lengths[int(rng.integers(len(self.lengths)))]

    def within(self, max_total: int) -> Self:
        """The trace of only the requests with at most `max_total` tokens, prompt and output. Raises ValueError without any."""
        kept = [i for i, row in enumerate(self.lengths) if row[0] + row[1] <= max_total]
        if not kept:
            raise ValueError(f"no request of {self.name} has at most {max_total} tokens, prompt and output; raise --max-total")
        times = None if self.times is None else tuple(self.times[i] - self.times[kept[0]] for i in kept)
        lines = [self.lines[i] for i in kept] if self.lines else ()
        return type(self)(tuple(self.lengths[i] for i in kept), times, self.name, lines)

    def check(self, context: int) -> None:
        """Raises ValueError, with the line, for the first request of more than `context` tokens, prompt and output."""
        for number, row in enumerate(self.lengths):
            if row[0] + row[1] > context:
                where = f"line {self.lines[number]}" if self.lines else f"request {number + 1}"
                raise ValueError(
                    f"{self.name}: {where}: {row[0]} prompt and {row[1]} output tokens are more than the context of {context}; "
                    f"--max-total {context} leaves such requests out, a larger --max-model-len may serve them"
                )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a .csv or .jsonl; its other columns are ignored. Raises ValueError with file, line and column."""
        lengths: list[Row] = []
        times: list[float] = []
        lines: list[int] = []
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                requests = _mooncake(file) if path.suffix == ".jsonl" else _csv(file)
                for line, row, at in requests:
                    if at is not None:
                        if times and at < times[-1]:
                            raise ValueError(
                                f"line {line}: its time, {at:g} s, is before that of the line above; sort the file by time"
                            )
                        times.append(at)
                    lengths.append(row)
                    lines.append(line)
        except OSError as error:
            raise ValueError(f"the trace {path} cannot be read: {error.strerror}; give the name of a csv") from None
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is not a {path.suffix[1:]}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not lengths:
            raise ValueError(f"{path}: no request follows the header" if path.suffix == ".csv" else f"{path} holds no request")
        unbroken = range(lines[0], lines[0] + len(lines))
        since = tuple(at - times[0] for at in times) or None
        return cls(tuple(lengths), since, path.name, unbroken if lines == list(unbroken) else lines)


def _csv(file: TextIO) -> Iterator[tuple[int, Row, float | None]]:
    """(line, lengths, seconds) of each request."""
    reader = csv.reader(file)
    rows = ((reader.line_num, [cell.strip() for cell in cells]) for cells in reader)
    filled = (row for row in rows if any(row[1]))
    first, names = next(filled, (1, []))
    if not names:
        raise ValueError(f"it is empty; {_HEADER}")
    known = (columns for columns in (COLUMNS, BURSTGPT, AZURE, VIDUR) if set(columns[1:]) <= set(names))
    if (columns := next(known, None)) is None:
        raise ValueError(f"line {first} is {','.join(names)[:80]!r}; {_HEADER}")
    arrived_at, prompt, output = columns
    owned = not set(OWNERS).isdisjoint(names)
    for line, cells in filled:
        row = dict(zip_longest(names, cells[: len(names)], fillvalue=""))
        if columns is BURSTGPT and row[output] == "0":
            continue
        at = _seconds(row[arrived_at], arrived_at, line) if arrived_at in names else None
        lengths = _count(row[prompt], prompt, line), _count(row[output], output, line)
        if owned:
            priority = _priority(row.get("priority") or "0", line)
            yield line, (*lengths, (), row.get("tenant", ""), row.get("class", ""), priority), at
        else:
            yield line, lengths, at


def _mooncake(file: TextIO) -> Iterator[tuple[int, Row, float | None]]:
    """(line, lengths with blocks, seconds) of each request."""
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not set(MOONCAKE) <= row.keys():
            raise ValueError(f"line {line} is {text.strip()[:80]!r}; write one JSON object a line, with {', '.join(MOONCAKE)}")
        timestamp, prompt, output, blocks = (row[name] for name in MOONCAKE)
        at = _seconds(timestamp, "timestamp", line) / 1e3
        tokens = _count(prompt, "input_length", line)
        numbers = isinstance(blocks, list) and all(type(block) is int and block >= 0 for block in blocks)
        if not numbers or len(blocks) > -(-tokens // BLOCK):
            raise ValueError(
                f"line {line}: hash_ids are the numbers of at most {-(-tokens // BLOCK)} blocks of {BLOCK} tokens, from 0 on"
            )
        yield line, (tokens, _count(output, "output_length", line), tuple(blocks)), at


def _count(value: Any, column: str, line: int) -> int:
    text = str(value).strip()
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise ValueError(f"line {line}: {column} is {text!r}; write a whole number above 0")
    return int(text)


def _priority(text: str, line: int) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"line {line}: priority is {text!r}; write a whole number, lower for what is served first") from None


def _seconds(value: Any, column: str, line: int) -> float:
    """Seconds in a column: a number as it is, or a date and time as seconds since 1970."""
    text = str(value).strip()
    try:
        time = _since_1970(text) if "-" in text[1:] and ":" in text else float(text)
    except ValueError:
        time = float("nan")
    if not 0 <= time < float("inf"):
        raise ValueError(f"line {line}: {column} is {text!r}; write a time from 0 on, or a date and time")
    return time


def _since_1970(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 date and time; without a zone it is UTC. Digits below a microsecond are dropped."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
