"""`stallfree plan`: co-locate or disaggregate, and how to split the devices, for a model, load and targets. It starts no server."""

from __future__ import annotations

import json
import time
from bisect import bisect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stallfree.cli import options, words
from stallfree.planner.site import Site, counted
from stallfree.workload.traffic import Traffic

if TYPE_CHECKING:
    from stallfree.planner.search import Answer, Ranked
    from stallfree.sim.trials import Trials, Tried

REQUESTS = 128
"""Least requests in a trial; more are added until arrivals last `planner.capacities.SECONDS`."""
OF_TRACE, TOKENS, FEWEST = 512, 2**17, 64
"""A trial has this many requests of a trace, or more if they have at most so many output tokens together: these are what a trial
costs. A trace must have the fewest."""
RATES = (0.6, 0.8, 0.95, 1.1, 1.3)
"""Rates at which attainments are compared, as shares of the winner's capacity."""


@words.spread("rate", "duration", "requests")
@words.mistakes()
def plan(
    site: Site,
    traffic: Traffic,
    slo: Annotated[str, typer.Option(help="Latency targets, such as ttft=2s@p90,tbt=100ms@p99; or of classes, as for `simulate`.")],
    trace: words.Trace = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Find the deployment with the highest goodput per GPU for a load, co-located or disaggregated, by simulation.

    stallfree plan --model llama2-13b --gpus 16 --nodes 4 --link ib-200g --lengths openchat --slo ttft=2s@p90,tbt=100ms@p99
    """

    from stallfree.cli import measuring, outputs
    from stallfree.cli.simulate import running
    from stallfree.core.classes import Classes
    from stallfree.metrics.page import plan_page
    from stallfree.planner.candidates import Candidates
    from stallfree.planner.commands import cross_check
    from stallfree.planner.known import known
    from stallfree.planner.parts import Lengths
    from stallfree.planner.search import attainments, search
    from stallfree.planner.verdict import verdict

    measuring.check_page(html)
    traffic = words.traced(traffic, trace)
    targets = Classes.parse(slo)
    first = targets.default
    if first.ttft is None:
        raise ValueError(f"a KV transfer delays first tokens, and {first} has no target for them; add one: ttft=2s@p90,{first}")
    words.check_classes(traffic, targets)
    candidates = Candidates(site)
    traffic = _fitting(traffic, min(shape.capacity.max_model_len for shape in candidates.shapes.values()))
    with running({}) as pool:  # all stages of the search have the same processes

        def run(simulators: Mapping[str, Tried]) -> AbstractContextManager[Trials]:
            pool.know(simulators)
            return nullcontext(pool)

        answer = search(candidates, traffic, targets, run, lambda line: typer.echo(line, err=True))
        advice = verdict(site, answer, traffic, targets)
        rates = [share * answer.best.rate for share in RATES]
        points = attainments(answer.whole, rates, traffic, targets, run) if html is not None or as_json else {}
    load = f"{traffic.lengths} tokens, {traffic.arrivals} arrivals" if trace is None else f"{traffic.requests} requests of {trace}"
    planned = f"{site.model} on {site.gpus} x {site.hardware}, {_where(site)}"
    question = f"{planned}; {load}; {targets}."
    rows = _table(answer, site, traffic)
    lines = [_simulated(answer, site, traffic), advice.headline, advice.binds]
    if advice.moved is not None:
        lines.append(advice.moved)
    if advice.dollars is not None:
        lines.append(f"${advice.dollars:.2f} per million output tokens at capacity.")
    sources, lengths = known(site, answer, traffic), Lengths.of(traffic)
    other = cross_check(site, lengths.prompt, lengths.output, first)
    about = ["How much of this is known:", *(f"- {what}: {source}" for what, source in sources.items())]
    if other is not None:
        about.append(f"- another tool's answer, for mean lengths without bursts: {other}")
    if as_json:
        result: dict[str, Any] = {"site": asdict(site), "workload": traffic.facts(traffic.requests or 0), "slo": str(targets)}
        result |= {"verdict": asdict(advice), "units": [_facts(unit, site) for unit in answer.ranked]}
        result |= {"all_gpus": [_facts(whole, site) for whole in answer.whole], "known": sources, "cross_check": other}
        attained = {name: [{"rate": rate} | asdict(report) for rate, report in pairs] for name, pairs in points.items()}
        typer.echo(json.dumps(result | {"attainment": attained}))
    if html is not None:
        facts = [time.strftime("%Y-%m-%d %H:%M"), question, *lines, *advice.commands, *about]
        outputs.write_page(html, plan_page(f"stallfree plan: {planned}", facts, rows, points, first))
    if not as_json:
        typer.echo(question)
        measuring.print_grid(rows)
        for line in (*lines, *advice.commands, *about):
            typer.echo(line)


def _fitting(traffic: Traffic, longest: int) -> Traffic:
    """`traffic` of requests that every split of the model can serve, `longest` tokens at most, and as many of them as a trial has.
    Raises ValueError if none or too few fit.
    """
    if traffic.max_total is None:
        _ = traffic.workload  # other mistakes are found here
        traffic = replace(traffic, max_total=longest)
        try:
            _ = traffic.workload
        except ValueError as error:
            raise ValueError(f"{error} (without --max-total it is the context of all splits, see --max-model-len)") from None
    traffic.workload.lengths.check(longest)
    return replace(traffic, requests=_requests(traffic))


def _requests(traffic: Traffic) -> int:
    """How many requests a trial has. Raises ValueError for a trace with fewer than `FEWEST` that fit, or without a rate."""
    from stallfree.workload.trace import Trace

    base = traffic.workload.lengths.base
    if traffic.arrivals != "trace" or not isinstance(base, Trace):
        return REQUESTS
    number = len(base.lengths)
    if number < FEWEST:
        raise ValueError(
            f"the trace {traffic.lengths} has {counted(number, 'request')} that fit{'s' if number == 1 else ''}; "
            f"a plan needs at least {FEWEST}"
        )
    _ = base.rate  # a trace without one cannot be stretched to the rates of the search
    cheap = bisect(list(accumulate(row[1] for row in base.lengths)), TOKENS)
    return min(number, max(OF_TRACE, cheap))


def _where(site: Site) -> str:
    return "1 node" if site.nodes == 1 else f"{site.nodes} nodes with {site.link}"


def _simulated(answer: Answer, site: Site, traffic: Traffic) -> str:
    """What the rows of the table are, and what the intervals are."""
    draws = len(answer.best.draws)
    interval = f"in {draws} draws of the load; the rate is their median"
    if traffic.arrivals == "trace":
        interval = f"in {draws} parts of the trace" if draws > 1 else "of the whole trace, which is too short for parts"
    rows = "Each row was simulated as one cluster on the GPUs that it names."
    if not all(ranked.whole for ranked in answer.ranked):
        rows = "Rows of one cluster were simulated so; the others are the rate of one unit times the number of units."
    return f"{rows} Intervals are the lowest and the highest capacity {interval}."


def _table(answer: Answer, site: Site, traffic: Traffic) -> list[list[str]]:
    """A row of names, then the ranked deployments: those with an interval, others that were simulated on all GPUs, and units."""
    heads = ["", "simulated on", "requests/s", "interval", "a GPU", "TTFT p90, s", "TBT p99, ms", "goodput share"]
    heads.append("missed above that")
    first = sorted(answer.ranked, key=lambda each: (len(each.draws) == 1, not each.whole))
    return [heads, *(_row(ranked, site, traffic) for ranked in first)]


def _row(ranked: Ranked, site: Site, traffic: Traffic) -> list[str]:
    from stallfree.planner.candidates import size
    from stallfree.planner.search import begin

    report = ranked.at
    figures = ["-", "-", "-"]
    if report is not None and report.ttft_s is not None and report.tbt_s is not None and report.goodput is not None:
        figures = [f"{report.ttft_s.p90:.3g}", f"{1000 * report.tbt_s.p99:.3g}", f"{report.goodput.share:.1%}"]
    on = counted(size(ranked.deployed), "GPU") + ("" if ranked.units == 1 else f" x {ranked.units}")
    if len(ranked.draws) == 1 and (number := begin(traffic).requests) != traffic.requests:
        on += f", {number} requests"
    interval = f"{min(ranked.draws):.3g} to {max(ranked.draws):.3g}" if len(ranked.draws) > 1 else "-"
    rates = [f"{ranked.total:.3g}", interval, f"{ranked.total / site.gpus:.3g}"]
    if not ranked.rate and ranked.above is not None and ranked.above.request_rate.nominal is not None:
        rates = [f"below {ranked.units * ranked.above.request_rate.nominal:.3g}", "-", "-"]
    return [ranked.title, on, *rates, *figures, "; ".join(ranked.why)]


def _facts(ranked: Ranked, site: Site) -> dict[str, Any]:
    return {
        "name": ranked.name,
        "units": ranked.units,
        "simulated_whole": ranked.whole,
        "capacity": ranked.rate,
        "interval": [min(ranked.draws), max(ranked.draws)] if len(ranked.draws) > 1 else None,
        "draws": ranked.draws,
        "requests_per_s": ranked.total,
        "goodput_per_gpu": ranked.total / site.gpus,
        "deployed": asdict(ranked.deployed),
        "at_capacity": None if ranked.at is None else asdict(ranked.at),
        "missed_above": list(ranked.why),
    }
