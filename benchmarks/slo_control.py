"""Does the SLO policy keep its promise, use its slack, and serve as much as the best fixed budget? And what if the machine slows?

Live HTTP, the embedded model, an open-loop client on the same machine. Chats (prompts of 150 tokens at the median, 500 at P90;
outputs of 50 and 120), of which 5 % are long prompts of 2,000 tokens, arrive as a Poisson process. Targets: 1.5, 3 and 10
times the lone decode iteration, measured first: the median gap of a single stream. For each target, and each fixed budget,
the rate climbs until targets are missed; a fixed budget's runs are judged by all three targets, and all sides see the same
arrivals.

`late`: share of all gaps above the target, of 1 % allowed. `late alone`: the same of requests that are sent one after another, a
minute before: less no policy can reach. Capacity is interpolated between the last rate that passes and the next (see
`ladder.py`). `--disturb`: at a third of the capacity for the second and the third target, another process takes one core for 30
s; counted are iterations from its beginning, and from its end, until the share of late tokens over the next 200 is back within
the percentile. And a server that is stopped four times for half a second while a stream runs and short prompts come: how long a
prompt of 200 tokens waits for its first token after that, under the default target and under a fixed budget. `--against POLICY`:
instead of fixed budgets another policy that takes targets, such as an earlier version in a file, climbs in turn with this one.

    python benchmarks/slo_control.py --plot docs/images/slo_control.png
    python benchmarks/slo_control.py --disturb
    python benchmarks/slo_control.py --against ./earlier.py:Slo
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, parser, show
from ladder import SEED, WORKLOAD, Rung, Server, capacity, climb, rung

from stallfree.bench.server import server
from stallfree.core.record import StepRecord, read
from stallfree.core.slo import Slo, Target
from stallfree.metrics import plot
from stallfree.metrics.stalls import StallAccount
from stallfree.workload.workload import Arrival, Workload

TIMES = (1.5, 3.0, 10.0)
BUDGETS = (16, 32, 64, 96, 128, 512, 2048)
USUAL = (128, 512, 2048)
ALONE = 40
"""Requests that are sent one after another."""
LOOK_BACK = 200
CORE_TAKEN_S = 30.0
STOPS, STOPPED_S = 4, 0.5
PROMPT_AFTER_S = 5.0
"""Seconds within which a prompt of 200 tokens has its first token after the stops."""
DISTURBED_RATES = (0.5, 1.5)
"""Requests per second for the second and the third target: a third of what was found to be their capacity."""


def lone_decode() -> float:
    """Median seconds between the tokens of a stream that has the server to itself."""
    with server(["--policy", "sarathi"]) as url:
        alone = Server(url)
        lone = Workload.parse("poisson", "200/200").draw(1, 0, requests=1)
        alone.run(lone)
        (line,) = alone.run(lone).lines
    return float(np.median(line.gaps))


def late_alone(target: Target) -> float:
    """Share of late gaps of the same requests sent one after another, so that none has another beside it."""
    with server(["--policy", "sarathi", "--token-budget", "512"]) as url:
        side = Server(url)
        side.warm_up()
        one_by_one = [replace(arrival, at=0.0) for arrival in WORKLOAD.draw(1.0, SEED, requests=ALONE)]
        lines = [line for arrival in one_by_one for line in side.run([arrival]).lines]
    return rung(lines, 0.0, [target]).late[target.seconds]


def climbed(options: list[str], first: float, seconds: float, targets: list[Target]) -> list[Rung]:
    with server(options) as url:
        side = Server(url)
        side.warm_up()
        return climb(side, first, seconds, targets)


def sweep(
    targets: list[Target], seconds: float, budgets: tuple[int, ...], file: Path | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each of the policy's runs, and one for each side's capacity."""
    runs: dict[str, list[Rung]] = {}
    least: dict[Target, float] = {}
    for number, target in enumerate(targets):
        least[target] = late_alone(target)
        print(f"slo {target}; of requests that are alone, {least[target]:.2%} of the gaps are late")
        runs[f"slo {target}"] = climbed(["--slo", f"tbt={target}"], (0.3, 0.5, 1.0)[number], seconds, [target])
    for budget in budgets:
        print(f"fixed {budget}")
        name = f"sarathi {budget}"
        runs[name] = climbed(["--policy", "sarathi", "--token-budget", str(budget)], 0.3 if budget < 128 else 0.5, seconds, targets)
    loads = []
    for target in targets:
        own = runs[f"slo {target}"]
        most = capacity(own, target)
        loads += [
            {
                "target, ms": target.seconds * 1e3,
                "requests/s": r.rate,
                "of capacity": r.rate / most if most else None,
                "late alone, %": 100 * least[target],
                "late, %": 100 * r.late[target.seconds],
                "TBT p99, ms": r.tbt_p99 * 1e3,
                "TTFT p50, s": r.ttft_p50,
                "TTFT p90, s": r.ttft_p90,
                "output tokens/s": r.output_tokens_per_s,
            }
            for r in own
        ]
    found = []
    for target in targets:
        fixed = {budget: capacity(runs[f"sarathi {budget}"], target) for budget in budgets}
        ours, best = capacity(runs[f"slo {target}"], target), max(fixed, key=lambda b: fixed[b])
        worst = min(fixed[b] for b in USUAL if b in fixed)
        found.append(
            {"target, ms": target.seconds * 1e3, "slo": ours}
            | {str(budget): rate for budget, rate in fixed.items()}
            | {
                "best": str(best),
                "slo / best": ours / fixed[best] if fixed[best] else None,
                "slo / worst usual": ours / worst if worst else None,
            }
        )
    if file is not None:
        plot.late_shares(
            {
                f"{target.seconds * 1e3:.0f} ms": {
                    name: [(r.rate, r.late[target.seconds]) for r in rungs]
                    for name, rungs in runs.items()
                    if target.seconds in rungs[0].late
                }
                for target in targets
            },
            file,
        )
    return loads, found


def against(policy: str, targets: list[Target], seconds: float) -> list[dict[str, Any]]:
    """A row for each target and each of both policies, with the capacity and the largest share of late tokens below it."""
    rows = []
    for number, target in enumerate(targets):
        for name, options in {"slo": [], policy: ["--policy", policy]}.items():
            print(f"{name}, {target}")
            rungs = climbed(["--slo", f"tbt={target}", *options], (1.0, 3.0)[number], seconds, [target])
            most = capacity(rungs, target)
            within = [r for r in rungs if r.rate <= most] or rungs[:1]
            rows.append(
                {
                    "target, ms": target.seconds * 1e3,
                    "policy": name,
                    "capacity, requests/s": most,
                    "late below it, %": 100 * max(r.late[target.seconds] for r in within),
                    "TTFT p50 at its end, s": within[-1].ttft_p50,
                }
            )
    return rows


def busy() -> None:
    os.sched_setaffinity(0, {0})
    until = time.monotonic() + CORE_TAKEN_S
    while time.monotonic() < until:
        pass


def disturb(target: Target, rate: float) -> list[dict[str, Any]]:
    """A run of 90 s, with a core taken from the 30th second to the 60th."""
    moments: list[float] = []

    def later() -> None:
        time.sleep(30)
        moments.append(time.perf_counter())
        process = multiprocessing.get_context("spawn").Process(target=busy)
        process.start()
        process.join()
        moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        with server(["--slo", f"tbt={target}", "--record", str(file)]) as url:
            side = Server(url)
            side.warm_up()
            thread = threading.Thread(target=later)
            thread.start()
            side.run(WORKLOAD.draw(rate, SEED, duration_s=90))
            thread.join()
        _, records = read(file.read_text().splitlines())
    return [recovery(records, target, *phase) for phase in zip(("one core taken", "and given back"), moments, strict=True)]


def stops(name: str, options: list[str]) -> dict[str, Any]:
    """A stream of 400 tokens runs and a prompt of 100 comes every 0.4 s while the server is stopped; then one of 200 comes."""
    gap = 2 * STOPPED_S
    first = 2.0
    last = first + STOPS * gap
    stream = Arrival(0.0, 100, 1200)
    short = [Arrival(0.4 * i, 100, 5) for i in range(1, int(last / 0.4))]
    prompt = Arrival(last, 200, 5)

    def pause(process: int) -> None:
        time.sleep(first)
        for _ in range(STOPS):
            os.kill(process, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(process, signal.SIGCONT)
            time.sleep(gap - STOPPED_S)

    with server(options) as url:
        side = Server(url)
        side.warm_up()
        (process,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        thread = threading.Thread(target=pause, args=[int(process)])
        thread.start()
        lines = side.run([stream, *short, prompt]).lines
        thread.join()
    ttft = max(lines, key=lambda line: line.arrival).ttft
    return {"policy": name, "stops of 0.5 s": STOPS, "TTFT of 200 tokens after them, s": ttft, "limit, s": PROMPT_AFTER_S}


def recovery(records: list[StepRecord], target: Target, phase: str, moment: float) -> dict[str, Any]:
    account = StallAccount(Slo(tbt=target))
    late, tokens, first = [], [], None
    for number, r in enumerate(records):
        late.append(sum(s.kind == "late" for s in account.record(r)))
        tokens.append(len(account.gaps))
        if first is None and r.t_plan >= moment:
            first = number
    if first is None:
        raise RuntimeError(f"nothing ran after {phase}")

    def share(begin: int) -> float:
        end = begin + LOOK_BACK
        return sum(late[begin:end]) / max(1, sum(tokens[begin:end]))

    back = next((k for k in range(len(records) - first) if share(first + k) <= target.late_share), None)
    return {
        "target, ms": target.seconds * 1e3,
        "phase": phase,
        "late in the 200 before, %": 100 * share(max(0, first - LOOK_BACK)),
        "late in the 200 after, %": 100 * share(first),
        "late in the 200 behind them, %": 100 * share(first + LOOK_BACK),
        "iterations until back": back,
        "limit": LOOK_BACK,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--disturb", action="store_true", help="take a core away for 30 s instead")
    arguments.add_argument("--against", metavar="POLICY", help="climb in turn with this policy instead, as ./file.py:Class")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the share of late tokens over the rate")
    args = arguments.parse_args()
    if args.plot:
        plot.require()
    facts = machine()
    lone = lone_decode()
    print(f"lone decode iteration: {lone * 1e3:.1f} ms")
    targets = [Target(round(times * lone, 4), 99.0) for times in TIMES]
    if args.disturb:
        sides = {"slo, the default target": [], "sarathi 64": ["--policy", "sarathi", "--token-budget", "64"]}
        show("A server stopped", [stops(name, options) for name, options in sides.items()], facts, None)
        if not args.quick:
            rows = [row for target, rate in zip(targets[1:], DISTURBED_RATES, strict=True) for row in disturb(target, rate)]
            show("One core taken for 30 s", rows, facts, args.json)
        return
    if args.against:
        rows = against(args.against, targets[1:], 8.0 if args.quick else 30.0)
        show("Beside another policy", rows, facts, args.json)
        return
    seconds, budgets = (8.0, (128,)) if args.quick else (30.0, BUDGETS)
    loads, found = sweep(targets, seconds, budgets, args.plot)
    show("The slo policy from low load to saturation", loads, facts, None)
    show("Capacity, requests/s", found, facts, args.json)


if __name__ == "__main__":
    main()
