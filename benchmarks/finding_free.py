"""Where does the stall-free guarantee stop being free? Simulated: Llama-3-8B on an A100 and an H100.

`whole prompts` is the capacity with prefills first and no TBT target: every prompt stalls every stream, so the machine serves the
most it can. The other columns are the slo policy's share of that, under targets of 1.2 to 20 times a decode iteration (eight
decodes with 512 tokens of context each). Below 1, the guarantee costs throughput.

    python benchmarks/finding_free.py --plot docs/images/finding_free.png
"""

from itertools import product
from pathlib import Path
from typing import Any

from finding_budget import MIXES
from harness import machine, parser, show

from stallfree.core.slo import Slo, Target
from stallfree.metrics import plot
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Simulator
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic

DEVICES = ("a100-80g", "h100")
TIMES = (1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
DECODES = [(512, 1)] * 8


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the share over the target")
    args = arguments.parse_args()
    devices, requests = (DEVICES[:1], 100) if args.quick else (DEVICES, 800)
    simulators: dict[str, Simulator] = {}
    cases = {}
    targets: dict[tuple[str, float], Target] = {}
    for device, mix in product(devices, MIXES):
        traffic = Traffic("poisson", MIXES[mix], 8192, requests=requests)
        whole = Simulator(Deployment(model="llama3-8b", hardware=device, policy="prefill-first"))
        decodes = whole.instance.cost.seconds(DECODES)
        simulators[f"{device} {mix} whole"] = whole
        cases[f"{device} {mix} whole"] = traffic, Slo(), 8.0
        for times in TIMES:
            target = targets[device, times] = Target(round(times * decodes, 4), 99.0)
            name = f"{device} {mix} {times}"
            simulators[name] = Simulator(Deployment(model="llama3-8b", hardware=device, policy="slo", slo=f"tbt={target}"))
            cases[name] = traffic, Slo(tbt=target), 8.0
    with Trials(simulators) as trials:
        capacities = {name: capacity.rate for name, capacity in trials.capacities(cases, lowest=0.05).items()}
    rows: list[dict[str, Any]] = []
    for device, mix in product(devices, MIXES):
        most = capacities[f"{device} {mix} whole"]
        rows.append(
            {"device": device, "mix": mix, "whole prompts, requests/s": most}
            | {f"{times:g}x": capacities[f"{device} {mix} {times}"] / most for times in TIMES}
        )
    if args.plot:
        sides = {f"{row['device']}, {row['mix']}": [(times, row[f"{times:g}x"]) for times in TIMES] for row in rows}
        title, up = "Llama-3-8B", "capacity over that without a target"
        plot.lines(sides, "TBT target, in decode iterations", up, title, args.plot, log="x", even=1.0)
    show("Capacity of the slo policy by its target, over prefills first without one", rows, machine(), args.json)


if __name__ == "__main__":
    main()
