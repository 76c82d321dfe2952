"""How fast the simulator is, on one core, all that a trial takes included: drawing, simulating and the report.

First table: one trial of 2,048 openchat requests at 2 a second, on a machine priced like llama2-7b on an A100-80G with a budget of
512: in leaps, the best of several runs, which is to take 0.8 s at the most; and step by step, to the same end.

Second table: the same load on ever more replicas, 2,000 requests on each at the most; then on one replica for ever longer. Time is
to grow with the requests and no faster; a million of them on 500 replicas are to take 10 minutes and 4 GB at the most. Nothing of a
request is kept once it has ended, so the memory is that of those under way, and of one number for each iteration.

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
"""Requests for each replica, at the most."""


def run(requests: int, replicas: int = 1, leap: int = LEAP) -> dict[str, Any]:
    """One row: what simulating so many requests took."""
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
    """A run in a process of its own, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, what)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--most", type=int, help="requests in the largest run", default=None)
    options = arguments.parse_args()
    most = options.most or (10_000 if options.quick else 1_000_000)
    runs = 3 if options.quick else 7
    run(100)  # what is loaded once is loaded now
    trial = min((run(2048) for _ in range(runs)), key=lambda row: row["seconds"])
    facts = machine()
    show(f"a trial, best of {runs}; at most 0.8 s are wanted", [trial, run(2048, leap=1)], facts, None)
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= most]
    rows = [apart(size, -(-size // SHARE)) for size in sizes]
    rows += [apart(size, 1) for size in sizes if size <= most // 10]
    show("growth; a million on 500 replicas are to take at most 600 s and 4,000 MB", [trial, *rows], facts, options.json)


if __name__ == "__main__":
    main()
