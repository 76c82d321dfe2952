"""S-LoRA's own results (arXiv 2311.03285), simulated: Llama-7B on one A100 80 GB, 10 requests/s, and up to 2,000 adapters.

    published   requests/s with 0 to 2,000 adapters beside the paper's, and its peer with packed weights
    policies    the same load with this project's engine and policies, and a load that is too much for it
    ablation    without unified paging, and with padded products, as ratios of all that S-LoRA does

Requests arrive for 300 s, gamma with a CV of 1. Prompts and answers have 8 to 512 tokens, uniform. The k-th most popular adapter
has a share that falls as 1 / k. Adapters of rank 8 change the four matrices of attention. The engine is `lightllm-2023`: its time
to launch a layer was fitted to 9.64 requests/s without adapters, and its time to launch an adapter's kernel to 8.05 with five. The
rest is predicted.

The paper's load of the ablation is not known here. So `ablation` has a load that saturates, and only ratios can be compared.

    python benchmarks/slora.py published policies ablation
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from harness import machine, parser, show

from stallfree.core.adapters import Adapters
from stallfree.core.kv import BlockPool
from stallfree.core.plan import Capacity, Shape
from stallfree.core.policy import CostModel
from stallfree.core.scheduler import Scheduler
from stallfree.metrics.timeline import Timeline
from stallfree.perf.roofline import Roofline
from stallfree.perf.shape import Sharded
from stallfree.perf.shape import load as load_model
from stallfree.sim.cluster import serve
from stallfree.sim.deployment import Deployment
from stallfree.sim.replica import Replica
from stallfree.sim.routers import round_robin
from stallfree.sim.shelf import Shelf
from stallfree.sim.simulate import holding, scripted
from stallfree.sim.simulator import Simulator, instance
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival

PUBLISHED = {0: 9.64, 5: 8.05, 100: 7.99, 1000: 7.64, 2000: 7.61}
"""Requests/s by the number of adapters. Those with 0 and 5 were fitted."""
FITTED = (0, 5)
PACKED = 2.04
"""Requests/s of their peer with five adapters: vLLM, a process for each model with merged weights."""
ABLATION = {"unified paging": 4.06, "a fixed share": 2.64, "padded products": 0.17}
"""Requests/s, at a load of theirs that is not known here."""
LOAD = Traffic(arrivals="gamma:cv=1", lengths="uniform=8..512/uniform=8..512", rate=10.0, duration=300.0)
THEIRS = Deployment(
    model="llama2-7b", hardware="a100-80g", engine="lightllm-2023", policy="prefill-first", max_model_len=1024, rank="8"
)
FIRST_TOKEN_S = 6.0
"""S-LoRA's target for a first token (section 7.1)."""
TARGETS = "ttft=6s@p90,tbt=200ms@p99"
"""Of policy slo. The paper has no target for later tokens; 200 ms allow decodes of 200 requests with lightllm-2023."""
TOO_MUCH = 24.0
"""Requests/s that are more than vllm-2026 serves here."""
SHARES = (0.05, 0.2, 0.5)
"""Of the KV memory, fixed beforehand for adapters."""
ABLATED = replace(THEIRS, rank="8,16,32,64")
ABLATED_LOAD = replace(LOAD, adapters=200, rate=20.0, duration=120.0)
OF_HOST = ("host", "waiting for launches")
"""Operators of the cost model that take no time of the device."""
COPIES = 3.0
"""Each row's weights are read, written in another place, and read there."""


def outcome(lines: Sequence[Timeline]) -> dict[str, Any]:
    """Requests/s until the last token, and the share of all requests whose first token came within the paper's target."""
    served = [line for line in lines if line.tokens]
    early = sum(line.tokens[0] - line.arrival <= FIRST_TOKEN_S for line in served)
    return {
        "requests/s": len(served) / max(line.tokens[-1] for line in served),
        "first token in 6 s": early / len(lines),
        "refused": len(lines) - len(served),
    }


def simulated(deployment: Deployment, traffic: Traffic) -> dict[str, Any]:
    lines: list[Timeline] = []
    Simulator(deployment).run(traffic.stream(), ended=lines.append)
    return outcome(lines)


def published(quick: bool) -> list[dict[str, Any]]:
    load = replace(LOAD, duration=60.0) if quick else LOAD
    rows = []
    for number, rate in PUBLISHED.items():
        result = simulated(THEIRS, replace(load, adapters=number or None))
        rows.append({"adapters": number, "paper": rate, "fitted": "yes" if number in FITTED else "no"} | result)
    rows.append({"adapters": "5, packed", "paper": PACKED, "fitted": "no"} | packed(load, 5))
    return [row | {"error": row["requests/s"] / row["paper"] - 1} for row in rows]


@dataclass(frozen=True)
class Crowd:
    """A device that `number` processes share evenly. The host's work of one overlaps kernels of the others, so an iteration takes
    as long as by itself, or as all their kernels together if that is more.
    """

    cost: Roofline
    number: int

    def seconds(self, shape: Shape) -> float:
        kernels = sum([op.count * op.cost.seconds for op in self.cost.operators(shape) if op.name not in OF_HOST])
        return max(self.cost.seconds(shape), self.number * kernels)


def packed(traffic: Traffic, number: int) -> dict[str, Any]:
    """Each model, merged with one adapter, in a process of its own on the same device. Assumed: all are busy, which a load that
    saturates them sees to, and each gets an even part of the device's time. Memory for KV is split by the models' popularity.
    """
    deployment = replace(THEIRS, engine="vllm-2023", policy="vllm-v1", rank=None)
    sharded = Sharded(load_model("llama2-7b"), 1, 1)
    own = instance(deployment)
    assert isinstance(own.cost, Roofline)
    tokens = own.capacity.num_blocks * own.capacity.block_size - (number - 1) * sharded.weight_bytes / sharded.kv_bytes_per_token
    arrivals = list(replace(traffic, adapters=number).stream())
    lines: list[Timeline] = []
    for adapter in sorted({arrival.adapter for arrival in arrivals}):
        asked = [replace(arrival, adapter="") for arrival in arrivals if arrival.adapter == adapter]
        # A process has at least room for the longest request.
        blocks = max(1024 // 16, int(tokens * len(asked) / len(arrivals) / 16))
        placed = own._replace(cost=Crowd(own.cost, number), capacity=Capacity(16, blocks, 1024))
        Simulator(deployment, placed).run(asked, ended=lines.append)
    return outcome(lines)


def policies(quick: bool) -> list[dict[str, Any]]:
    """By rate: S-LoRA's deployment with early abort or without, and this project's engine with several policies."""
    ours = replace(THEIRS, engine="vllm-2026")
    cases = {
        "lightllm-2023 prefill-first": THEIRS,
        "lightllm-2023 slo": replace(THEIRS, policy="slo", slo=TARGETS),
        "lightllm-2023 slo, refuses": replace(THEIRS, policy="slo", slo=TARGETS, on_late="refuse"),
        "lightllm-2023 sarathi:512": replace(THEIRS, policy="sarathi", token_budget=512),
        "lightllm-2023 adapter-clusters": replace(THEIRS, policy="adapter-clusters"),
        "vllm-2026 prefill-first": ours,
        "vllm-2026 slo": replace(ours, policy="slo", slo=TARGETS),
        "vllm-2026 slo, refuses": replace(ours, policy="slo", slo=TARGETS, on_late="refuse"),
        "vllm-2026 sarathi:512": replace(ours, policy="sarathi", token_budget=512),
        "vllm-2026 adapter-clusters": replace(ours, policy="adapter-clusters"),
    }
    same = replace(LOAD, adapters=1000, duration=30.0 if quick else LOAD.duration)
    more = replace(same, rate=TOO_MUCH, duration=30.0 if quick else 120.0)
    rows = [{"arrive/s": same.rate, "engine and policy": name} | simulated(each, same) for name, each in cases.items()]
    many = {name: each for name, each in cases.items() if each.engine == ours.engine}
    return rows + [{"arrive/s": more.rate, "engine and policy": name} | simulated(each, more) for name, each in many.items()]


def served(scheduler: Scheduler, cost: CostModel, shelf: Shelf, arrivals: Iterable[Arrival]) -> dict[str, Any]:
    lines: list[Timeline] = []
    replica = Replica(
        holding(scheduler, shelf), cost, ended=lambda request: lines.append(request.sampling.line), load_s=shelf.load_s
    )
    serve(scripted(arrivals, scheduler, None, shelves=(shelf,)), [replica], round_robin())
    return outcome(lines)


@dataclass(frozen=True)
class Padded:
    """Products that are batched by padding: prompts to the longest of the iteration, and each row of it gets its own copy of its
    adapter's weights, padded to `rank`.
    """

    cost: Roofline
    rank: int

    def seconds(self, shape: Shape) -> float:
        work = [piece for piece in shape if piece[1] > 0]
        rows = len(work) * max(count for _, count in work)
        return self.cost.seconds([(int(COPIES * self.rank * rows), -1), *work])


def ablation(quick: bool) -> list[dict[str, Any]]:
    """A fixed share keeps adapters in a pool of their own, and KV in the rest. S-LoRA's variant also loses memory to fragments,
    which is not modelled."""
    simulator = Simulator(ABLATED)
    place, blocks = simulator.instance, simulator.instance.capacity.num_blocks
    assert place.shelf is not None
    assert isinstance(place.cost, Roofline)
    arrivals = list(replace(ABLATED_LOAD, duration=20.0 if quick else ABLATED_LOAD.duration).stream())
    results = {"unified paging": served(Scheduler(simulator.policy(), place.capacity), place.cost, place.shelf, arrivals)}
    for share in SHARES:
        held = int(share * blocks)
        scheduler = Scheduler(simulator.policy(), replace(place.capacity, num_blocks=blocks - held))
        ledger = scheduler.ledger
        ledger.pool.lender = None
        ledger.adapters = Adapters(BlockPool(held, place.capacity.block_size), ledger.queue, ledger.expected)
        results[f"a fixed share, {share:.0%}"] = served(scheduler, place.cost, place.shelf, arrivals)
    padded = Padded(place.cost, 64)
    results["padded products"] = served(Scheduler(simulator.policy(), place.capacity), padded, place.shelf, arrivals)
    whole = results["unified paging"]["requests/s"]
    return [
        {"variant": name} | result | {"of unified": result["requests/s"] / whole, "paper's": _paper(name)}
        for name, result in results.items()
    ]


def _paper(variant: str) -> float:
    return ABLATION[variant.split(",")[0]] / ABLATION["unified paging"]


PARTS = {"published": published, "policies": policies, "ablation": ablation}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=PARTS, nargs="+", help="what to simulate")
    args = arguments.parse_args()
    facts = machine()
    for part in args.part:
        show(f"S-LoRA: {part}", PARTS[part](args.quick), facts, args.json)


if __name__ == "__main__":
    main()
