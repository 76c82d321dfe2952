"""How fast is the simulator on one core, for a whole trial: drawing, simulating and the report?

First table: one trial of 2,048 openchat requests at 2 a second, on a machine priced like llama2-7b on an A100-80G with a budget of
512. In leaps the best of several runs should take at most 0.8 s; the other row runs step by step, with the same result.

Second table: the same load on more and more replicas, at most 2,000 requests on each; then on one replica for longer and longer.
Time should grow no faster than the requests; a million of them on 500 replicas should take at most 10 minutes and 4 GB. Nothing of
a request is kept after its end, so memory holds the requests under way, and one number for each iteration.

    python benchmarks/sim_speed.py
"""

import multiprocessing
import resource
import time
from typing import Any

from harness import machine, parser, show

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.slo import Slo
from stallfree.metrics.report import Tally
from stallfree.perf.fitted import Fitted
from stallfree.policies.sarathi import Sarathi
from stallfree.sim.replica import LEAP
from stallfree.sim.simulate import simulate
from stallfree.workload.workload import Workload

COST = Fitted((0.010, 0.0042, 0.0020, 0.0020, 0.0002, 0.0004))
"""Seconds an iteration, for 100 tokens, 10,000 of context, ...: near llama2-7b on an A100-80G; the trial has 27,000 iterations."""
CAPACITY = Capacity(block_size=16, num_blocks=6750, max_model_len=8192)
RATE = 2.0
"""Requests a second for each replica."""
SHARE = 2_000
"""The most requests for each replica."""


def run(requests: int, replicas: int = 1, leap: int = LEAP) -> dict[str, Any]:
    """One row: time and memory of simulating so many requests."""
    begun, worked = time.perf_counter(), time.process_time()
    tally = Tally(Slo.parse("tbt=100ms"))
    arrivals = Workload.parse("poisson", "openchat").stream(RATE * replicas, 0, requests=requests)
    result = simulate(
        arrivals, lambda: Sarathi(512), COST, CAPACITY, Limits(max_seqs=128), replicas=replicas, ended=tally.add, leap=leap
    )
    report = tally.report(RATE * replicas)
    seconds = time.perf_counter() - begun
    return {
        "requests": requests,
        "replicas": replicas,
        "leaps of at most": leap,
        "iterations": result.iterations,
        "tokens": report.output_tokens,
        "seconds": seconds,
        "cpu seconds": time.process_time() - worked,
        "requests/s": requests / seconds,
        "iterations/s": result.iterations / seconds,
        "ms a request": 1e3 * seconds / requests,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def apart(*what: int) -> dict[str, Any]:
    """A run in its own process, so that its memory is measured alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, what)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--most", type=int, help="requests in the largest run", default=None)
    options = arguments.parse_args()
    most = options.most or (10_000 if options.quick else 1_000_000)
    runs = 3 if options.quick else 7
    run(100)  # so that everything is loaded before the measurement
    trial = min((run(2048) for _ in range(runs)), key=lambda row: row["seconds"])
    facts = machine()
    show(f"a trial, best of {runs}; at most 0.8 s are wanted", [trial, run(2048, leap=1)], facts, None)
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= most]
    rows = [apart(size, -(-size // SHARE)) for size in sizes]
    rows += [apart(size, 1) for size in sizes if size <= most // 10]
    show("growth; a million on 500 replicas are to take at most 600 s and 4,000 MB", [trial, *rows], facts, options.json)


if __name__ == "__main__":
    main()
