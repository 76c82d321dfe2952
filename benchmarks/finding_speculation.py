"""How does speculation move the best token budget, and does the arithmetic hold? Simulated: Llama-3 8B on an A100 and an H100.

arithmetic  one stream whose guesses are right with probability a, k of them in each iteration: its tokens an iteration, and how
much
            quicker it is, beside (1 - a^(k + 1)) / (1 - a) and what the iterations cost (Leviathan et al. 2023). The checks are
            forced here: as many as k in every iteration
streams     how much quicker 1 to 128 streams are with guesses that cost nothing and are right with probability 0.7, if the
engine
            decides how many it checks, and if 7 are always checked
capacity    requests/s within P99 TBT of 50 ms under every fixed budget and under the slo policy, without guesses, with those of
            a lookup (a = 0.5, at no cost), and with those of a small model (a = 0.8, Llama-3.2 1B on the same GPU)

python benchmarks/finding_speculation.py arithmetic streams capacity --plot docs/images/finding_speculation.png
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from harness import machine, parser, show

from stallfree.core.plan import Shape
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.slo import Slo
from stallfree.core.speculation import Speculation
from stallfree.metrics import plot
from stallfree.metrics.timeline import Timeline
from stallfree.policies import load
from stallfree.sim.cluster import serve
from stallfree.sim.deployment import Deployment
from stallfree.sim.guesses import Chance
from stallfree.sim.replica import Replica, script
from stallfree.sim.routers import round_robin
from stallfree.sim.simulator import Simulator, calibrated, instance
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic

MODEL = "llama3-8b"
DEVICES = ("a100-80g", "h100")
BUDGETS = (128, 256, 512, 1024, 2048, 4096)
SLO = "tbt=50ms"
LOAD = Traffic("poisson", "openchat", 8192, requests=200)
SIDES: dict[str, dict[str, Any]] = {
    "none": {},
    "lookup, 0.5": {"draft_acceptance": 0.5},
    "model, 0.8": {"draft_acceptance": 0.8, "draft_model": "llama3.2-1b"},
}
PROMPT, OUTPUT = 512, 20_000
ACCEPTANCES, GUESSES = (0.5, 0.7, 0.9), (1, 3, 5, 7)
STREAMS = (1, 4, 8, 16, 32, 64, 128)


class Free:
    """A cost model to which every token is free, so that as many guesses as there are will be checked."""

    def seconds(self, shape: Shape) -> float:
        return 1.0


def tpot(device: str, streams: int, speculation: Speculation | None, output: int) -> tuple[float, float]:
    """Seconds between tokens of `streams` equal streams at the mean, and tokens that a stream gets in an iteration."""
    place = instance(Deployment(model=MODEL, hardware=device, max_model_len=None))
    capacity = replace(place.capacity, max_model_len=64_000)
    scheduler = Scheduler(load("sarathi", token_budget=4096), capacity, speculation=speculation)
    lines: list[Timeline] = []
    replica = Replica(scheduler, place.cost, ended=lambda r: lines.append(r.sampling.line), leap=64 if speculation is None else 1)
    requests = (script(Request(str(n), range(PROMPT), output), [-2] * output) for n in range(streams))
    serve(requests, [replica], round_robin())
    spans = [(line.tokens[-1] - line.tokens[0]) / (len(line.tokens) - 1) for line in lines]
    return sum(spans) / len(spans), output / replica.iterations


def arithmetic(quick: bool) -> list[dict[str, Any]]:
    rows = []
    output = OUTPUT // 10 if quick else OUTPUT
    for device in DEVICES:
        place = instance(Deployment(model=MODEL, hardware=device))
        alone, _ = tpot(device, 1, None, output)
        for a, k in product(ACCEPTANCES, GUESSES):
            seconds, accepted = tpot(device, 1, Speculation(Chance(a), Free(), k), output)
            closed = (1 - a ** (k + 1)) / (1 - a)
            middle = PROMPT + output // 2
            dearer = place.cost.seconds([(middle, 1 + k), (k, 0)]) / place.cost.seconds([(middle, 1)])
            rows.append(
                {
                    "device": device, "a": a, "k": k, "tokens an iteration": accepted, "closed form": closed,
                    "error": f"{accepted / closed - 1:+.1%}", "speed-up": alone / seconds,
                    "closed form over the price": closed / dearer, "its error": f"{alone / seconds / (closed / dearer) - 1:+.1%}",
                }
            )  # fmt: skip
    return rows


def streams(quick: bool) -> list[dict[str, Any]]:
    rows = []
    output = 300 if quick else 1000
    for device in DEVICES:
        place = instance(Deployment(model=MODEL, hardware=device))
        for number in STREAMS:
            alone, _ = tpot(device, number, None, output)
            decided = Speculation(Chance(0.7), calibrated(place), 7)
            chosen, _ = tpot(device, number, decided, output)
            always, _ = tpot(device, number, Speculation(Chance(0.7), Free(), 7), output)
            rows.append(
                {
                    "device": device, "streams": number, "TPOT alone, ms": 1e3 * alone, "the engine decides": alone / chosen,
                    "always 7": alone / always, "checked a token": decided.drafted / (number * output),
                }
            )  # fmt: skip
    return rows


def capacity(quick: bool) -> list[dict[str, Any]]:
    budgets = (*(BUDGETS[::2] if quick else BUDGETS), None)
    traffic = replace(LOAD, requests=100) if quick else LOAD
    simulators, searches = {}, {}
    for device, side, budget in product(DEVICES, SIDES, budgets):
        policy: dict[str, Any] = {"policy": "slo"} if budget is None else {"policy": "sarathi", "token_budget": budget}
        name = f"{device} {side} {budget}"
        deployment = Deployment(model=MODEL, hardware=device, max_model_len=8192, slo=SLO, **policy, **SIDES[side])
        simulators[name] = Simulator(deployment)
        searches[name] = traffic, Slo.parse(SLO), 8.0
    with Trials(simulators) as trials:
        found = {name: capacity.rate for name, capacity in trials.capacities(searches, lowest=0.05).items()}
    rows = []
    for device, side in product(DEVICES, SIDES):
        rates = {budget: found[f"{device} {side} {budget}"] for budget in budgets}
        slo = rates.pop(None)
        best = max(rates, key=lambda budget: rates[budget])
        rows.append(
            {"device": device, "guesses": side}
            | {str(budget): rate for budget, rate in rates.items()}
            | {"slo": slo, "best": str(best), "slo / best": slo / rates[best] if rates[best] else None}
        )
    return rows


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    sides = {
        f"{row['device']}, {row['guesses']}": [(float(budget), row[str(budget)]) for budget in BUDGETS if str(budget) in row]
        for row in rows
    }
    plot.lines(sides, "token budget", "requests/s", f"{MODEL}, openchat, {SLO} at P99", file, log="x")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("sections", nargs="+", choices=("arithmetic", "streams", "capacity"))
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the capacities over the budget")
    args = arguments.parse_args()
    for section in args.sections:
        rows = {"arithmetic": arithmetic, "streams": streams, "capacity": capacity}[section](args.quick)
        show(section, rows, machine(), args.json and args.json.with_suffix(f".{section}.json"))
        if section == "capacity" and args.plot:
            draw(rows, args.plot)


if __name__ == "__main__":
    main()
