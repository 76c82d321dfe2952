"""`stallfree simulate`, `capacity` and `compare`: what a policy, a model and devices would make of a load, in virtual time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stallfree.cli import options, words
from stallfree.sim.deployment import Deployment
from stallfree.workload.traffic import SHORTEST_S, Traffic

if TYPE_CHECKING:
    from stallfree.metrics.capacity import Capacity
    from stallfree.metrics.report import Report
    from stallfree.sim.simulator import Instance, Simulator
    from stallfree.sim.trials import Trial, Trials, Tried
    from stallfree.workload.workload import Arrival

REQUESTS = 2048
"""Requests in a trial, as in the paper (Sarathi-Serve, OSDI'24, section 5)."""


Several = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[POLICY]...",
        help="Policies, as slo or sarathi:512 (tokens per iteration); without any, the tables [configurations.NAME] of --config, "
        "or --policy.",
        show_default=False,
    ),
]


@words.spread()
@words.mistakes()
def simulate(
    deployment: Deployment,
    traffic: Traffic,
    trace: words.Trace = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Write a line for every iteration to this new file, as `serve --record` does.", show_default=False),
    ] = None,
    chrome_trace: Annotated[
        Path | None, typer.Option(help="Write iterations to this new file, for chrome://tracing and Perfetto.", show_default=False)
    ] = None,
    requests_out: options.RequestsOut = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Simulate a load on a deployment, with the scheduler that serves, and report latencies, stalls and the SLO.

    stallfree simulate --model yi-34b --tp 2 --rate 1 --lengths openchat --slo tbt=200ms
    """

    from stallfree.cli import measuring, outputs
    from stallfree.core.slo import Slo
    from stallfree.metrics.page import page
    from stallfree.metrics.report import Tally, table
    from stallfree.metrics.timeline import Timeline
    from stallfree.sim import chrome

    measuring.check_page(html)
    outputs.check(record, "--record")
    outputs.check(chrome_trace, "--chrome-trace")
    outputs.check_rows(requests_out, "--requests-out")
    if record is not None and deployment.replicas > 1:
        raise ValueError(f"a record is of one replica, not of {deployment.replicas}; leave --record or --replicas out")
    traffic = words.traced(traffic, trace).ending(REQUESTS)
    simulator = _simulator(deployment, traffic)
    targets = simulator.targets or Slo()
    tally, lines = Tally(targets), list[Timeline]()

    def ended(line: Timeline) -> None:
        tally.add(line)
        if html is not None or requests_out is not None:
            lines.append(line)

    made = simulator.run(_counted(traffic), ended=ended, records=record is not None, spans=chrome_trace is not None)
    report = tally.report(traffic.rate)
    requests = report.completed + sum(report.errors.values())
    name = deployment.policy if deployment.token_budget is None else f"{deployment.policy}:{deployment.token_budget}"
    if record is not None:
        (records,) = made.records
        lines_of_text = [simulator.header.to_json(), *(step.to_json() for step in records)]
        outputs.write(record, "".join(f"{text}\n" for text in lines_of_text))
    if chrome_trace is not None:
        outputs.write(chrome_trace, json.dumps(chrome.trace(made.spans)))
    if requests_out is not None:
        outputs.write_rows(requests_out, lines)
    if html is not None:
        said = [simulator.instance.about, _words(_told(deployment)), _words(traffic.facts(requests))]
        title = f"stallfree simulate, {time.strftime('%Y-%m-%d %H:%M')}"
        outputs.write(html, page(title, said, [], {name: (report, lines)}, targets))
        typer.echo(f"table and plots are in {html}", err=True)
    dollars = simulator.dollars_per_million(report)
    if as_json:
        more = {"iterations": made.iterations, "bubbles": made.bubbles, "dollars_per_million_tokens": dollars}
        typer.echo(json.dumps({"deployment": _told(deployment), "workload": traffic.facts(requests)} | more | asdict(report)))
        return
    measuring.print_grid(table({name: report}))
    held = simulator.instance.capacity
    typer.echo(
        f"{simulator.instance.about}, room for {held.num_blocks * held.block_size:,} tokens of KV: {made.iterations:,} iterations"
        f"{f', bubbles {made.bubbles:.1%}' if held.depth > 1 else ''}"
        f"{'' if dollars is None else f', ${dollars:.2f} per million output tokens'}"
    )


@words.spread("rate", "duration")
@words.mistakes()
def capacity(
    context: typer.Context,
    deployment: Deployment,
    traffic: Traffic,
    policies: Several = None,
    start: Annotated[float, typer.Option(help="Requests per second to try first.")] = 1.0,
    tolerance: Annotated[float, typer.Option(help="Share of the capacity to which it is found.")] = 0.05,
    trials: Annotated[int, typer.Option(help="Most trials at one rate; they end once one verdict leads by two.")] = 5,
    shortest: Annotated[float, typer.Option(help="Seconds of arrivals in a trial, at least, by more requests.")] = SHORTEST_S,
    trace: words.Trace = None,
    as_json: options.Json = False,
) -> None:
    """Find the highest request rate at which each configuration meets the SLO, by bisection over repeated trials.

    stallfree capacity sarathi:512 sarathi:2048 orca slo --model yi-34b --tp 2 --lengths openchat --slo tbt=200ms

    A trial passes if every target is met, half of the requests are scheduled within 2 s (unless the SLO has a target for TTFT) and
    at most 1 % of them fail. Configurations are searched in parallel processes.
    """

    from stallfree.cli import measuring
    from stallfree.core.slo import Slo

    several = words.configurations(context, deployment, policies or [])
    traffic = words.traced(traffic, trace).ending(REQUESTS)
    simulators = {name: _simulator(one, traffic) for name, one in several.items()}
    for name, one in several.items():
        if one.slo is None:
            raise ValueError(f"which targets make the capacity of {name}? --slo tbt=100ms, for one")
    made: dict[str, list[dict[str, Any]]] = {name: [] for name in simulators}
    with running(simulators) as pool:

        def tell(name: str, trial: Trial) -> None:
            rate, seed, report, why = trial
            cost = simulators[name].dollars_per_million(report)
            row = {"rate": rate, "seed": seed, "passed": not why, "why": why, "dollars_per_million_tokens": cost}
            made[name].append(row | asdict(report))

        cases = {name: (traffic, Slo.parse(one.slo or ""), start) for name, one in several.items()}
        found = pool.capacities(cases, tell, tolerance=tolerance, most_trials=trials, seed=traffic.seed, shortest_s=shortest)
    if as_json:
        answers = {
            name: {
                "deployment": _told(several[name]),
                "slo": several[name].slo,
                "capacity": one.rate,
                "above": one.above,
                "decisions": [asdict(decision) | {"met": decision.met, "sure": decision.sure} for decision in one.decisions],
                "trials": made[name],
            }
            for name, one in found.items()
        }
        typer.echo(json.dumps({"workload": traffic.facts(traffic.requests or 0), "configurations": answers}))
        return
    rows = [["", "capacity, requests/s", "missed at", "TTFT p50, s", "TBT p99, ms", "output tokens/s", "$ per million"]]
    rows += [[name, *_at_capacity(most, made[name])] for name, most in found.items()]
    measuring.print_grid(rows)
    for name, most in found.items():
        failed = [trial["why"] for trial in made[name] if trial["rate"] == most.above and not trial["passed"]]
        if failed:
            typer.echo(f"{name} at {most.above:.4g} requests/s: {'; '.join(failed[0])}")
        for decision in most.decisions:
            if trials > 1 and not decision.sure:
                counts = f"{decision.passed} trials passed and {decision.failed} failed"
                typer.echo(f"{name}: {decision.rate:.4g} requests/s is not certain: {counts}; more --trials tell better", err=True)


@words.spread("rate", "duration")
@words.mistakes()
def compare(
    context: typer.Context,
    deployment: Deployment,
    traffic: Traffic,
    rates: Annotated[str, typer.Option(help="Requests per second, with commas between.")],
    policies: Several = None,
    trace: words.Trace = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Simulate configurations at several loads, and put them side by side.

    stallfree compare sarathi:256 sarathi:2048 slo --model llama3-8b --rates 1,2,4 --slo tbt=100ms --html out.html
    """

    from stallfree.cli import measuring, outputs
    from stallfree.core.slo import Slo
    from stallfree.metrics.page import loads_page

    measuring.check_page(html)
    several = words.configurations(context, deployment, policies or [])
    traffic, loads = words.traced(traffic, trace).ending(REQUESTS), _rates(rates)
    simulators = {name: _simulator(one, traffic) for name, one in several.items()}
    with running(simulators, len(simulators) * len(loads)) as pool:
        cases = {
            (name, rate): (name, traffic, rate, traffic.seed, Slo.parse(one.slo) if one.slo else Slo())
            for rate in loads
            for name, one in several.items()
        }
        reports = pool.reports(cases)
    facts = traffic.facts(traffic.requests or 0)
    if as_json:
        runs = [{"configuration": name, "rate": rate} | asdict(report) for (name, rate), report in reports.items()]
        told = {name: _told(one) for name, one in several.items()}
        typer.echo(json.dumps({"workload": facts, "configurations": told, "runs": runs}))
    rows = [["", "requests/s", "TTFT p50, s", "TTFT p99, s", "TBT p50, ms", "TBT p99, ms", "output tokens/s", "SLO"]]
    rows += [[name, f"{rate:g}", *_figures(report)] for (name, rate), report in reports.items()]
    if html is not None:
        said = [_words(facts), *(f"{name}: {_words(_told(one))}" for name, one in several.items())]
        outputs.write(html, loads_page(f"stallfree compare, {time.strftime('%Y-%m-%d %H:%M')}", said, rows, reports))
        typer.echo(f"table and plots are in {html}", err=True)
    if not as_json:
        measuring.print_grid(rows)


def _simulator(deployment: Deployment, traffic: Traffic) -> Simulator:
    """The deployment, made ready for `traffic`. Raises ValueError for what cannot be, lengths beyond the context included."""
    from stallfree.sim.simulator import Simulator

    made = Simulator(deployment, _placed(deployment))
    traffic.workload.lengths.check(made.instance.capacity.max_model_len)
    return made


def _placed(deployment: Deployment) -> Instance | None:
    """This machine, if that is the hardware, as it was calibrated; else None, for the roofline's. Raises ValueError for what the
    calibration knows nothing of.
    """
    from stallfree.checkpoint.fetch import cache_folder
    from stallfree.cli.perf import THIS_CPU
    from stallfree.engine.calibrate import latest
    from stallfree.sim.simulator import Instance

    if deployment.hardware != THIS_CPU:
        return None
    if (deployment.tp, deployment.pp, deployment.weights, deployment.kv) != (1, 1, "fp16", "fp16"):
        raise ValueError(f"{THIS_CPU} is simulated as it was calibrated; tp, pp, weights and kv are for other hardware")
    found = latest(cache_folder() / "calibration", deployment.model)
    about = f"{found.name} on this machine, as calibrated"
    return Instance(found.cost, found.capacity, None, about, scatter=found.scatter)


@contextmanager
def running(simulators: Mapping[str, Tried], number: int | None = None) -> Iterator[Trials]:
    """Processes for trials, `number` of them if that is known, and a bar on a terminal that counts them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from stallfree.sim.trials import Trials

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("trials", total=number)
        with Trials(simulators, lambda: progress.advance(bar)) as pool:
            yield pool


def _counted(traffic: Traffic) -> Iterator[Arrival]:
    """What arrives, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    arrivals = track(traffic.stream(), "requests", traffic.requests, console=console, disable=not console.is_terminal)
    return iter(arrivals)


def _rates(text: str) -> list[float]:
    """Raises ValueError for what are no rates."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < rate < math.inf for rate in found) or len(set(found)) < len(found):
        raise ValueError(f"--rates {text!r} are no different rates above 0; write 0.5,1,2")
    return found


def _told(deployment: Deployment) -> dict[str, Any]:
    """What a deployment is, less what is left to a default."""
    usual = asdict(Deployment())
    return {
        key: value for key, value in asdict(deployment).items() if value != usual[key] or key in ("model", "hardware", "policy")
    }


def _words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def _figures(report: Report) -> list[str]:
    ttft, tbt = report.ttft_s, report.tbt_s
    times = ["-", "-"] if ttft is None else [f"{ttft.p50:.3g}", f"{ttft.p99:.3g}"]
    times += ["-", "-"] if tbt is None else [f"{1e3 * tbt.p50:.3g}", f"{1e3 * tbt.p99:.3g}"]
    slo = ", ".join(f"{name} {100 * one.in_time:.4g} %" for name, one in report.slo_attainment.items() if one.in_time is not None)
    return [*times, f"{report.output_tokens_per_s:,.0f}", slo or "-"]


def _at_capacity(found: Capacity, made: list[dict[str, Any]]) -> list[str]:
    """The capacity, the rate above it, and the figures of the first trial at the capacity."""
    above = "-" if found.above is None else f"{found.above:.4g}"
    at = [trial for trial in made if trial["rate"] == found.rate and trial["passed"]]
    if not at:
        return ["none", above, "-", "-", "-", "-"]
    first = at[0]
    cost = first["dollars_per_million_tokens"]
    return [
        f"{found.rate:.4g}",
        above,
        f"{first['ttft_s']['p50']:.3g}",
        f"{1e3 * first['tbt_s']['p99']:.3g}" if first["tbt_s"] else "-",
        f"{first['output_tokens_per_s']:,.0f}",
        "-" if cost is None else f"{cost:.2f}",
    ]
