"""`stallfree bench`: load on a server, its capacity, and servers side by side."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stallfree.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stallfree.bench.client import Client
    from stallfree.bench.dialect import Dialect
    from stallfree.bench.load import Load
    from stallfree.metrics.report import Report
    from stallfree.workload.workload import Arrival

app = typer.Typer(help="Measure servers under load, any that speak OpenAI's API.", no_args_is_help=True)

Url = Annotated[str, typer.Option(help="The server, with or without /v1.")]
Rate = Annotated[float | None, typer.Option(help="Requests per second, on average.", show_default="a trace's own")]
Requests = Annotated[int | None, typer.Option(help="How many requests.", show_default="200, or a trace's all")]
Duration = Annotated[float | None, typer.Option(help="Seconds of arrivals, instead of a number of requests.", show_default=False)]
Arrivals = Annotated[str, typer.Option(help="poisson, gamma:cv=2 (burstier with a larger cv), or trace: the times in the csv.")]
Lengths = Annotated[
    str,
    typer.Option(
        help="Prompt/output tokens: 512/128, median=200,p90=800/median=60,p90=150, or a FILE.csv with prompt_tokens, output_tokens "
        "and perhaps arrived_at. Others may be mixed in: 512/128 + 5%:2000/64."
    ),
]
MaxTotal = Annotated[
    int | None, typer.Option(help="Most tokens of a request, prompt and output; longer ones are drawn again.", show_default=False)
]
Targets = Annotated[str | None, typer.Option("--slo", help="Latency targets: ttft=2s@p90,tbt=100ms@p99.", show_default=False)]
Seed = Annotated[int, typer.Option(help="Draws the same arrivals and lengths again.", min=0)]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Its name there.", show_default="the first that is listed")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="STALLFREE_API_KEY", help="Sent as a bearer token.", show_envvar=True, show_default=False)
]
Timeout = Annotated[float, typer.Option(help="Seconds that a request may take, its output included.")]
Html = Annotated[Path | None, typer.Option(help="Write table and plots to this file; needs matplotlib.", show_default=False)]

LENGTHS = "512/128"
REQUESTS = 200


@app.command()
def load(
    url: Url = "http://127.0.0.1:8000",
    rate: Rate = None,
    requests: Requests = None,
    duration: Duration = None,
    arrivals: Arrivals = "poisson",
    lengths: Lengths = LENGTHS,
    max_total: MaxTotal = None,
    slo: Targets = None,
    seed: Seed = 0,
    model: Model = None,
    api_key: ApiKey = None,
    timeout: Timeout = 600,
    as_json: options.Json = False,
    html: Html = None,
) -> None:
    """Send requests at a rate, whether or not earlier ones have ended, and report latencies, stalls and the SLO.

    Exit code 1 if the run is not valid: the client fell behind its schedule, was interrupted, or nothing was completed.
    """
    from stallfree.bench.client import Client

    client = Client(url, api_key=api_key, timeout_s=timeout)
    coming = _draw(arrivals, lengths, max_total, rate, seed, requests, duration)
    facts = {"arrivals": arrivals, "lengths": lengths, "max_total": max_total, "rate": rate, "requests": len(coming), "seed": seed}
    results = _measure({client.url: client}, model, coming, rate, slo, facts, html)
    ((run, report),) = results.values()
    if as_json:
        typer.echo(json.dumps({"workload": facts} | run.as_dict(report)))
    _end(results, as_json)


@app.command()
def compare(
    servers: Annotated[list[str], typer.Argument(metavar="NAME=URL...", help="The servers, each with a name for it.")],
    rate: Rate = None,
    requests: Requests = None,
    duration: Duration = None,
    arrivals: Arrivals = "poisson",
    lengths: Lengths = LENGTHS,
    max_total: MaxTotal = None,
    slo: Targets = None,
    seed: Seed = 0,
    api_key: ApiKey = None,
    timeout: Timeout = 600,
    as_json: options.Json = False,
    html: Html = None,
) -> None:
    """Put the same load on several servers, one after another, and report them side by side. Exit code 1 if a run is not valid."""
    from stallfree.bench.client import Client

    clients: dict[str, Client] = {}
    for server in servers:
        name, equals, url = server.partition("=")
        if not (name and equals):
            raise ValueError(f"{server!r} is not a named server; write name=http://127.0.0.1:8000")
        if name in clients:
            raise ValueError(f"two servers are named {name!r}; give each its own name")
        clients[name] = Client(url, api_key=api_key, timeout_s=timeout)
    coming = _draw(arrivals, lengths, max_total, rate, seed, requests, duration)
    facts = {"arrivals": arrivals, "lengths": lengths, "max_total": max_total, "rate": rate, "requests": len(coming), "seed": seed}
    results = _measure(clients, None, coming, rate, slo, facts, html)
    if as_json:
        typer.echo(
            json.dumps({"workload": facts, "servers": {name: run.as_dict(report) for name, (run, report) in results.items()}})
        )
    _end(results, as_json)


@app.command()
def capacity(
    slo: Annotated[str, typer.Option(help="Latency targets that make the capacity: ttft=2s@p90,tbt=100ms@p99.")],
    url: Url = "http://127.0.0.1:8000",
    start: Annotated[float, typer.Option(help="Requests per second to try first.")] = 1.0,
    tolerance: Annotated[float, typer.Option(help="Share of the capacity to which it is found.")] = 0.05,
    trials: Annotated[int, typer.Option(help="Most trials at one rate; they end once one verdict leads by two.")] = 5,
    requests: Annotated[int, typer.Option(help="Requests in a trial.")] = REQUESTS,
    arrivals: Arrivals = "poisson",
    lengths: Lengths = LENGTHS,
    max_total: MaxTotal = None,
    seed: Seed = 0,
    model: Model = None,
    api_key: ApiKey = None,
    timeout: Timeout = 600,
    as_json: options.Json = False,
) -> None:
    """Find the highest request rate at which the server meets an SLO, by bisection over repeated trials.

    A trial passes if every target is met, the median TTFT is at most 2 s (unless the SLO has a target for it) and at most 1 % of
    the requests fail. Exit code 1 if it was interrupted, or if the client was too slow to tell.
    """
    import asyncio

    from stallfree.bench.capacity import search, shortfalls
    from stallfree.bench.client import Client
    from stallfree.core.slo import Slo
    from stallfree.metrics.report import report
    from stallfree.workload.workload import Workload

    targets, workload = Slo.parse(slo), Workload.parse(arrivals, lengths, max_total)
    client = Client(url, api_key=api_key, timeout_s=timeout)
    dialect = asyncio.run(_probe(client, model))
    made: list[dict[str, Any]] = []

    def trial(rate: float, seed: int) -> bool:
        run = asyncio.run(_run(client, dialect, workload.draw(rate, seed, requests=requests), f"{rate:.4g}/s"))
        if run.interrupted:
            raise KeyboardInterrupt
        result = report(run.lines, targets, rate)
        why = shortfalls(result, targets) + ([run.behind] if run.behind else [])
        typer.echo(f"{rate:.4g} requests/s, seed {seed}: {'; '.join(why) or 'passed'}", err=True)
        made.append({"rate": rate, "seed": seed, "passed": not why, "why": why} | run.as_dict(result))
        return not why

    problems, found = [], None
    try:
        found = search(trial, start, tolerance=tolerance, most_trials=trials, seed=seed)
    except KeyboardInterrupt:
        problems.append(f"interrupted after {len(made)} trials")
    if found is not None and any(t["rate"] == found.above and t["client"]["late"] for t in made):
        problems.append(f"at {found.above:.4g} requests/s the client fell behind its schedule; the server may be capable of more")
    if as_json:
        facts = {"arrivals": arrivals, "lengths": lengths, "max_total": max_total, "requests": requests, "seed": seed}
        answer = {"valid": not problems, "problems": problems, "slo": str(targets), "workload": facts}
        answer |= {"capacity": None, "above": None} if found is None else {"capacity": found.rate, "above": found.above}
        typer.echo(json.dumps(answer | {"trials": made}))
    else:
        _print_trials(made)
        if found is not None:
            above = "no rate missed it" if found.above is None else f"missed at {found.above:.4g}"
            typer.echo(f"capacity {found.rate:.4g} requests/s for {targets} ({above})")
    for problem in problems:
        typer.echo(f"not valid: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _draw(
    arrivals: str,
    lengths: str,
    max_total: int | None,
    rate: float | None,
    seed: int,
    requests: int | None,
    duration_s: float | None,
) -> list[Arrival]:
    from stallfree.workload.workload import Workload

    workload = Workload.parse(arrivals, lengths, max_total)
    if requests is None and duration_s is None and workload.cv is not None:
        requests = REQUESTS
    return workload.draw(rate, seed, requests=requests, duration_s=duration_s)


def _measure(
    clients: dict[str, Client],
    model: str | None,
    coming: Sequence[Arrival],
    rate: float | None,
    slo: str | None,
    facts: dict[str, Any],
    html: Path | None,
) -> dict[str, tuple[Load, Report]]:
    """The same load on one server after another, and the page of it; after an interruption on no more."""
    import asyncio

    from stallfree.core.slo import Slo
    from stallfree.metrics.report import report

    targets = Slo() if slo is None else Slo.parse(slo)
    if html is not None:
        from stallfree.metrics import plot

        plot.require()
        if not html.parent.is_dir():
            raise ValueError(f"--html {html}: there is no folder {html.parent}; make it, or name another file")
    dialects = {name: asyncio.run(_probe(client, model)) for name, client in clients.items()}
    results: dict[str, tuple[Load, Report]] = {}
    for name, client in clients.items():
        run = asyncio.run(_run(client, dialects[name], coming, name))
        results[name] = run, report(run.lines, targets, rate)
        if run.interrupted:
            break
    if html is not None:
        from stallfree.metrics.page import page

        said = [", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)]
        said += [f"{name}: {run.server}" for name, (run, _) in results.items()]
        said.append(f"SLO {targets}" if slo else "no SLO")
        problems = [f"{name} is not valid: {problem}" for name, (run, _) in results.items() for problem in run.problems]
        lines = {name: (report, run.lines) for name, (run, report) in results.items()}
        html.write_text(page(f"stallfree bench, {time.strftime('%Y-%m-%d %H:%M')}", said, problems, lines, targets))
    return results


async def _probe(client: Client, model: str | None) -> Dialect:
    from stallfree.bench.dialect import Dialect

    async with client:
        dialect = await Dialect.probe(client, model)
    typer.echo(f"{client.url}: {dialect}", err=True)
    return dialect


async def _run(client: Client, dialect: Dialect, coming: Sequence[Arrival], name: str) -> Load:
    """Ctrl-C ends it with what there is."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from stallfree.bench.load import load

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[running]} running"))
    # The bar is drawn by a thread that holds up the client while it does: seldom.
    progress = Progress(*columns, TimeElapsedColumn(), console=console, refresh_per_second=2, disable=not console.is_terminal)
    async with client:
        with progress:
            bar = progress.add_task(name, total=len(coming), running=0)

            def tick(run: Load) -> None:
                progress.update(bar, completed=run.ended, running=len(run.lines) - run.ended)

            return await load(client, dialect, coming, tick)


def _end(results: dict[str, tuple[Load, Report]], as_json: bool) -> None:
    """The table, what went wrong, and the exit code."""
    if not as_json:
        from rich.console import Console

        from stallfree.metrics.report import table

        Console().print(_as_table(table({name: report for name, (_, report) in results.items()})))
    for name, (run, _) in results.items():
        for message in run.messages.values():
            typer.echo(f"{name}: {message}", err=True)
        if run.short:
            typer.echo(f"{name}: {run.short} requests got fewer tokens than they asked for", err=True)
        for problem in run.problems:
            typer.echo(f"{name} is not valid: {problem}", err=True)
    if any(run.problems for run, _ in results.values()):
        raise typer.Exit(1)


def _print_trials(made: list[dict[str, Any]]) -> None:
    from rich.console import Console

    rows = [["requests/s", "seed", "TTFT p50, s", "TBT p99, ms", "output tokens/s", "verdict"]]
    for t in sorted(made, key=lambda t: (t["rate"], t["seed"])):
        ttft, tbt = t["ttft_s"], t["tbt_s"]
        figures = [
            f"{t['rate']:.4g}",
            str(t["seed"]),
            f"{ttft['p50']:.3g}" if ttft else "-",
            f"{tbt['p99'] * 1e3:.3g}" if tbt else "-",
        ]
        rows.append([*figures, f"{t['output_tokens_per_s']:.3g}", "; ".join(t["why"]) or "passed"])
    Console().print(_as_table(rows))


def _as_table(rows: list[list[str]]) -> Any:
    from rich.table import Table

    made = Table(box=None)
    for number, name in enumerate(rows[0]):
        made.add_column(name, justify="left" if number == 0 else "right")
    for row in rows[1:]:
        made.add_row(*row)
    return made
