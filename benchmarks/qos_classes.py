"""How much load do three service levels bear on one machine? Simulated: Llama-3-8B on an A100, lengths as in Azure's code trace of
2023, a third of the requests each with TTFT within 6 s and TBT within 50 ms, the whole answer within 600 s, and within 1,800 s.

First table: the highest rate at which at most 1 % of the requests miss a target, over an hour. QoServe (ASPLOS'26) reports 2.75
requests/s for the earliest deadline first (EDF), and 3.3 to 3.65 for its own parts: 1.2 to 1.33 times EDF. Second table: the load
changes every 15 minutes between 55 % and 137 % of the capacity of slo, for four hours; a fifth of the requests has low priority. At
these shares of its own capacity QoServe reports 81.9 % (FCFS), 84.1 % (EDF) and 8.64 % violations, 0 % of the important. The
modelled machine is about twice as fast as theirs, so the rates are not to be compared, but what one policy does to another is.

`fcfs` and `edf` have a token budget of 256, the largest of 128, 256, 512 with which TBT is kept.

    python benchmarks/qos_classes.py
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness import machine, parser, show

from stallfree.core.policy import Policy
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.metrics.report import report
from stallfree.metrics.timeline import Timeline
from stallfree.policies.sarathi import Sarathi
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulate import simulate
from stallfree.sim.simulator import Simulator
from stallfree.workload.workload import Arrival, Workload

CLASSES = {name: Slo.parse(words) for name, words in (("q1", "ttft=6s,tbt=50ms"), ("q2", "ttlt=600s"), ("q3", "ttlt=1800s"))}
LENGTHS = "median=1454,p90=5152/median=13,p90=54"
"""Azure/AzurePublicDataset, AzureLLMInferenceTrace_code.csv, first half."""
WORKLOAD = Workload.parse("poisson", LENGTHS, 8192)
ALLOWED = 0.01
PHASE_S = 900.0


class Edf(Sarathi):
    """The earliest deadline of a whole request, or of its first token, first."""

    def key(self, request: Request) -> tuple[float]:
        targets = request.slo or Slo()
        target = targets.ttft or targets.ttlt
        return (request.arrival + (target.seconds if target else 0.0),)


def arrivals(rate: float, seconds: float, seed: int, low: float = 0.0) -> list[Arrival]:
    rng = random.Random(seed)
    drawn = WORKLOAD.draw(rate, seed, duration_s=seconds)
    return [replace(a, service_class=rng.choice(list(CLASSES)), priority=int(rng.random() < low)) for a in drawn]


def violations(lines: Sequence[Timeline]) -> float:
    """The share of requests that miss a target of their class."""
    missed = 0.0
    for name, targets in CLASSES.items():
        own = [line for line in lines if line.service_class == name]
        if own and (good := report(own, targets).goodput) is not None:
            missed += len(own) * (1 - good.share)
    return missed / len(lines) if lines else 0.0


def main() -> None:
    args = parser(__doc__).parse_args()
    simulator = Simulator(Deployment(model="llama3-8b", hardware="a100-80g", slo=str(CLASSES["q1"])))
    policies: Mapping[str, Callable[[], Policy]] = {"fcfs": lambda: Sarathi(256), "edf": lambda: Edf(256), "slo": simulator.policy}
    machine_ = simulator.instance

    def serve(policy: str, requests: Sequence[Arrival]) -> list[Timeline]:
        made = policies[policy]
        return simulate(
            requests, made, machine_.cost, machine_.capacity, simulator.limits, front_s=machine_.front_s, classes=CLASSES
        ).lines

    seconds, step = (600.0, 1.0) if args.quick else (3600.0, 0.25)
    rates: dict[str, float] = {}
    for policy in policies:
        rate = 4.0
        while violations(serve(policy, arrivals(rate + step, seconds, 0))) <= ALLOWED:
            rate += step
        while rate > step and violations(serve(policy, arrivals(rate, seconds, 0))) > ALLOWED:
            rate -= step
        rates[policy] = rate
    capacity = [{"policy": p, "requests/s": rate, "over edf": rate / rates["edf"]} for p, rate in rates.items()]

    phases = 2 if args.quick else 16
    load: list[Arrival] = []
    for phase in range(phases):
        rate = (1.37 if phase % 2 else 0.55) * rates["slo"]
        load += [replace(a, at=a.at + phase * PHASE_S) for a in arrivals(rate, PHASE_S, phase, low=0.2)]
    changing: list[dict[str, Any]] = []
    for policy in policies:
        lines = serve(policy, load)
        groups = {"all": lines, "important": [x for x in lines if not x.priority], "low priority": [x for x in lines if x.priority]}
        groups |= {name: [line for line in lines if line.service_class == name] for name in CLASSES}
        changing.append({"policy": policy} | {f"{name}, %": 100 * violations(group) for name, group in groups.items()})
    facts = machine()
    show("Highest rate with at most 1 % violations", capacity, facts, args.json)
    show("Violations under a changing load", changing, facts, None)


if __name__ == "__main__":
    main()
