"""Measured kernels from a folder of profiles, each with the price that the roofline gives it. It knows the formats of profiles by
their columns, and does not know what the measurements are for.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stallfree.perf import aiconfigurator, vidur
from stallfree.perf.point import Error, Point, Row, by

__all__ = ["KINDS", "Error", "Point", "by", "read"]

Reader = Callable[[Path, Row], Iterator[Point]]
FORMATS: tuple[tuple[Reader, Sequence[str], Sequence[set[str]]], ...] = (
    (vidur.attention, vidur.ATTENTION, [{"chunk_tokens"}, {"cached_tokens"}]),
    (vidur.network, vidur.NETWORK, [{"num_workers"}, {"devices_per_node"}]),
    (vidur.compute, vidur.COMPUTE, [{"n_head"}, {"n_embd"}, {"num_tokens"}, *({f"{name}_ms"} for name in vidur.LINEAR)]),
    (aiconfigurator.decode, aiconfigurator.DECODE, [{"kv_cache_dtype", "context"}]),
    (aiconfigurator.prefill, aiconfigurator.PREFILL, [{"kv_cache_dtype", "prompt_tokens"}]),
    (aiconfigurator.reduce, aiconfigurator.REDUCE, [{"how", "num_gpus"}]),
    (aiconfigurator.product, aiconfigurator.PRODUCT, [{"dtype", "m"}]),
)
"""What reads a file, the columns it needs, and the sets of columns of which one tells that a file is meant for it."""

DEPLOYMENTS = "_deployments.csv"
"""Files whose names end so have whole deployments, not kernels; `sim.deployed` reads them."""


KINDS = {**vidur.KINDS, **{name: name for name in aiconfigurator.OPERATORS}}
"""The group of each operator of a profile."""


def read(folder: Path, *, some: bool = True) -> tuple[list[Point], list[Path]]:
    """The measurements of kernels in all profiles below `folder`, and the csv files that are no profiles. Raises ValueError that
    names file, line and column, or the nearest known device; also if there are no measurements, unless `some` is False.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with profiles, as DEVICE_MODEL.csv or NODE_all_reduce.csv")
    points: list[Point] = []
    others: list[Path] = []
    for file in sorted(folder.rglob("*.csv")):
        if file.name.endswith(DEPLOYMENTS):
            continue
        try:
            measured = _file(file)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file} is no csv: {error}") from None
        if measured is None:
            others.append(file)
        else:
            points += measured
    if some and not points:
        needed = " or ".join(",".join(columns) for columns in (vidur.COMPUTE, aiconfigurator.PRODUCT))
        raise ValueError(f"{folder} holds no profile with a price; one is a csv with the columns {needed}, ... (docs/fidelity.md)")
    return points, others


def _file(file: Path) -> list[Point] | None:
    """The measurements of one file; None if it has no column of a profile."""
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines, restval="")
        columns = rows.fieldnames or ()
        for reader, needed, telling in FORMATS:
            if not any(names <= set(columns) for names in telling):
                continue
            missing = [column for column in needed if column not in columns]
            if missing:
                raise ValueError(f"{file}: the column {missing[0]} is missing; a profile like this has {','.join(needed)}")
            return [point for row in rows for point in reader(file, Row(row, f"{file}: line {rows.line_num}"))]
    return None
