"""Does it pay to let streams sit out that have time? Simulated: Mistral-7B on an A100, openchat.

The sides: `sarathi` with the best of three fixed token budgets, what FairBatching (arXiv 2510.14392) and SLAI (arXiv 2508.01002)
compare with (they report +20 % and +26 % capacity, and half the median TTFT); `strict`: the slo policy with every ready decode in
every iteration (`--policy-option slack=false`); `slack`: its default, in which streams with looser targets than the tightest may
sit out. With equal targets for all, both plan the same. In the mix, half of the requests are of a class with a looser target.

First table: capacity, the rate at which the targets are just met. Second: TTFT and late tokens at 90 % of sarathi's capacity.

`--live`: the embedded model, with targets of 3 and 10 times its lone decode iteration; half of the requests have a target that is
ten times as loose. `strict` and `slack` serve the same arrivals, in turn.

    python benchmarks/qos_slack.py
    python benchmarks/qos_slack.py --live
"""

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness import machine, parser, show
from ladder import SEED, Server
from ladder import WORKLOAD as LIVE_WORKLOAD
from slo_control import lone_decode

from stallfree.bench.server import server
from stallfree.core.slo import Slo, Target
from stallfree.metrics.capacity import shortfalls
from stallfree.metrics.report import Report, report
from stallfree.metrics.timeline import Timeline
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulate import simulate
from stallfree.sim.simulator import Simulator
from stallfree.workload.workload import Workload

WORKLOAD = Workload.parse("poisson", "openchat", 8192)
BUDGETS = (256, 512, 1024)
CASES: Mapping[str, Mapping[str, Slo]] = {
    "tbt=100ms": {"": Slo.parse("ttft=2s,tbt=100ms")},
    "tpot=50ms": {"": Slo.parse("ttft=2s,tpot=50ms")},
    "tbt=50ms, half 500ms": {"": Slo.parse("ttft=2s,tbt=50ms"), "loose": Slo.parse("ttft=2s,tbt=500ms")},
}
REQUESTS = 800
LIVE: Mapping[int, Sequence[float]] = {3: (0.5, 1.0, 1.5, 2.0), 10: (1.0, 2.0, 3.0, 4.0)}
"""Targets, in lone decode iterations -> requests per second."""


def serve(side: str, classes: Mapping[str, Slo], rate: float, requests: int) -> list[Timeline]:
    policy: dict[str, Any] = {"policy": "slo", "policy_option": ["slack=false"] if side == "strict" else None}
    if side.startswith("sarathi"):
        policy = {"policy": "sarathi", "token_budget": int(side.split()[1])}
    simulator = Simulator(Deployment(model="mistral-7b", hardware="a100-80g", slo=str(classes[""]), **policy))
    rng, names = random.Random(1), list(classes)
    arrivals = [replace(a, service_class=rng.choice(names)) for a in WORKLOAD.draw(rate, 0, requests=requests)]
    on = simulator.instance
    return simulate(arrivals, simulator.policy, on.cost, on.capacity, simulator.limits, front_s=on.front_s, classes=classes).lines


def reports(lines: Sequence[Timeline], classes: Mapping[str, Slo]) -> dict[str, Report]:
    return {name: report([line for line in lines if line.service_class == name], slo) for name, slo in classes.items()}


def met(lines: Sequence[Timeline], classes: Mapping[str, Slo]) -> bool:
    return not any(shortfalls(r, classes[name]) for name, r in reports(lines, classes).items())


def capacity(side: str, classes: Mapping[str, Slo], requests: int) -> float:
    """By bisection, to 2 %."""
    low, high = 0.25, 8.0
    while high / low > 1.02:
        rate = (low * high) ** 0.5
        if met(serve(side, classes, rate, requests), classes):
            low = rate
        else:
            high = rate
    return low


def live(seconds: float) -> list[dict[str, Any]]:
    """A row for each target, rate and side, with both classes. `late`: the share of gaps above the class's target."""
    lone, rows = lone_decode(), []
    print(f"lone decode iteration: {1e3 * lone:.1f} ms", file=sys.stderr)
    for times, rates in LIVE.items():
        tight, loose = (Slo(tbt=Target(round(k * times * lone, 4), 99.0)) for k in (1, 10))
        for rate in rates:
            rng = random.Random(SEED)
            drawn = LIVE_WORKLOAD.draw(rate, SEED, duration_s=seconds)
            arrivals = [replace(a, service_class=rng.choice(("tight", "loose"))) for a in drawn]
            for side, options in {"strict": ["--policy-option", "slack=false"], "slack": []}.items():
                with server(["--slo", f"tight: {tight}; loose: {loose}", *options]) as url:
                    under_load = Server(url, LIVE_WORKLOAD)
                    under_load.warm_up()
                    lines = under_load.run(arrivals).lines
                row: dict[str, Any] = {"target": f"{times}x, {tight}", "requests/s": rate, "side": side}
                for name, found in reports(lines, {"tight": tight, "loose": loose}).items():
                    ttft, tbt, attained = found.ttft_s, found.tbt_s, found.slo_attainment["tbt"].in_time
                    if ttft is None or tbt is None or attained is None:
                        raise RuntimeError(f"{side} answered nothing at {rate}/s")
                    suffix = f", {name}"
                    row |= {f"TTFT p50, s{suffix}": ttft.p50, f"p90{suffix}": ttft.p90, f"TBT p99, ms{suffix}": 1e3 * tbt.p99}
                    row |= {f"late, %{suffix}": 100 * (1 - attained)}
                rows.append(row)
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--live", action="store_true", help="measure the embedded model on this machine instead")
    args = arguments.parse_args()
    if args.live:
        show(
            "The embedded model, half of the requests with a looser target",
            live(10.0 if args.quick else 45.0),
            machine(),
            args.json,
        )
        return
    requests = 150 if args.quick else REQUESTS
    rows, loads = [], []
    for case, classes in CASES.items():
        fixed = {budget: capacity(f"sarathi {budget}", classes, requests) for budget in BUDGETS}
        budget = max(fixed, key=lambda budget: fixed[budget])
        found = {f"sarathi {budget}": fixed[budget]} | {side: capacity(side, classes, requests) for side in ("strict", "slack")}
        rows.append(
            {"targets": case, "budget": str(budget), "sarathi": fixed[budget], "strict": found["strict"], "slack": found["slack"]}
            | {"slack / strict": found["slack"] / found["strict"], "slack / sarathi": found["slack"] / fixed[budget]}
        )
        for side in found:
            lines = serve(side, classes, 0.9 * fixed[budget], requests)
            whole = report(lines)
            late = {
                f"late {name or 'usual'}, %": 100 * (1 - min(a.in_time or 0.0 for k, a in r.slo_attainment.items() if k != "ttft"))
                for name, r in reports(lines, classes).items()
            }
            ttft, tbt = whole.ttft_s, whole.tbt_s
            if ttft is None or tbt is None:
                raise RuntimeError(f"{side} answered nothing")
            loads.append(
                {"targets": case, "side": side, "TTFT p50, s": ttft.p50, "TTFT p90, s": ttft.p90, "TBT p50, ms": 1e3 * tbt.p50}
                | {"TBT p99, ms": 1e3 * tbt.p99, "late usual, %": late["late usual, %"], "late loose, %": late.get("late loose, %")}
            )
    facts = machine()
    show("Capacity, requests/s", rows, facts, args.json)
    show("At 90 % of the capacity of sarathi", loads, facts, None)


if __name__ == "__main__":
    main()
