"""When is slack worth spending? Simulated: the slo policy as it is, which lets an iteration be shorter than the target allows where
more time would hardly speed prompts up (`policies/slo.py`, WORTH), against the same policy that always spends all of it.

Rates are shares of what the deployment serves; chats of which 5 % have long prompts. `longest`: of all gaps between tokens.
`cpu` has prices like those of the embedded model on two Zen 4 cores (docs/performance.md): 8.5 ms an iteration, 0.5 ms a token.

    python benchmarks/slack_worth.py [--hardware h100 a100-80g cpu]
"""

from typing import Any

from harness import machine, parser, show

from stallfree.core.plan import Capacity
from stallfree.metrics.report import Report, report
from stallfree.perf.fitted import Fitted
from stallfree.policies import slo
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulate import simulate
from stallfree.sim.simulator import Instance, Simulator
from stallfree.workload.workload import Workload

LONG = "median=1000,p90=3000/median=100,p90=250 + 5%:7000/100"
CASES: dict[str, tuple[str | None, str, str, tuple[float, ...]]] = {  # model, target, lengths, requests/s
    "h100": ("llama3-8b", "tbt=37ms", LONG, (4, 8, 16, 20)),
    "a100-80g": ("mistral-7b", "tbt=60ms", LONG, (2, 4, 8, 10)),
    "cpu": (None, "tbt=250ms", "median=150,p90=500/median=50,p90=120 + 5%:2000/50", (0.3, 0.6, 1.2, 2, 3)),
}
CPU = Instance(
    Fitted([0.0085, 0.050, 0.009, 0.010, 0.012, 0.008]), Capacity(32, 4000, 8192), None, "cpu", scatter=(0.97, 1.0, 1.03, 1.1)
)
SIDES = {"all of it": 1.0, "what is worth it": slo.WORTH}


def serve(hardware: str, rate: float, requests: int) -> Report:
    model, target, lengths, _ = CASES[hardware]
    deployment = Deployment(model=model, hardware=hardware, slo=target, policy="slo")
    simulator = Simulator(deployment, CPU if model is None else None)
    arrivals = Workload.parse("poisson", lengths, 8000).draw(rate, 3, requests=requests)
    on = simulator.instance
    scatter = on.scatter
    return report(
        simulate(arrivals, simulator.policy, on.cost, on.capacity, simulator.limits, front_s=on.front_s, scatter=scatter).lines
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--hardware", nargs="+", choices=CASES, default=list(CASES))
    args = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for hardware in args.hardware:
        for rate in CASES[hardware][3]:
            for side, worth in SIDES.items():
                slo.WORTH = worth
                found = serve(hardware, rate, 200 if args.quick else 1500)
                ttft, tbt = found.ttft_s, found.tbt_s
                if ttft is None or tbt is None:
                    raise RuntimeError(f"{hardware} at {rate}/s answered nothing")
                rows.append(
                    {"on": hardware, "target": CASES[hardware][1], "requests/s": rate, "spends": side}
                    | {"TTFT p50, s": round(ttft.p50, 3), "p90": round(ttft.p90, 3), "p99": round(ttft.p99, 2)}
                    | {"TBT p50, ms": round(1e3 * tbt.p50, 1), "p99 ": round(1e3 * tbt.p99, 1), "longest": round(1e3 * tbt.max)}
                )
    show("Slack, all of it and what is worth it", rows, machine(), args.json)


if __name__ == "__main__":
    main()
