"""`stallfree plan`: co-locate or disaggregate, with which split of the devices, for this model, load and targets."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stallfree.cli import options, words
from stallfree.planner.site import Site
from stallfree.workload.traffic import Traffic

if TYPE_CHECKING:
    from stallfree.planner.search import Ranked

REQUESTS = 128
"""In a trial, at least; more if fewer seconds would pass than `planner.search.SECONDS`."""
OF_TRACE, FEWEST = 512, 64
"""Requests from the beginning of a trace that are simulated, as many as it has; and how many it must have."""
RATES = (0.6, 0.8, 0.95, 1.1, 1.3)
"""Of the winner's capacity: where attainments are compared."""


@words.spread("rate", "duration", "requests")
@words.mistakes()
def plan(
    site: Site,
    traffic: Traffic,
    slo: Annotated[str, typer.Option(help="Latency targets, as ttft=2s@p90,tbt=100ms@p99.")],
    trace: words.Trace = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Find the deployment with the highest goodput per GPU for a load, co-located or disaggregated, by simulation.

    stallfree plan --model llama2-13b --gpus 16 --nodes 4 --link ib-200g --lengths openchat --slo ttft=2s@p90,tbt=100ms@p99
    """

    from stallfree.cli import measuring, outputs
    from stallfree.cli.simulate import running
    from stallfree.core.slo import Slo
    from stallfree.metrics.page import plan_page
    from stallfree.planner.candidates import Candidates
    from stallfree.planner.search import attainments, search
    from stallfree.planner.verdict import verdict

    measuring.check_page(html)
    traffic = words.traced(traffic, trace)
    targets = Slo.parse(slo)
    if targets.ttft is None:
        raise ValueError(f"a KV transfer delays first tokens, and {slo} has no target for them; add one, as ttft=2s@p90,{slo}")
    there = Candidates(site)
    longest = min(one.capacity.max_model_len for one in there.shapes.values())
    if traffic.max_total is None:
        traffic = replace(traffic, max_total=longest)
    traffic = replace(traffic, requests=_requests(traffic))
    traffic.workload.lengths.check(longest)
    answer = search(there, traffic, targets, running, lambda line: typer.echo(line, err=True))
    told = verdict(site, answer, traffic, targets)
    rates = [share * answer.best.rate for share in RATES]
    points = attainments(answer.whole, rates, traffic, targets, running) if html is not None or as_json else {}
    load = f"{traffic.lengths} tokens, {traffic.arrivals} arrivals" if trace is None else f"{traffic.requests} requests of {trace}"
    planned = f"{site.model} on {site.gpus} x {site.hardware}, {site.nodes} nodes"
    asked = f"{planned}, {site.link}; {load}; {targets}."
    rows = [["", "GPUs", "requests/s", "a GPU", "TTFT p90, s", "TBT p99, ms", "goodput share", "missed above that"]]
    rows += [_row(one, site) for one in answer.ranked]
    said = ["In the table: units, times how many there is room for. The answer: the best of both kinds, simulated on all GPUs."]
    said += [told.headline, told.binds]
    if told.dollars is not None:
        said.append(f"${told.dollars:.2f} per million output tokens at capacity.")
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "site": asdict(site),
                    "workload": traffic.facts(traffic.requests or 0),
                    "slo": str(targets),
                    "verdict": asdict(told),
                    "units": [_facts(one, site) for one in answer.ranked],
                    "all_gpus": [_facts(one, site) for one in answer.whole],
                    "attainment": {
                        name: [{"rate": rate} | asdict(report) for rate, report in several] for name, several in points.items()
                    },
                }
            )
        )
    if html is not None:
        facts = [time.strftime("%Y-%m-%d %H:%M"), asked, *said, *told.commands]
        outputs.write(html, plan_page(f"stallfree plan: {planned}", facts, rows, points, targets))
        typer.echo(f"table and plot are in {html}", err=True)
    if not as_json:
        typer.echo(asked)
        measuring.print_grid(rows)
        for line in (*said, *told.commands):
            typer.echo(line)


def _requests(traffic: Traffic) -> int:
    """How many a trial has. Raises ValueError for a trace with too few that fit."""
    if traffic.arrivals != "trace":
        return REQUESTS
    there = sum(1 for _ in islice(replace(traffic, requests=None).stream(1.0), OF_TRACE))
    if there < FEWEST:
        raise ValueError(f"the trace {traffic.lengths} has {there} requests that fit; a plan needs {FEWEST} at least")
    return there


def _row(one: Ranked, site: Site) -> list[str]:
    from stallfree.planner.candidates import size

    report = one.at
    figures = ["-", "-", "-"]
    if report is not None and report.ttft_s is not None and report.tbt_s is not None and report.goodput is not None:
        figures = [f"{report.ttft_s.p90:.3g}", f"{1000 * report.tbt_s.p99:.3g}", f"{report.goodput.share:.1%}"]
    name = f"{one.units} x {one.name}" if one.units > 1 else one.name
    gpus, each = str(one.units * size(one.deployed)), one.total / site.gpus
    return [name, gpus, f"{one.total:.3g}", f"{each:.3g}", *figures, "; ".join(one.why)]


def _facts(one: Ranked, site: Site) -> dict[str, Any]:
    return {
        "name": one.name,
        "units": one.units,
        "capacity": one.rate,
        "requests_per_s": one.total,
        "goodput_per_gpu": one.total / site.gpus,
        "deployed": asdict(one.deployed),
        "at_capacity": None if one.at is None else asdict(one.at),
        "missed_above": list(one.why),
    }
