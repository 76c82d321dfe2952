"""Puts one load on one server after another, and shows it at a terminal: a bar, a table, the errors, and a page.

It knows a server by its URL or by the arguments that start it. It does not know how arrivals are drawn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from stallfree.bench.client import Client
from stallfree.bench.dialect import Dialect
from stallfree.bench.load import Load, load
from stallfree.bench.server import server
from stallfree.cli import outputs
from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.metrics.capacity import Capacity
from stallfree.metrics.page import page
from stallfree.metrics.report import Report, Targets, by_class, report
from stallfree.metrics.table import classes, table, tenants
from stallfree.workload.workload import Arrival

Results = Mapping[str, tuple[Load, Report]]
"""Each server's run and report, by its name."""


@dataclass(frozen=True, slots=True)
class Place:
    """A server to be measured: the one at `url`. Without a `url`, `stallfree serve` with the arguments `serve` starts it when its
    turn comes.
    """

    name: str
    url: str | None
    serve: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Access:
    """How to call a server: for which `model` (None: the first that it lists), with which key, and at most how many seconds."""

    model: str | None
    api_key: str | None
    timeout_s: float

    def client(self, url: str) -> Client:
        return Client(url, api_key=self.api_key, timeout_s=self.timeout_s)


def measure(
    places: Sequence[Place], access: Access, arrivals: Sequence[Arrival], slo: Targets, rate: float | None
) -> tuple[Results, ValueError | None]:
    """Put `arrivals` on every server in turn; an interruption ends the measurement. Returns the results, and the error of a server
    that failed after others were measured. Raises ValueError if the first server fails.
    """
    # Running servers are probed before the first run: a mistake in the last address must not cost the first run's time.
    dialects = {place.name: probe(access.client(place.url), access.model) for place in places if place.url is not None}
    results: dict[str, tuple[Load, Report]] = {}
    for place in places:
        try:
            with server(place.serve) if place.url is None else nullcontext(place.url) as url:
                client = access.client(url)
                run = follow(client, dialects.get(place.name) or probe(client, access.model), arrivals, place.name)
        except ValueError as error:
            if results:
                return results, error
            raise
        results[place.name] = run, report(run.lines, slo, rate)
        if run.interrupted:
            break
    return results, None


def probe(client: Client, model: str | None) -> Dialect:
    """Find the server's dialect, and print it."""

    async def ask() -> Dialect:
        async with client:
            return await Dialect.probe(client, model)

    dialect = asyncio.run(ask())
    typer.echo(f"{client.url}: {dialect}", err=True)
    return dialect


def follow(client: Client, dialect: Dialect, arrivals: Sequence[Arrival], name: str) -> Load:
    """One run, with a bar on a terminal. Ctrl-C ends it; the result holds the requests so far."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[running]} running"))
    # The thread that draws the bar holds up the client, so it draws only twice a second.
    progress = Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=2, disable=not console.is_terminal)
    bar = progress.add_task(name, total=len(arrivals), running=0)

    def tick(run: Load) -> None:
        progress.update(bar, completed=run.ended, running=len(run.lines) - run.ended)

    async def run() -> Load:
        async with client:
            return await load(client, dialect, arrivals, tick)

    with progress:
        return asyncio.run(run())


def show(results: Results) -> None:
    """Print the runs as tables."""
    print_reports({name: report for name, (_, report) in results.items()})


def end(results: Results, error: ValueError | None) -> None:
    """Print what went wrong; exit code 1 if a run is not valid. Raises the `error` that ended the measurement."""
    for name, (run, _) in results.items():
        for message in run.messages.values():
            typer.echo(f"{name}: {message}", err=True)
        if run.short:
            typer.echo(f"{name}: {run.short} requests got fewer tokens than they asked for", err=True)
        for problem in run.problems:
            typer.echo(f"{name} is not valid: {problem}", err=True)
    if error is not None:
        raise error
    if any(run.problems for run, _ in results.values()):
        raise typer.Exit(1)


def decisions(highest: Capacity) -> list[dict[str, Any]]:
    """The decisions of a search, for JSON."""
    return [asdict(decision) | {"met": decision.met, "sure": decision.sure} for decision in highest.decisions]


def print_uncertain(highest: Capacity, trials: int, before: str = "") -> None:
    """Say, after the words `before`, which decisions up to `trials` trials left open."""
    for decision in highest.decisions:
        if trials > 1 and not decision.sure:
            counts = f"{decision.passed} trials passed and {decision.failed} failed"
            typer.echo(f"{before}{decision.rate:.4g} requests/s is not certain: {counts}; raise --trials", err=True)


def check_page(file: Path | None) -> None:
    """Raises ValueError if the page cannot be written. Call it before the run that it shows."""
    if file is None:
        return
    plot.require()
    outputs.check(file, "--html")


def write_page(file: Path, results: Results, facts: Mapping[str, Any], slo: Targets) -> None:
    about = [", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)]
    about += [f"{name}: {run.server}" for name, (run, _) in results.items()]
    about.append(f"SLO {slo}" if slo != Slo() else "no SLO")
    problems = [f"{name} is not valid: {problem}" for name, (run, _) in results.items() for problem in run.problems]
    runs = {name: (report, run.lines) for name, (run, report) in results.items()}
    title = f"stallfree bench, {time.strftime('%Y-%m-%d %H:%M')}"
    outputs.write_page(file, page(title, about, problems, runs, by_class(slo).default))


def print_reports(reports: Mapping[str, Report]) -> None:
    """Print reports side by side, then what `print_parts` does."""
    print_grid(table(reports))
    print_parts(reports)


def print_parts(reports: Mapping[str, Report]) -> None:
    """Print a row for each class, and one for each tenant, if there are any."""
    for rows in (classes(reports), tenants(reports)):
        if rows:
            print_grid(rows)


def print_grid(rows: Sequence[Sequence[str]], *, numbers: bool = True) -> None:
    """Print rows as a table; the first row has the columns' names. `numbers` are aligned to the right, words to the left. No cell
    is cut, however narrow the terminal.
    """
    grid = Table(box=None)
    for number, name in enumerate(rows[0]):
        grid.add_column(name, justify="right" if number and numbers else "left", no_wrap=True)
    for row in rows[1:]:
        grid.add_row(*row)
    needed = sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True))
    Console(width=max(needed, Console().width)).print(grid)
