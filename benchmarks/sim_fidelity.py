"""Is the simulator accurate? The live server and its simulation, from the server's own calibration, on the same arrivals.

Live HTTP, the embedded model, the slo policy, chats and long prompts as in `slo_control.py`, at 30, 70 and 95 % of the simulated
capacity by the calibration, at which requests begin to queue. For each load: the machine is calibrated, the server runs the load
twice, and the machine is calibrated again, to see whether it changed. The simulation gets the prices of the first calibration, and
from the warm-up's record the time between two iterations outside the model. It gets nothing from the runs that it is compared with.
Both sides are read from records of the same kind.

`again`: the second live run over the first, the machine's own repeatability. `simulated`: over the mean of both; within 10 % is
wanted. `at its speed`: the first run simulated at the speed that the machine had at each moment (`sim/replay.py`). Its error is
the simulator's; the rest of the error comes from a machine that changed after its calibration.

    python benchmarks/sim_fidelity.py
"""

import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from harness import machine, parser, show
from ladder import SEED, WORKLOAD, Server

from stallfree.bench.server import server
from stallfree.checkpoint.fetch import cache_folder
from stallfree.core.record import Run, StepRecord, read
from stallfree.core.slo import Slo
from stallfree.engine.assemble import Options, recalibrate
from stallfree.engine.calibrate import latest
from stallfree.metrics.capacity import search, shortfalls
from stallfree.metrics.report import Report, report
from stallfree.metrics.timeline import Timeline, timelines
from stallfree.sim.deployment import Deployment
from stallfree.sim.replay import Machine, what_if
from stallfree.sim.simulator import Instance, Simulator

SLO = "tbt=100ms"
TARGETS = Slo.parse(SLO)
LOADS = (0.3, 0.7, 0.95)
REFERENCE = [(500, 1)] * 12 + [(0, 64)]
"""The iteration by which two calibrations are compared."""


class Live(NamedTuple):
    """The server's record of a load of `number` requests, and the seconds between iterations in the warm-up before."""

    run: Run
    records: list[StepRecord]
    number: int
    between_s: float

    @property
    def report(self) -> Report:
        return report(load_of(self.records, self.number), TARGETS)

    @property
    def at_its_speed(self) -> Report:
        replayed = what_if(self.run, self.records, Machine(self.records), self.run.policy, TARGETS, {})
        return report(load_of(replayed, self.number), TARGETS)


def load_of(records: list[StepRecord], number: int) -> list[Timeline]:
    """The last `number` requests that arrived. Those before were the client's probes and the warm-up."""
    return sorted(timelines(records).values(), key=lambda line: line.arrival)[-number:]


def live(rate: float, seconds: float) -> Live:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        with server(["--slo", SLO, "--record", str(file)]) as url:
            side = Server(url)
            side.warm_up()
            coming = WORKLOAD.draw(rate, SEED, duration_s=seconds)
            side.run(coming)
        run, records = read(file.read_text().splitlines())
    began = load_of(records, len(coming))[0].arrival
    return Live(run, records, len(coming), between([r for r in records if r.t_end < began]))


def between(records: list[StepRecord]) -> float:
    """Median seconds of an iteration outside the model: planning it, and the work after the iteration before."""
    return median((b.t_start - a.t_end) for a, b in pairwise(records) if a.num_running)


def calibrated(between_s: float = 0.0) -> Simulator:
    """A simulator of this machine, calibrated now."""
    recalibrate(Options(policy="slo", slo=SLO), lambda line: None, lambda done, of: None)
    cost, name, held, scatter = latest(cache_folder() / "calibration")
    return Simulator(Deployment(hardware="this-cpu", policy="slo", slo=SLO), Instance(cost, held, None, name, between_s, scatter))


def simulated(simulator: Simulator, rate: float, seconds: float) -> Report:
    return report(simulator.run(WORKLOAD.draw(rate, SEED, duration_s=seconds)).lines, TARGETS, rate)


def rows(rate: float, share: float, runs: list[Live], simulation: Report) -> list[dict[str, Any]]:
    table = []
    replayed = runs[0].at_its_speed
    for what in ("ttft_s", "tbt_s"):
        for quantile in ("p50", "p99"):
            reports = (runs[0].report, runs[1].report, simulation, replayed)
            first, second, simulated_ms, then = (1e3 * getattr(getattr(r, what), quantile) for r in reports)
            table.append(
                {
                    "of capacity": share,
                    "requests/s": rate,
                    "what": f"{what[:4].rstrip('_').upper()} {quantile}",
                    "live, ms": first,
                    "again": second / first,
                    "simulated, ms": simulated_ms,
                    "simulated / live": simulated_ms / ((first + second) / 2),
                    "at its speed / live": then / first,
                }
            )
    return table


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    seconds = 10.0 if args.quick else 60.0
    table = []
    for share in LOADS:
        before = calibrated()
        capacity = search(lambda rate, _, s=before: not shortfalls(simulated(s, rate, 60.0), Slo()), 2.0, most_trials=1)
        rate = share * capacity.rate
        runs = [live(rate, seconds) for _ in range(2)]
        drift = calibrated().instance.cost.seconds(REFERENCE) / before.instance.cost.seconds(REFERENCE)
        print(f"{share:.0%} of {capacity.rate:.2f}/s: an iteration costs {drift:.2f} times as much after as before", flush=True)
        placed = before.instance._replace(between_s=runs[0].between_s)
        table += rows(rate, share, runs, simulated(Simulator(before.deployment, placed), rate, seconds))
    show("Live and simulated", table, facts, args.json)
    for column in ("again", "simulated / live", "at its speed / live"):
        errors = sorted(abs(row[column] - 1) for row in table)
        print(f"{column}: median error {errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}; 10 % wanted")


if __name__ == "__main__":
    main()
