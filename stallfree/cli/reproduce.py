"""`stallfree reproduce`: a paper's evaluation in the simulator, beside the published results. It knows no experiment's details."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stallfree.cli import options, words

if TYPE_CHECKING:
    from stallfree.papers.sarathi_serve import Row

app = typer.Typer(help="Simulate a paper's evaluation, beside its published results.", no_args_is_help=True, rich_markup_mode=None)


class Part(StrEnum):
    capacity = "capacity"
    ablation = "ablation"
    chunking = "chunking"
    parallelism = "parallelism"
    curve = "curve"
    stalls = "stalls"


@app.callback()
def reproduce() -> None:
    pass


@app.command(short_help="Sarathi-Serve (OSDI'24).")
@words.mistakes()
def sarathi(
    only: Annotated[
        list[Part] | None, typer.Option(help="Only this part. May be given several times.", show_default="all of them")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests in a trial of capacity; the paper had 2,048.", min=1)] = 2048,
    engine: Annotated[str, typer.Option(help=words.ENGINE)] = "graph",
    plots: Annotated[
        Path | None, typer.Option(help="Draw the results into this new or empty folder; needs matplotlib.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Sarathi-Serve (OSDI'24): capacities of four models, the ablation, the price of chunks, pipelines, SLOs, and stalls.

    It takes about a quarter of an hour on two cores. `--requests 256` is faster, for a first look.
    """

    from stallfree.cli import outputs
    from stallfree.cli.simulate import running
    from stallfree.metrics import plot
    from stallfree.papers import sarathi_serve as paper

    if plots is not None:
        plot.require()
        outputs.check_folder(plots, "--plots")
    wanted = only or list(Part)
    began = time.monotonic()
    tables: dict[str, list[Row]] = {}
    capacities = paper.Capacities(requests=requests, engine=engine) if Part.capacity in wanted else None
    curve = paper.Curve(requests, engine) if Part.curve in wanted else None
    simulators = (capacities.simulators if capacities else {}) | (curve.simulators if curve else {})
    with running(simulators, None) as trials:
        if capacities:
            tables["Capacity"] = capacities.rows(capacities.find(trials))
            tables["Capacity over vLLM, the most"] = capacities.over_vllm(tables["Capacity"])
        if curve:
            tables["Capacity over the SLO: Yi-34B, openchat"] = curve.rows(trials)
    parts = {
        Part.ablation: ("Ablation: Yi-34B", paper.ablation),
        Part.chunking: ("The price of chunks: Yi-34B", paper.chunking),
        Part.parallelism: ("TP8 and TP4-PP2: Falcon-180B on two nodes", paper.parallelism),
        Part.stalls: ("Stalls: Yi-34B, openchat", paper.stalls),
    }
    for part, (title, run) in parts.items():
        if part in wanted:
            tables[title] = run(engine)
    seconds = time.monotonic() - began
    if plots is not None:
        _draw(tables, plots)
        typer.echo(f"plots are in {plots}", err=True)
    if as_json:
        typer.echo(json.dumps({"engine": engine, "requests": requests, "seconds": seconds, "tables": tables}))
        return
    for title, rows in tables.items():
        _print(title, rows)
    typer.echo(f"\n{seconds:.0f} s; engine {engine}, {requests:,} requests in a trial of capacity")


def _print(title: str, rows: list[Row]) -> None:
    from stallfree.cli.measuring import print_grid

    typer.echo(f"\n{title}")
    print_grid([list(rows[0]), *([_cell(key, value) for key, value in row.items()] for row in rows)])
    errors = [abs(value) for row in rows for key, value in row.items() if "error" in key and value is not None]
    if errors:
        middle = sorted(errors)[len(errors) // 2]
        typer.echo(f"errors: median {middle:.0%}, largest {max(errors):.0%}")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:+.0%}" if "error" in name else f"{value:.3g}"
    return str(value)


def _draw(tables: dict[str, list[Row]], folder: Path) -> None:
    from stallfree.metrics import plot

    for title, rows in tables.items():
        file = folder / f"{title.partition(':')[0].lower().replace(' ', '_').replace(',', '')}.png"
        if title == "Capacity":
            pairs = [
                (f"{row['model']}, {row['dataset']}, {row['SLO']}", row["published"], row["sarathi/orca"])
                for row in rows
                if row["published"] is not None and row["sarathi/orca"] is not None
            ]
            if pairs:
                plot.published(pairs, "Capacity of Sarathi-Serve over Orca's", file)
        elif title.startswith("Ablation"):
            pairs = [
                (f"{row['dataset']}, {row['policy']}: {metric}", row[f"published {metric}"], row[f"{metric} {percentile}, s"])
                for row in rows
                for metric, percentile in (("TTFT", "p50"), ("TBT", "p99"))
            ]
            plot.published(pairs, "Yi-34B: TTFT P50 and TBT P99, s", file)
        elif title.startswith("The price"):
            pairs = [(f"{row['prompt tokens']:,} by {row['chunk']:,}", row["published"], row["in chunks / whole"]) for row in rows]
            plot.published(pairs, "Yi-34B: prefill time in chunks, over that in one piece", file)
        elif "over vLLM" not in title:
            across, *others = rows[0]
            names = [name for name in others if "/ " not in name]
            sides = {name: [(row[across], row[name]) for row in rows] for name in names}
            plot.lines(sides, across, "requests per second" if "requests/s" in names[0] else "seconds", title, file)
