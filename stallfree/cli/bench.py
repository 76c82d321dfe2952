"""`stallfree bench`: measures servers over HTTP: one load, a capacity, or several side by side. It knows no engine."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stallfree.cli import options, words
from stallfree.workload.traffic import SHORTEST_S, Traffic

if TYPE_CHECKING:
    from stallfree.bench.client import Client
    from stallfree.bench.dialect import Dialect
    from stallfree.cli.measuring import Place
    from stallfree.metrics.report import Targets
    from stallfree.workload.workload import Arrival

app = typer.Typer(help="Measure servers under load. They must have OpenAI's API.", no_args_is_help=True, rich_markup_mode=None)

Url = Annotated[str, typer.Option(help="The server, with or without /v1.")]
Slos = Annotated[
    str | None,
    typer.Option(
        "--slo",
        help="Latency targets: ttft=2s@p90,tbt=100ms@p99; or of classes, as 'interactive: ttft=1s,tbt=50ms; batch: ttlt=10min'.",
        show_default=False,
    ),
]
Model = Annotated[str | None, typer.Option("--model", "-m", help="The server's name of the model.", show_default="its first")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="STALLFREE_API_KEY", help="Sent as a bearer token.", show_envvar=True, show_default=False)
]
Timeout = Annotated[float, typer.Option(help="Most seconds of a request, output included.")]

REQUESTS = 200
LONGEST_S = 1800.0
"""Most seconds of arrivals in a trial: lower rates would take longer, and are not searched."""


@app.command(short_help="Latencies, stalls and the SLO at one rate.")
@words.spread()
def load(
    traffic: Traffic,
    url: Url = "http://127.0.0.1:8000",
    slo: Slos = None,
    model: Model = None,
    api_key: ApiKey = None,
    timeout: Timeout = 600,
    trace: words.Trace = None,
    requests_out: options.RequestsOut = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Send requests at a rate, without waiting for earlier ones, and report latencies, stalls and the SLO.

    Exit code 1 if the run is not valid: the client fell behind its schedule, was interrupted, or no request completed.
    """
    from stallfree.cli import measuring, outputs
    from stallfree.core.classes import Classes
    from stallfree.core.slo import Slo

    targets = Slo() if slo is None else Classes.parse(slo)
    measuring.check_page(html)
    outputs.check_rows(requests_out, "--requests-out")
    arrivals, facts = _draw(words.traced(traffic, trace), targets)
    access = measuring.Access(model, api_key, timeout)
    results, error = measuring.measure([measuring.Place(url, url)], access, arrivals, targets, traffic.rate)
    if requests_out is not None:
        outputs.write_rows(requests_out, (line for run, _ in results.values() for line in run.lines))
    if html is not None:
        measuring.write_page(html, results, facts, targets)
    if as_json:
        ((run, report),) = results.values()
        typer.echo(json.dumps({"workload": facts} | run.as_dict(report)))
    else:
        measuring.show(results)
    measuring.end(results, error)


@app.command(short_help="Policies, or servers, side by side.")
@words.spread()
def compare(
    servers: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT",
            help="Policies, such as slo or sarathi:128 (tokens per iteration), each served by `stallfree serve` in turn; "
            "and servers that already run, such as theirs=http://127.0.0.1:8001.",
        ),
    ],
    traffic: Traffic,
    slo: Slos = None,
    serve: Annotated[
        str,
        typer.Option(help="More arguments of `stallfree serve` for policies: 'model.gguf --threads 2'.", show_default=False),
    ] = "",
    api_key: ApiKey = None,
    timeout: Timeout = 600,
    trace: words.Trace = None,
    as_json: options.Json = False,
    html: options.Html = None,
) -> None:
    """Put the same load on several policies or servers, one after another, and report them side by side.

    stallfree bench compare sarathi:64 slo --rate 2 --slo tbt=100ms

    For each policy the command starts `stallfree serve` with the SLO, and stops it afterwards. Exit code 1 if a run is not valid.
    """
    from stallfree.cli import measuring
    from stallfree.core.classes import Classes
    from stallfree.core.slo import Slo

    targets = Slo() if slo is None else Classes.parse(slo)
    measuring.check_page(html)
    places = [_place(text, slo, serve) for text in servers]
    if twice := {place.name for place in places if sum(other.name == place.name for other in places) > 1}:
        raise ValueError(f"{sorted(twice)[0]!r} is named twice; give each server its own name, and each policy once")
    arrivals, facts = _draw(words.traced(traffic, trace), targets)
    results, error = measuring.measure(places, measuring.Access(None, api_key, timeout), arrivals, targets, traffic.rate)
    if html is not None:
        measuring.write_page(html, results, facts, targets)
    if as_json:
        runs = {name: run.as_dict(report) for name, (run, report) in results.items()}
        typer.echo(json.dumps({"workload": facts, "servers": runs}))
    else:
        measuring.show(results)
    measuring.end(results, error)


@app.command(short_help="The highest rate that meets a latency target.")
@words.spread("rate", "duration")
def capacity(
    slo: Annotated[str, typer.Option(help="Latency targets that define the capacity: ttft=2s@p90,tbt=100ms@p99.")],
    traffic: Traffic,
    url: Url = "http://127.0.0.1:8000",
    start: options.Start = 1.0,
    tolerance: options.Tolerance = 0.05,
    trials: options.Trials = 5,
    shortest: options.Shortest = SHORTEST_S,
    model: Model = None,
    api_key: ApiKey = None,
    timeout: Timeout = 600,
    trace: words.Trace = None,
    as_json: options.Json = False,
) -> None:
    """Find the highest request rate at which the server meets an SLO, by bisection over repeated trials.

    A trial passes if every target is met, the median TTFT is at most 2 s (unless the SLO has a target for it) and at most 1 % of
    the requests fail. Exit code 1 if it was interrupted, or if the client was too slow for a verdict.
    """

    from stallfree.cli import measuring
    from stallfree.core.classes import Classes
    from stallfree.metrics.capacity import Capacity, search

    traffic = words.traced(traffic, trace)
    requests = REQUESTS if traffic.requests is None else traffic.requests
    traffic, targets = replace(traffic, requests=requests), Classes.parse(slo)
    _check_classes(traffic, targets)
    trial = _Trial(measuring.Access(model, api_key, timeout).client(url), model, traffic, shortest, targets)
    highest, problems = Capacity(0.0, None, ()), []
    try:
        lowest = requests / LONGEST_S
        highest = search(trial, start, lowest=lowest, tolerance=tolerance, most_trials=trials, seed=traffic.seed)
    except KeyboardInterrupt:
        problems.append(f"interrupted after {len(trial.rows)} trials")
    if highest.above in trial.behind:
        problems.append(f"the server may be capable of more: at {highest.above:.4g} requests/s {trial.behind[highest.above]}")
    if as_json:
        answer = {"valid": not problems, "problems": problems, "slo": str(targets), "workload": traffic.facts(requests)}
        answer |= {"capacity": highest.rate if highest.decisions else None, "above": highest.above}
        typer.echo(json.dumps(answer | {"decisions": measuring.decisions(highest), "trials": trial.rows}))
    else:
        measuring.print_grid(_trials(trial.rows))
        if highest.rate:
            above = "no rate missed it" if highest.above is None else f"missed at {highest.above:.4g}"
            typer.echo(f"capacity {highest.rate:.4g} requests/s for {targets} ({above})")
        elif highest.decisions:
            typer.echo(f"no capacity: {targets} is missed at {highest.above:.4g} requests/s, the lowest rate tried")
        measuring.print_uncertain(highest, trials)
    for problem in problems:
        typer.echo(f"not valid: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


class _Trial:
    """The trials of a search. `rows`: their results. `behind`: the rates at which the client was too slow, and why."""

    def __init__(self, client: Client, model: str | None, traffic: Traffic, shortest: float, targets: Targets):
        self.rows: list[dict[str, Any]] = []
        self.behind: dict[float, str] = {}
        self._client, self._model, self._targets = client, model, targets
        self._traffic, self._shortest = traffic, shortest
        self._workload = traffic.lasting(shortest, 1.0).workload  # raises for a mistake before the first trial
        self._dialect: Dialect | None = None

    def __call__(self, rate: float, seed: int) -> bool:
        """Whether the server meets the targets at `rate`. Raises KeyboardInterrupt if the user interrupts the trial."""
        from stallfree.cli import measuring
        from stallfree.metrics.capacity import shortfalls
        from stallfree.metrics.report import report

        arrivals = self._workload.draw(rate, seed, requests=self._traffic.lasting(self._shortest, rate).requests)
        if self._dialect is None:
            self._dialect = measuring.probe(self._client, self._model)
        run = measuring.follow(self._client, self._dialect, arrivals, f"{rate:.4g}/s")
        if run.interrupted:
            raise KeyboardInterrupt
        result = report(run.lines, self._targets, rate)
        why = shortfalls(result, self._targets)
        if run.behind:
            self.behind[rate] = run.behind
            why.append(run.behind)
        typer.echo(f"{rate:.4g} requests/s, seed {seed}: {'; '.join(why) or 'passed'}", err=True)
        self.rows.append({"rate": rate, "seed": seed, "passed": not why, "why": why} | run.as_dict(result))
        return not why


def _draw(traffic: Traffic, targets: Targets) -> tuple[list[Arrival], dict[str, Any]]:
    """The arrivals of `traffic`, and the facts that describe how they were drawn. Raises ValueError for classes that `targets`, if
    they have any, do not have.
    """
    _check_classes(traffic, targets)
    arrivals = traffic.ending(REQUESTS).draw()
    return arrivals, traffic.facts(len(arrivals))


def _check_classes(traffic: Traffic, targets: Targets) -> None:
    """Raises ValueError for a class without targets, unless no class has any: then only the server knows its classes."""
    from stallfree.core.classes import Classes

    if isinstance(targets, Classes) and any(targets):
        words.check_classes(traffic, targets)


def _place(text: str, slo: str | None, serve: str) -> Place:
    """The server in `text`: NAME=URL for one that runs, or a policy (with a budget, if a number follows) for one to start."""
    import shlex

    from stallfree import policies
    from stallfree.cli.measuring import Place

    name, equals, url = text.partition("=")
    if "://" in name:
        raise ValueError(f"the server {text} has no name; write theirs={text}")
    if equals:
        if not (name and url):
            raise ValueError(f"{text!r} is neither a policy nor a named server; write theirs=http://127.0.0.1:8001")
        return Place(name, url)
    policy, budget = words.policy(text)
    policies.load(policy, token_budget=budget)  # raises for a mistake before the first run
    try:
        arguments = shlex.split(serve)
    except ValueError as error:
        raise ValueError(f"--serve {serve!r}: {error}") from None
    chosen = {"--policy": policy, "--slo": slo, "--token-budget": budget}
    return Place(text, None, (*arguments, *(str(word) for item in chosen.items() if item[1] is not None for word in item)))


def _trials(trials: list[dict[str, Any]]) -> list[list[str]]:
    """Trials as rows of a table, in the order of their rates."""
    rows = [["requests/s", "seed", "TTFT p50, s", "TBT p99, ms", "output tokens/s", "verdict"]]
    for t in sorted(trials, key=lambda t: (t["rate"], t["seed"])):
        ttft, tbt = t["ttft_s"], t["tbt_s"]
        figures = [f"{ttft['p50']:.3g}" if ttft else "-", f"{tbt['p99'] * 1e3:.3g}" if tbt else "-"]
        verdict = "passed" if t["passed"] else "failed"
        rows.append([f"{t['rate']:.4g}", str(t["seed"]), *figures, f"{t['output_tokens_per_s']:.3g}", verdict])
    return rows
