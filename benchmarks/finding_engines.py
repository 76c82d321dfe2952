"""How much of what is claimed for disaggregation is disaggregation, and how much is the engine?

DistServe (OSDI'24) compared its own engine in two pools with vLLM co-located. Here each engine, as DistServe's authors fitted it,
serves both ways on the same GPUs:

    claimed gain = two pools with its engine / co-located with vLLM's
                 = (two pools / co-located, both with its engine) x (its engine / vLLM's, both co-located)

Here "co-located" means prompts first, as vLLM was then; next to it, the best of `slo`, `sarathi` and prompts first. Simulated:
OPT-13B on 4 A100 80 GB, chats of at most 2,048 tokens. The fitted times have no iterations of prompts and decodes together; for
`slo` and `sarathi` they come from `perf/profiled.py`.

    python benchmarks/finding_engines.py FOLDER --plot docs/images/finding_engines.png

FOLDER holds distserve_profiler-a100-80g.{distserve,vllm}.json (LLMServe/DistServe, simdistserve).
"""

from pathlib import Path
from typing import Any

from harness import machine, parser, show

from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.planner.candidates import Candidates
from stallfree.planner.search import Answer, search
from stallfree.planner.site import Site
from stallfree.sim.simulator import Simulator
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic

CHATS = "median=300,p90=900/median=180,p90=400"
TARGETS = {"urgent": "ttft=200ms@p90,tpot=100ms@p90", "looser": "ttft=1s@p90,tpot=100ms@p90"}


def capacities(site: Site, traffic: Traffic, slo: Slo) -> tuple[float, float, float, Answer]:
    """Requests per second of all GPUs: two pools, the best co-located, and co-located with prompts first."""
    candidates = Candidates(site)
    answer = search(candidates, traffic, slo, Trials, lambda line: None)
    split, alone = (next((unit.rate for unit in answer.whole if (" -> " in unit.name) is kind), 0.0) for kind in (True, False))
    first = {
        str(shape): Simulator(candidates.replica(shape, "prefill-first", replicas=site.gpus // shape.size, router="shortest-queue"))
        for shape in candidates.shapes
        if shape.sp == 1
    }
    with Trials(first) as trials:
        rates = trials.capacities({name: (traffic, slo, max(alone, 1.0)) for name in first}, lowest=0.01, shortest_s=30.0)
    return split, alone, max(capacity.rate for capacity in rates.values()), answer


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path, help="where the fitted engines are")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the factors")
    args = arguments.parse_args()
    traffic = Traffic(lengths=CHATS, max_total=2048, requests=128)
    rows: list[dict[str, Any]] = []
    for name, words in list(TARGETS.items())[: 1 if args.quick else None]:
        slo = Slo.parse(words)
        rates = {}
        for engine in ("distserve", "vllm"):
            file = args.folder / f"distserve_profiler-a100-80g.{engine}.json"
            rates[engine] = capacities(Site("opt-13b", gpus=4, engine=str(file)), traffic, slo)
        (pools, own, first_own, answer), (pools_vllm, best_vllm, first_vllm, _) = rates["distserve"], rates["vllm"]
        # The search compares single units, which cannot share a burst; with prompts first, all splits were run on all GPUs.
        own, best_vllm = max(own, first_own), max(best_vllm, first_vllm)
        split = next((unit.name for unit in answer.whole if " -> " in unit.name), "none")
        rows.append(
            {
                "targets": name, "two pools": split, "its engine, pools": pools, "its engine, prompts first": first_own,
                "its engine, best co-located": own, "vLLM's, pools": pools_vllm, "vLLM's, prompts first": first_vllm,
                "vLLM's, best co-located": best_vllm,
                "claimed": pools / first_vllm, "by disaggregation": pools / first_own, "by the engine": first_own / first_vllm,
                "over the best co-located": pools / own,
            }
        )  # fmt: skip
    if args.plot:
        factors = ("claimed", "by disaggregation", "by the engine", "over the best co-located")
        sides = {str(row["targets"]): [(factor, row[factor]) for factor in factors] for row in rows}
        plot.dots(sides, "factor", "Two pools with DistServe's engine over vLLM co-located, and its parts", args.plot, even=1.0)
    for row in rows:
        for key, value in row.items():
            print(f"{key:28} {value:.3g}" if isinstance(value, float) else f"{key:28} {value}")
    show("Engine and disaggregation", [{k: row[k] for k in list(row)[:1] + list(row)[-4:]} for row in rows], machine(), args.json)


if __name__ == "__main__":
    main()
