"""Within a CPU quota: as many threads as whole processors of the quota, the default, against one for each core, the runtime's own.

Run it in a container with less CPU than cores (docker run --cpus 1), or in a control group with cpu.max. Both engines run the same
iterations in turn. In milliseconds: the mean, the median and the 99th percentile; ratios are cores over quota, so above 1 the
default is better.

    python benchmarks/quota.py
"""

import statistics

import numpy as np
from harness import machine, parser, show

from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.engine.calibrate import timed
from stallfree.executors.machine import machine as this_machine
from stallfree.executors.openvino import OpenVINOExecutor

SHAPES = {"1 decode": [(512, 1)], "16 decodes": [(512, 1)] * 16, "16+64": [(512, 1)] * 16 + [(0, 64)]}
"""Iterations: decodes after 512 tokens, and a chunk of 64."""


def main() -> None:
    options = parser(__doc__ or "").parse_args()
    here = this_machine()
    if here.quota is None or here.threads >= here.socket_cores:
        raise SystemExit("no CPU quota below the cores applies to this process; start it in a container with less CPU (--cpus 1)")
    rounds, each = (3, 20) if options.quick else (10, 40)
    checkpoint = open_checkpoint(locate())
    sides = {
        name: OpenVINOExecutor(checkpoint, kv_bytes=256 << 20, threads=threads)
        for name, threads in (("quota", here.threads), ("cores", here.socket_cores))
    }
    rows = []
    for shape_name, shape in SHAPES.items():
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, executor in sides.items():
                times[name] += [1e3 * timed(executor, shape) for _ in range(each)]
        row: dict[str, object] = {"iteration": shape_name}
        figures = {
            name: (statistics.mean(values), statistics.median(values), float(np.percentile(values, 99)))
            for name, values in times.items()
        }
        for at, figure in enumerate(("mean", "p50", "p99")):
            row |= {f"{figure} {name}": figures[name][at] for name in sides}
            row[f"{figure} ratio"] = figures["cores"][at] / figures["quota"][at]
        rows.append(row)
    threads = f"{here.threads} and {here.socket_cores} threads, {here.quota.processors:g} processors by {here.quota.file}"
    show(f"Threads within a quota: {threads}", rows, machine(), options.json)


if __name__ == "__main__":
    main()
