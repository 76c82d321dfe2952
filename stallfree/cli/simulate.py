"""`stallfree simulate`, `capacity` and `compare`: simulate a load on a policy, a model and devices, in virtual time."""

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
    from stallfree.sim.elastic import ElasticSimulator
    from stallfree.sim.simulate import Simulation
    from stallfree.sim.simulator import Instance, Simulator
    from stallfree.sim.split import SplitSimulator
    from stallfree.sim.trials import Trial, Trials, Tried
    from stallfree.workload.workload import Arrival

REQUESTS = 2048
"""Requests in a trial, as in the paper (Sarathi-Serve, OSDI'24, section 5)."""


Record = Annotated[
    Path | None,
    typer.Option(help="Write a line for every iteration to this new file, as `serve --record` does.", show_default=False),
]
ChromeTrace = Annotated[
    Path | None, typer.Option(help="Write iterations to this new file, for chrome://tracing and Perfetto.", show_default=False)
]
Policies = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[POLICY]...",
        help="Policies, such as slo or sarathi:512 (tokens per iteration), or systems of two kinds of replicas: distserve, "
        "splitwise, hybrid, taichi, dynaserve; distserve:1 has one for prompts. Without any: the tables [configurations.NAME] of "
        "--config, or --policy.",
        show_default=False,
    ),
]


@words.spread()
@words.mistakes()
def simulate(
    deployment: Deployment,
    traffic: Traffic,
    trace: words.Trace = None,
    record: Record = None,
    chrome_trace: ChromeTrace = None,
    requests_out: options.RequestsOut = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Simulate a load on a deployment, with the server's own scheduler, and report latencies, stalls and the SLO.

    stallfree simulate --model yi-34b --tp 2 --rate 1 --lengths openchat --slo tbt=200ms
    """

    from stallfree.cli import measuring, outputs
    from stallfree.core.slo import Slo
    from stallfree.metrics.page import page
    from stallfree.metrics.report import Tally
    from stallfree.metrics.timeline import Timeline
    from stallfree.sim import chrome

    measuring.check_page(html)
    outputs.check(record, "--record")
    outputs.check(chrome_trace, "--chrome-trace")
    outputs.check_rows(requests_out, "--requests-out")
    if record is not None and deployment.replicas > 1:
        raise ValueError(f"a record is of one replica, not of {deployment.replicas}; leave out --record or --replicas")
    traffic = words.traced(traffic, trace).ending(REQUESTS)
    simulator = _simulator(deployment, traffic)
    targets = simulator.classes or Slo()
    tally, lines, keeps = Tally(targets), list[Timeline](), html is not None or requests_out is not None

    def ended(line: Timeline) -> None:
        tally.add(line)
        if keeps:
            lines.append(line)

    run = simulator.run(_counted(traffic), ended=ended, records=record is not None, spans=chrome_trace is not None)
    report = tally.report(traffic.rate)
    requests = report.completed + sum(report.errors.values())
    name = deployment.policy if deployment.token_budget is None else f"{deployment.policy}:{deployment.token_budget}"
    if record is not None:
        texts = [simulator.header.to_json(), *(step.to_json() for step in run.records[0])]
        outputs.write(record, "".join(f"{text}\n" for text in texts))
    if chrome_trace is not None:
        outputs.write(chrome_trace, json.dumps(chrome.trace(run.spans)))
    if requests_out is not None:
        outputs.write_rows(requests_out, lines)
    if html is not None:
        facts = [simulator.instance.about, _words(_settings(deployment)), _words(traffic.facts(requests))]
        title = f"stallfree simulate, {time.strftime('%Y-%m-%d %H:%M')}"
        outputs.write_page(html, page(title, facts, [], {name: (report, lines)}, simulator.targets or Slo()))
    dollars = simulator.dollars_per_million(report)
    if as_json:
        more = {"iterations": run.iterations, "bubbles": run.bubbles, "dollars_per_million_tokens": dollars}
        typer.echo(json.dumps({"deployment": _settings(deployment), "workload": traffic.facts(requests)} | more | asdict(report)))
        return
    measuring.print_reports({name: report})
    typer.echo(_summary(simulator, run, dollars))
    if deployment.prefix_cache and not report.cached_tokens:
        typer.echo("The prefix cache had no hits. A trace with hash_ids says what prompts share.")


@words.spread("rate", "duration")
@words.mistakes()
def capacity(
    context: typer.Context,
    deployment: Deployment,
    traffic: Traffic,
    policies: Policies = None,
    start: options.Start = 1.0,
    tolerance: options.Tolerance = 0.05,
    trials: options.Trials = 5,
    shortest: options.Shortest = SHORTEST_S,
    trace: words.Trace = None,
    as_json: options.Json = False,
) -> None:
    """Find the highest request rate at which each configuration meets the SLO, by bisection over repeated trials.

    stallfree capacity sarathi:512 sarathi:2048 orca slo --model yi-34b --tp 2 --lengths openchat --slo tbt=200ms

    A trial passes if every target is met, half of the requests are scheduled within 2 s (unless the SLO has a target for TTFT) and
    at most 1 % of them fail. Configurations are searched in parallel processes.
    """

    from stallfree.cli import measuring
    from stallfree.core.classes import Classes

    deployments = words.configurations(context, deployment, policies or [])
    traffic = words.traced(traffic, trace).ending(REQUESTS)
    simulators = {name: _tried(each, traffic) for name, each in deployments.items()}
    for name, each in deployments.items():
        if each.slo is None:
            raise ValueError(f"which targets make the capacity of {name}? give them, such as --slo tbt=100ms")
    rows_of: dict[str, list[dict[str, Any]]] = {name: [] for name in simulators}
    with running(simulators) as pool:

        def tell(name: str, trial: Trial) -> None:
            rate, seed, report, why = trial
            cost = simulators[name].dollars_per_million(report)
            row = {"rate": rate, "seed": seed, "passed": not why, "why": why, "dollars_per_million_tokens": cost}
            rows_of[name].append(row | asdict(report))

        cases = {name: (traffic, Classes.parse(each.slo or ""), start) for name, each in deployments.items()}
        capacities = pool.capacities(cases, tell, tolerance=tolerance, most_trials=trials, shortest_s=shortest)
    if as_json:
        answers = {
            name: {"deployment": _settings(deployments[name]), "slo": deployments[name].slo, "capacity": highest.rate}
            | {"above": highest.above, "decisions": measuring.decisions(highest), "trials": rows_of[name]}
            for name, highest in capacities.items()
        }
        typer.echo(json.dumps({"workload": traffic.facts(traffic.requests or 0), "configurations": answers}))
        return
    rows = [["", "capacity, requests/s", "missed at", "TTFT p50, s", "TBT p99, ms", "output tokens/s", "$ per million"]]
    rows += [[name, *_at_capacity(highest, rows_of[name])] for name, highest in capacities.items()]
    measuring.print_grid(rows)
    for name, highest in capacities.items():
        failed = [trial["why"] for trial in rows_of[name] if trial["rate"] == highest.above and not trial["passed"]]
        if failed:
            typer.echo(f"{name} at {highest.above:.4g} requests/s: {'; '.join(failed[0])}")
        measuring.print_uncertain(highest, trials, f"{name}: ")


@words.spread("rate", "duration")
@words.mistakes()
def compare(
    context: typer.Context,
    deployment: Deployment,
    traffic: Traffic,
    rates: Annotated[str, typer.Option(help="Requests per second, several with commas between them.")],
    policies: Policies = None,
    trace: words.Trace = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Simulate configurations at several rates, and report them side by side.

    stallfree compare sarathi:256 sarathi:2048 slo --model llama3-8b --rates 1,2,4 --slo tbt=100ms --html out.html
    """

    from stallfree.cli import measuring, outputs
    from stallfree.core.classes import Classes
    from stallfree.core.slo import Slo
    from stallfree.metrics.page import loads_page

    measuring.check_page(html)
    deployments = words.configurations(context, deployment, policies or [])
    traffic, loads = words.traced(traffic, trace).ending(REQUESTS), _rates(rates)
    simulators = {name: _tried(each, traffic) for name, each in deployments.items()}
    with running(simulators, len(simulators) * len(loads)) as pool:
        cases = {
            (name, rate): (name, traffic, rate, traffic.seed, Classes.parse(each.slo) if each.slo else Slo())
            for rate in loads
            for name, each in deployments.items()
        }
        reports = pool.reports(cases)
    facts = traffic.facts(traffic.requests or 0)
    if as_json:
        runs = [{"configuration": name, "rate": rate} | asdict(report) for (name, rate), report in reports.items()]
        settings = {name: _settings(each) for name, each in deployments.items()}
        typer.echo(json.dumps({"workload": facts, "configurations": settings, "runs": runs}))
    hits = any(report.cached_tokens for report in reports.values())
    more = ["cached prompt tokens"] if hits else []
    rows = [["", "requests/s", "TTFT p50, s", "TTFT p99, s", "TBT p50, ms", "TBT p99, ms", "output tokens/s", *more, "SLO"]]
    rows += [[name, f"{rate:g}", *_figures(report, hits)] for (name, rate), report in reports.items()]
    if html is not None:
        about = [_words(facts), *(f"{name}: {_words(_settings(each))}" for name, each in deployments.items())]
        outputs.write_page(html, loads_page(f"stallfree compare, {time.strftime('%Y-%m-%d %H:%M')}", about, rows, reports))
    if not as_json:
        measuring.print_grid(rows)
        measuring.print_parts({f"{name}, {rate:g}/s": report for (name, rate), report in reports.items()})


def _summary(simulator: Simulator | ElasticSimulator, run: Simulation, dollars: float | None) -> str:
    """One line about a run; `dollars`: US dollars per million output tokens, if the hardware has a price."""
    kv = simulator.instance.capacity
    bubbles = f", bubbles {run.bubbles:.1%}" if kv.depth > 1 else ""
    price = "" if dollars is None else f", ${dollars:.2f} per million output tokens"
    room = f"{simulator.instance.about}, room for {kv.num_blocks * kv.block_size:,} tokens of KV"
    return f"{room}: {run.iterations:,} iterations{bubbles}{price}"


def _simulator(deployment: Deployment, traffic: Traffic) -> Simulator | ElasticSimulator:
    """A simulator of replicas of one kind. Raises ValueError if it cannot be, if lengths of `traffic` exceed its context, or if its
    requests name a class that is not there.
    """
    from stallfree.elastic.policies import POLICIES
    from stallfree.sim.simulator import Simulator
    from stallfree.sim.systems import SYSTEMS

    if deployment.policy in SYSTEMS:
        raise ValueError(
            f"{deployment.policy} is a system of two kinds of replicas; `stallfree compare` and `capacity` simulate it"
        )
    if deployment.policy in POLICIES:
        from stallfree.sim.elastic import ElasticSimulator

        simulator: Simulator | ElasticSimulator = ElasticSimulator(deployment)
    else:
        simulator = Simulator(deployment, _instance(deployment))
    traffic.workload.lengths.check(simulator.instance.capacity.max_model_len)
    words.check_classes(traffic, simulator.classes)
    return simulator


def _tried(deployment: Deployment, traffic: Traffic) -> Simulator | ElasticSimulator | SplitSimulator:
    """As `_simulator`; also for the systems of two kinds of replicas."""
    from stallfree.sim import systems
    from stallfree.sim.simulator import instance
    from stallfree.sim.split import SplitSimulator

    if deployment.policy not in systems.SYSTEMS:
        return _simulator(deployment, traffic)
    simulator = SplitSimulator(systems.split(deployment, instance(deployment).cost))
    traffic.workload.lengths.check(simulator.max_model_len)
    words.check_classes(traffic, simulator.classes)
    return simulator


def _instance(deployment: Deployment) -> Instance | None:
    """This machine as calibrated, if it is the hardware; else None, for the roofline's instance. Raises ValueError for options that
    the calibration does not cover.
    """
    from stallfree.checkpoint.fetch import cache_folder
    from stallfree.cli.perf import THIS_CPU
    from stallfree.engine.calibrate import latest
    from stallfree.sim.simulator import Instance

    if deployment.hardware != THIS_CPU:
        return None
    if (deployment.tp, deployment.pp, deployment.sp, deployment.weights, deployment.kv) != (1, 1, 1, "fp16", "fp16"):
        raise ValueError(f"{THIS_CPU} is simulated as it was calibrated; tp, pp, sp, weights and kv are for other hardware")
    calibration = latest(cache_folder() / "calibration", deployment.model)
    about = f"{calibration.name} on this machine, as calibrated"
    return Instance(calibration.cost, calibration.capacity, None, about, scatter=calibration.scatter)


@contextmanager
def running(simulators: Mapping[str, Tried], number: int | None = None) -> Iterator[Trials]:
    """Processes for trials, and a bar on a terminal that counts trials. `number`: how many, if that is known."""
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
    """The arrivals of `traffic`, counted by a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    arrivals = track(traffic.stream(), "requests", traffic.requests, console=console, disable=not console.is_terminal)
    return iter(arrivals)


def _rates(text: str) -> list[float]:
    """The rates in "0.5,1,2". Raises ValueError unless they are different numbers above 0."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < math.inf for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"--rates {text!r} are not different rates above 0; write 0.5,1,2")
    return rates


def _settings(deployment: Deployment) -> dict[str, Any]:
    """A deployment's fields, without those at their defaults; always with model, hardware and policy."""
    usual = asdict(Deployment())
    return {
        key: value for key, value in asdict(deployment).items() if value != usual[key] or key in ("model", "hardware", "policy")
    }


def _words(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)


def _figures(report: Report, hits: bool) -> list[str]:
    """Cells of a table. `hits`: one of them is the share of prompt tokens from the prefix cache."""
    from stallfree.metrics.table import cached_share

    ttft, tbt = report.ttft_s, report.tbt_s
    times = ["-", "-"] if ttft is None else [f"{ttft.p50:.3g}", f"{ttft.p99:.3g}"]
    times += ["-", "-"] if tbt is None else [f"{1e3 * tbt.p50:.3g}", f"{1e3 * tbt.p99:.3g}"]
    attained = {name: each.in_time for name, each in report.slo_attainment.items() if each.in_time is not None}
    slo = ", ".join(f"{name} {100 * in_time:.4g} %" for name, in_time in attained.items())
    return [*times, f"{report.output_tokens_per_s:,.0f}", *([cached_share(report)] if hits else []), slo or "-"]


def _at_capacity(capacity: Capacity, trials: list[dict[str, Any]]) -> list[str]:
    """The capacity, the lowest rate that missed the SLO, and the figures of the first trial that passed at the capacity."""
    above = "-" if capacity.above is None else f"{capacity.above:.4g}"
    first = next((trial for trial in trials if trial["rate"] == capacity.rate and trial["passed"]), None)
    if first is None:
        return ["none", above, "-", "-", "-", "-"]
    cost = first["dollars_per_million_tokens"]
    return [
        f"{capacity.rate:.4g}",
        above,
        f"{first['ttft_s']['p50']:.3g}",
        f"{1e3 * first['tbt_s']['p99']:.3g}" if first["tbt_s"] else "-",
        f"{first['output_tokens_per_s']:,.0f}",
        "-" if cost is None else f"{cost:.2f}",
    ]
