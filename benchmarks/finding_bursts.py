"""What do bursts and heavy tails do to TTFT under a fixed budget and under the slo policy? Simulated: Llama-3-8B on an A100, the
same mean load throughout, P99 TBT to be within 50 ms.

The load is 60 % of the steady traffic that a budget of 512 can serve. Arrivals are Poisson, gamma with CV 4, or bursts of 10 s
every minute. Prompts have the same mean: all equal, log-normal, or one in twenty ten times as long. Outputs are all equal.

    python benchmarks/finding_bursts.py --plot docs/images/finding_bursts.png
"""

from itertools import product
from pathlib import Path
from typing import Any

from harness import machine, parser, show

from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Simulator
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic

ARRIVALS = {"steady": "poisson", "gamma, CV 4": "gamma:cv=4", "bursts": "bursts:on=10s,off=50s"}
LENGTHS = {"alike": "650/150", "log-normal": "median=380,p90=1500/150", "heavy tail": "450/150 + 5%:4500/150"}
"""Mean prompts of about 650 tokens."""
BUDGETS = (256, 512, 2048)
SLO = "tbt=50ms"
SHARE = 0.6


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw TTFT P99 for each kind of traffic")
    args = arguments.parse_args()
    requests = 300 if args.quick else 4000
    base = {"model": "llama3-8b", "hardware": "a100-80g", "slo": SLO}
    simulators = {f"sarathi {budget}": Simulator(Deployment(**base, policy="sarathi", token_budget=budget)) for budget in BUDGETS}
    simulators["slo"] = Simulator(Deployment(**base, policy="slo"))
    targets = Slo.parse(SLO)
    with Trials(simulators) as trials:
        steady = Traffic("poisson", LENGTHS["alike"], 8192, requests=min(requests, 1000))
        rate = SHARE * trials.capacities({"sarathi 512": (steady, targets, 8.0)})["sarathi 512"].rate
        cases = {
            (arrivals, lengths, name): (
                name,
                Traffic(ARRIVALS[arrivals], LENGTHS[lengths], 8192, requests=requests),
                rate,
                0,
                targets,
            )
            for arrivals, lengths, name in product(ARRIVALS, LENGTHS, simulators)
        }
        reports = trials.reports(cases)
    rows: list[dict[str, Any]] = [
        {"arrivals": arrivals, "prompts": lengths, "policy": name}
        | {"TTFT p50, s": report.ttft_s.p50, "TTFT p90, s": report.ttft_s.p90, "TTFT p99, s": report.ttft_s.p99}
        | {"TBT p99, ms": 1e3 * report.tbt_s.p99, "late, %": 100 * (1 - report.slo_attainment["tbt"].in_time)}
        for (arrivals, lengths, name), report in reports.items()
    ]
    if args.plot:
        kinds = list(product(ARRIVALS, LENGTHS))
        sides = {name: [(", ".join(kind), reports[*kind, name].ttft_s.p99) for kind in kinds] for name in simulators}
        plot.dots(sides, "TTFT P99, s", f"Llama-3-8B on an A100, {rate:.2f} requests per second", args.plot, log=True)
    show(f"{rate:.2f} requests/s", rows, machine(), args.json)


if __name__ == "__main__":
    main()
