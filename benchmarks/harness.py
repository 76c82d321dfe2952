"""Shared by all benchmark scripts: their two options, the facts of the machine, a table for people and rows for programs."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with `--quick` (under a minute, for a look) and `--json FILE` (the rows, with machine and versions)."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="under a minute, for a look; not for quoting")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the rows, with the machine and the versions")
    return arguments


def machine() -> dict[str, Any]:
    """Processor, cores, load before the run, and the versions of the measured packages."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    versions = {name: importlib.metadata.version(name) for name in ("stallfree", "openvino", "numpy")}
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }


def show(title: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any], file: Path | None) -> None:
    """Print `rows` as a table under `title`, with the machine below; write both to `file` if one is given."""
    console = Console(width=max(150, Console().width))
    table = Table(title=title, title_justify="left", box=None)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row.values()))
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in facts.items()), highlight=False)
    if file is not None:
        file.write_text(json.dumps({"title": title, "machine": facts, "rows": list(rows)}, indent=1) + "\n")
