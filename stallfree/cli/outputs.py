"""Writes the output files of commands. It replaces no file: an existing one may be a trace, and a new name is cheap."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

import typer

from stallfree.metrics.requests import COLUMNS, row
from stallfree.metrics.timeline import Timeline

SUFFIXES = (".csv", ".jsonl")
"""Endings of files with a row for each request."""


def check(file: Path | None, option: str) -> None:
    """Raises ValueError if `file`, the value of `option`, cannot be written or exists. Call it before the work."""
    if file is None:
        return
    if file.is_dir():
        raise ValueError(f"{option} {file}: {file} is a folder; name a file in it")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {file.parent}; name a file in an existing folder")
    if file.is_file():
        raise ValueError(f"{option} {file}: {file} exists, and is not overwritten; name another file, or remove it")


def check_folder(folder: Path, option: str) -> None:
    """Make `folder` if it does not exist. Raises ValueError if that fails, or if files are in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(f"{option} {folder}: there are files in it, and none is overwritten; name a new or empty folder")
    except OSError as error:
        raise ValueError(f"{option} {folder} cannot be made: {error.strerror}; name another folder") from None


def check_rows(file: Path | None, option: str) -> None:
    """As `check`. Also raises ValueError for a file that ends in none of `SUFFIXES`."""
    check(file, option)
    if file is not None and file.suffix not in SUFFIXES:
        raise ValueError(f"{option} {file}: rows are written as {' or '.join(SUFFIXES)}; name a file that ends so")


def write(file: Path, text: str) -> None:
    """Write `text` to a new `file`. Raises ValueError if one was made since `check`, and OSError."""
    try:
        with file.open("w" if file.exists() and not file.is_file() else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ValueError(f"{file} exists, and is not overwritten") from None


def write_page(file: Path, html: str) -> None:
    """Write a page, and tell the user."""
    write(file, html)
    typer.echo(f"table and plots are in {file}", err=True)


def write_rows(file: Path, lines: Iterable[Timeline]) -> None:
    """Write a row for each request, in order of arrival, as .csv or .jsonl."""
    rows = [row(line) for line in sorted(lines, key=lambda line: line.arrival)]
    if file.suffix == ".jsonl":
        write(file, "".join(f"{json.dumps(dict(zip(COLUMNS, cells, strict=True)))}\n" for cells in rows))
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    write(file, text.getvalue())
