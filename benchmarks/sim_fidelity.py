"""Is the simulator to be believed? The live server and its simulation, from the server's own calibration, on the same arrivals.

Live HTTP, the embedded model, the slo policy, chats and long prompts as in `slo_control.py`, at 30, 70 and 95 % of the capacity
that a climb finds first: where requests begin to queue, as the share of late tokens is the policy's to keep at any load. For each
load: the machine is calibrated, then the server runs the load twice, then it is simulated. The simulation gets the calibration's
prices and, from the warm-up's record, how long passes between two iterations beside the model; nothing of the run that it is held
against. Both sides are read from records of the same kind.

`again`: the second live run over the first, the machine's own repeatability, against which the error of the simulation is to be
seen; `simulated`: the simulation over the mean of both. Within 10 % is wanted.

    python benchmarks/sim_fidelity.py
"""

import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from harness import machine, parser, show
from ladder import SEED, WORKLOAD, Server, capacity, climb

from stallfree.bench.server import server
from stallfree.checkpoint.fetch import cache_folder
from stallfree.core.record import StepRecord, read
from stallfree.core.slo import Slo, Target
from stallfree.engine.assemble import Options, recalibrate
from stallfree.engine.calibrate import latest
from stallfree.metrics.report import Report, report
from stallfree.metrics.timeline import timelines
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Instance, Simulator

SLO = "tbt=100ms"
QUEUEING = Target(0.1, 90.0)
"""A target that is missed where requests queue, and not by some late tokens more."""
LOADS = (0.3, 0.7, 0.95)
WARM_UP = 6
"""Requests of `Server.warm_up`."""


def live(rate: float, seconds: float) -> tuple[Report, float]:
    """What the server makes of the load, and the time between iterations in the warm-up before it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        with server(["--slo", SLO, "--record", str(file)]) as url:
            side = Server(url)
            side.warm_up()
            side.run(WORKLOAD.draw(rate, SEED, duration_s=seconds))
        _, records = read(file.read_text().splitlines())
    lines = list(timelines(records).values())
    return report(lines[WARM_UP:], Slo.parse(SLO), rate), between(records, lines[WARM_UP].arrival)


def between(records: list[StepRecord], until: float) -> float:
    """Median seconds beside the model in an iteration before `until`: planning it, and what comes after the one before it."""
    early = [r for r in records if r.t_end < until]
    return median((b.t_start - a.t_end) for a, b in pairwise(early) if a.num_running)


def simulated(rate: float, seconds: float, between_s: float) -> Report:
    cost, name, held = latest(cache_folder() / "calibration")
    placed = Instance(cost, held, None, name, between_s)
    simulator = Simulator(Deployment(hardware="this-cpu", policy="slo", slo=SLO), placed)
    return report(simulator.run(WORKLOAD.draw(rate, SEED, duration_s=seconds)).lines, Slo.parse(SLO), rate)


def rows(rate: float, share: float, runs: list[Report], made: Report) -> list[dict[str, Any]]:
    found = []
    for what in ("ttft_s", "tbt_s"):
        for quantile in ("p50", "p99"):
            first, second, ours = (1e3 * getattr(getattr(r, what), quantile) for r in (*runs, made))
            found.append(
                {
                    "of capacity": share,
                    "requests/s": rate,
                    "what": f"{what[:4].rstrip('_').upper()} {quantile}",
                    "live, ms": first,
                    "again": second / first,
                    "simulated, ms": ours,
                    "simulated / live": ours / ((first + second) / 2),
                }
            )
    return found


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    seconds, climbing = (10.0, 8.0) if args.quick else (120.0, 20.0)
    options = Options(policy="slo", slo=SLO)
    with server(["--slo", SLO]) as url:
        side = Server(url)
        side.warm_up()
        most = 3.0 if args.quick else capacity(climb(side, 2.5, climbing, [QUEUEING]), QUEUEING)
    print(f"capacity {most:.2f} requests/s")
    table = []
    for share in LOADS:
        rate = share * most
        recalibrate(options, lambda line: None, lambda done, of: None)
        runs, gaps = zip(*(live(rate, seconds) for _ in range(2)), strict=True)
        table += rows(rate, share, list(runs), simulated(rate, seconds, gaps[0]))
    show("Live and simulated", table, facts, args.json)
    errors = sorted(abs(row["simulated / live"] - 1) for row in table)
    print(f"simulated over live: median error {errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}; 10 % wanted")


if __name__ == "__main__":
    main()
