"""Which token budget is best? Simulated: Llama-3-8B on four GPUs, three precisions, three mixes of lengths, P99 TBT within 50 ms.

For each case: the capacity under every fixed budget, and under the slo policy, which knows only the target. `best` is the budget
with the highest capacity. `kept by 512` is the share of that capacity that a budget of 512 reaches.

    python benchmarks/finding_budget.py --plot docs/images/finding_budget.png
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

DEVICES = ("a100-80g", "h100", "h200", "b200")
PRECISIONS = {"fp16": "fp16", "fp8": "fp8", "int4": "fp8"}
"""Of weights and of the KV cache."""
MIXES = {
    "chat": "median=250,p90=800/median=200,p90=500",
    "openchat": "openchat",
    "long prompts": "median=4000,p90=6500/median=150,p90=300",
}
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)
SLO = "tbt=50ms"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw capacity over the budget")
    args = arguments.parse_args()
    devices, requests = (DEVICES[:1], 100) if args.quick else (DEVICES, 400)
    simulators: dict[str, Simulator] = {}
    cases = {}
    for device, weights, mix in product(devices, PRECISIONS, MIXES):
        base = {"model": "llama3-8b", "hardware": device, "weights": weights, "kv": PRECISIONS[weights], "slo": SLO}
        traffic = Traffic("poisson", MIXES[mix], 8192, requests=requests)
        for budget in (*BUDGETS, None):
            policy = {"policy": "slo"} if budget is None else {"policy": "sarathi", "token_budget": budget}
            name = f"{device} {weights} {mix} {budget}"
            simulators[name] = Simulator(Deployment(**base, **policy))
            cases[name] = traffic, Slo.parse(SLO), 8.0
    with Trials(simulators) as trials:
        capacities = {name: capacity.rate for name, capacity in trials.capacities(cases, lowest=0.05).items()}
    rows: list[dict[str, Any]] = []
    for device, weights, mix in product(devices, PRECISIONS, MIXES):
        rates = {budget: capacities[f"{device} {weights} {mix} {budget}"] for budget in BUDGETS}
        best = max(rates, key=lambda budget: rates[budget])
        slo = capacities[f"{device} {weights} {mix} None"]
        rows.append(
            {"device": device, "weights": weights, "mix": mix}
            | {str(budget): rate for budget, rate in rates.items()}
            | {"slo": slo, "best": str(best), "slo / best": slo / rates[best] if rates[best] else None}
            | {"kept by 512": rates[512] / rates[best] if rates[best] else None}
        )
    if args.plot:
        sides = {
            f"{row['device']}, {row['weights']}": [(float(budget), row[str(budget)]) for budget in BUDGETS]
            for row in rows
            if row["mix"] == "openchat" and row["weights"] in ("fp16", "fp8")
        }
        title = "Llama-3-8B, openchat, P99 TBT within 50 ms"
        plot.lines(sides, "token budget", "capacity, requests per second", title, args.plot, log="x")
    show("Capacity by token budget, requests/s", rows, machine(), args.json)


if __name__ == "__main__":
    main()
