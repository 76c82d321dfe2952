"""`stallfree plan`: co-locate or disaggregate, and how to split the devices, for a model, load and targets. It starts no server."""

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
"""Least requests in a trial; more are added until arrivals last `planner.search.SECONDS`."""
OF_TRACE, FEWEST = 512, 64
"""At most this many requests, from the beginning of a trace, are simulated; and the fewest that it must have."""
RATES = (0.6, 0.8, 0.95, 1.1, 1.3)
"""Rates at which attainments are compared, as shares of the winner's capacity."""


@words.spread("rate", "duration", "requests")
@words.mistakes()
def plan(
    site: Site,
    traffic: Traffic,
    slo: Annotated[str, typer.Option(help="Latency targets, such as ttft=2s@p90,tbt=100ms@p99.")],
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
        raise ValueError(f"a KV transfer delays first tokens, and {slo} has no target for them; add one: ttft=2s@p90,{slo}")
    candidates = Candidates(site)
    longest = min(shape.capacity.max_model_len for shape in candidates.shapes.values())
    if traffic.max_total is None:
        traffic = replace(traffic, max_total=longest)
    traffic = replace(traffic, requests=_requests(traffic))
    traffic.workload.lengths.check(longest)
    answer = search(candidates, traffic, targets, running, lambda line: typer.echo(line, err=True))
    advice = verdict(site, answer, traffic, targets)
    rates = [share * answer.best.rate for share in RATES]
    points = attainments(answer.whole, rates, traffic, targets, running) if html is not None or as_json else {}
    load = f"{traffic.lengths} tokens, {traffic.arrivals} arrivals" if trace is None else f"{traffic.requests} requests of {trace}"
    planned = f"{site.model} on {site.gpus} x {site.hardware}, {site.nodes} nodes"
    question = f"{planned}, {site.link}; {load}; {targets}."
    rows = [["", "GPUs", "requests/s", "a GPU", "TTFT p90, s", "TBT p99, ms", "goodput share", "missed above that"]]
    rows += [_row(unit, site) for unit in answer.ranked]
    lines = ["Rows extrapolate one unit to all GPUs. Only the best of each kind was simulated on all GPUs."]
    lines += [advice.headline, advice.binds]
    if advice.dollars is not None:
        lines.append(f"${advice.dollars:.2f} per million output tokens at capacity.")
    if as_json:
        result: dict[str, Any] = {"site": asdict(site), "workload": traffic.facts(traffic.requests or 0), "slo": str(targets)}
        result |= {"verdict": asdict(advice), "units": [_facts(unit, site) for unit in answer.ranked]}
        result |= {"all_gpus": [_facts(whole, site) for whole in answer.whole]}
        attained = {name: [{"rate": rate} | asdict(report) for rate, report in pairs] for name, pairs in points.items()}
        typer.echo(json.dumps(result | {"attainment": attained}))
    if html is not None:
        facts = [time.strftime("%Y-%m-%d %H:%M"), question, *lines, *advice.commands]
        outputs.write_page(html, plan_page(f"stallfree plan: {planned}", facts, rows, points, targets))
    if not as_json:
        typer.echo(question)
        measuring.print_grid(rows)
        for line in (*lines, *advice.commands):
            typer.echo(line)


def _requests(traffic: Traffic) -> int:
    """How many requests a trial has. Raises ValueError for a trace with fewer than `FEWEST` that fit."""
    if traffic.arrivals != "trace":
        return REQUESTS
    number = sum(1 for _ in islice(replace(traffic, requests=None).stream(1.0), OF_TRACE))
    if number < FEWEST:
        raise ValueError(f"the trace {traffic.lengths} has {number} requests that fit; a plan needs at least {FEWEST}")
    return number


def _row(ranked: Ranked, site: Site) -> list[str]:
    from stallfree.planner.candidates import size

    report = ranked.at
    figures = ["-", "-", "-"]
    if report is not None and report.ttft_s is not None and report.tbt_s is not None and report.goodput is not None:
        figures = [f"{report.ttft_s.p90:.3g}", f"{1000 * report.tbt_s.p99:.3g}", f"{report.goodput.share:.1%}"]
    name = f"{ranked.units} x {ranked.name}" if ranked.units > 1 else ranked.name
    gpus, each = str(ranked.units * size(ranked.deployed)), ranked.total / site.gpus
    return [name, gpus, f"{ranked.total:.3g}", f"{each:.3g}", *figures, "; ".join(ranked.why)]


def _facts(ranked: Ranked, site: Site) -> dict[str, Any]:
    return {
        "name": ranked.name,
        "units": ranked.units,
        "capacity": ranked.rate,
        "requests_per_s": ranked.total,
        "goodput_per_gpu": ranked.total / site.gpus,
        "deployed": asdict(ranked.deployed),
        "at_capacity": None if ranked.at is None else asdict(ranked.at),
        "missed_above": list(ranked.why),
    }
