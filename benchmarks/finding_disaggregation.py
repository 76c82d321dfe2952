"""Which wins at equal GPUs, chunked co-location or two pools, and what does it depend on? Simulated, A100 80 GB.

    lengths   Llama-2-13B on 8 GPUs: prompt x output length x targets
    links     the link between the pools, which every KV transfer crosses
    bursts    Llama-2-13B on 8 GPUs: how arrivals come
    models    Llama-3-8B to Llama-2-70B on 16 GPUs
    outputs   from which output length on a KV transfer no longer matters
    rule      a closed form next to the simulation, on the cells of `lengths`

A capacity is the highest rate at which every target is met. "Co-located" is the best of `slo` and `sarathi` over all splits of
the model. "Two pools" is the best of DistServe's way, Splitwise's and the hybrid over all splits and ratios (`stallfree plan`).

    python benchmarks/finding_disaggregation.py lengths --plots docs/images
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from harness import machine, parser, show

from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.perf import links, shape
from stallfree.planner.candidates import Candidates, Shape
from stallfree.planner.search import Answer, search
from stallfree.planner.site import Site
from stallfree.sim.simulator import Instance, Simulator
from stallfree.sim.split import SplitSimulator
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival

PROMPTS, OUTPUTS = (256, 2048), (32, 128, 512)
TARGETS = {"tight": "ttft=500ms@p90,tbt=40ms@p99", "middle": "ttft=1s@p90,tbt=75ms@p99", "loose": "ttft=4s@p90,tbt=200ms@p99"}
GRID = ("tight", "loose")
LINKS = ("nvlink", "ib-400g", "ib-200g", "eth-100g", "eth-25g", "eth-10g")
"""Links between the pools. The first joins the devices of one node, which then holds both pools."""
ARRIVALS = ("poisson", "gamma:cv=2", "gamma:cv=4", "bursts:on=10s,off=50s")
MODELS = ("llama3-8b", "llama2-13b", "yi-34b", "llama2-70b")
THIRTEEN = Site("llama2-13b", gpus=8, nodes=2)


def lengths_of(prompt: int, output: int) -> str:
    """Log-normal, P90 twice the median."""
    return f"median={prompt},p90={2 * prompt}/median={output},p90={2 * output}"


def best(answer: Answer) -> dict[str, Any]:
    """One row: the best of each kind, in requests per second of all GPUs."""
    split, alone = (next((unit for unit in answer.whole if (" -> " in unit.name) is kind), None) for kind in (True, False))
    row: dict[str, Any] = {
        "co-located": alone.title if alone is not None else "none",
        "requests/s": alone.rate if alone is not None else 0.0,
        "two pools": split.name if split is not None else "none",
        "requests/s ": split.rate if split is not None else 0.0,
    }
    row |= {"pools / co-located": row["requests/s "] / row["requests/s"] if row["requests/s"] else inf}
    if alone is None or split is None:
        return row
    ratios = sorted(pools / other if other else inf for pools, other in zip(split.draws, alone.draws, strict=True))
    return row | {"over the draws": f"{ratios[0]:.3g} to {ratios[-1]:.3g}"}


def searched(site: Site, traffic: Traffic, slo: str) -> Answer | None:
    try:
        return search(Candidates(site), traffic, Slo.parse(slo), Trials, print)
    except ValueError as error:
        print(f"{site.model}, {traffic.lengths}, {slo}: {error}")
        return None


def lengths(quick: bool) -> list[dict[str, Any]]:
    rows = []
    cells = list(product([(name, TARGETS[name]) for name in GRID], PROMPTS, OUTPUTS))
    for (name, slo), prompt, output in cells[:1] if quick else cells:
        answer = searched(THIRTEEN, Traffic(lengths=lengths_of(prompt, output), max_total=4096, requests=128), slo)
        if answer is not None:
            rows.append({"targets": name, "prompt": prompt, "output": output} | best(answer))
    return rows


def bursts(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for arrivals in ARRIVALS[:1] if quick else ARRIVALS:
        traffic = Traffic(arrivals, lengths_of(1024, 128), 4096, requests=128)
        answer = searched(THIRTEEN, traffic, TARGETS["loose"])
        if answer is not None:
            rows.append({"arrivals": arrivals} | best(answer))
    return rows


def models(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for model in MODELS[:1] if quick else MODELS:
        site = Site(model, gpus=16, nodes=4, max_model_len=4096)
        answer = searched(site, Traffic(lengths=lengths_of(1024, 128), max_total=4096, requests=128), TARGETS["middle"])
        if answer is not None:
            rows.append({"model": model} | best(answer))
    return rows


def across(quick: bool) -> list[dict[str, Any]]:
    """Each pool on its own node of four GPUs, with one replica that fills it; or both pools in one node of eight."""
    traffic, slo = Traffic(lengths=lengths_of(1024, 128), max_total=4096, requests=128), Slo.parse(TARGETS["middle"])
    simulators: dict[str, Any] = {}
    for model in MODELS[1:2] if quick else MODELS:
        site = Site(model, gpus=8, nodes=2, max_model_len=4096)
        candidates = Candidates(site)
        replica = candidates.replica(Shape(4), "slo", slo=str(slo), replicas=2, router="shortest-queue")
        simulators[f"{model} co-located"] = Simulator(replica)
        together = Candidates(replace(site, nodes=1))
        for way in ("distserve", "splitwise"):
            apart = candidates.split(way, Shape(4), Shape(4), (1, 1), whole=True)
            near = {"nvlink": together.split(way, Shape(4), Shape(4), (1, 1))}
            for link, pair in (near | {link: replace(apart, link=link) for link in LINKS[1:]}).items():
                simulators[f"{model} {way} {link}"] = SplitSimulator(pair)
    with Trials(simulators) as trials:
        capacities = trials.capacities(dict.fromkeys(simulators, (traffic, slo, 4.0)), lowest=0.01, shortest_s=30.0)
    rows = []
    for model in dict.fromkeys(name.split()[0] for name in simulators):
        alone = capacities[f"{model} co-located"].rate
        kv = shape.Sharded(shape.load(model), 1, 1).kv_bytes_per_token
        for way in ("distserve", "splitwise"):
            rows.append(
                {"model": model, "KV, MB a token": kv / 1e6, "way": way, "co-located, requests/s": alone}
                | {link: capacities[f"{model} {way} {link}"].rate / alone for link in LINKS}
            )
    return rows


def outputs(quick: bool) -> list[dict[str, Any]]:
    """A lone request, with prefill and decode on separate nodes: after how many output tokens is the delay of the KV transfer 1 %
    of the time since the first token? `closed form`: the time to send the KV that remains, over 1 % of a decode iteration.
    """
    rows = []
    for model, prompt, link, way in product(
        ("llama3-8b", "llama2-13b", "llama2-70b"), (1024, 3072), ("ib-200g", "eth-25g"), ("distserve", "splitwise")
    ):
        candidates = Candidates(Site(model, gpus=8, nodes=2, max_model_len=4096))
        pair = candidates.split(way, Shape(4), Shape(4), (1, 1), whole=True)
        simulator = SplitSimulator(replace(pair, link=link))
        result = simulator.run([Arrival(0.0, prompt, 3)])
        (line,) = result.lines
        decode = line.tokens[2] - line.tokens[1]
        sharded, network = shape.Sharded(shape.load(model), 1, 1), links.load(link)
        whole = prompt * sharded.kv_bytes_per_token / network.bandwidth
        prefill = line.tokens[0] - result.transfers.exposed_s - simulator.prefill.instance.front_s
        layers = sharded.model.num_layers
        # Sent layer by layer: the last layer's KV remains, or what the link could not send while the others were computed.
        left = whole if way == "distserve" else max(whole / layers, whole - prefill * (1 - 1 / layers))
        rows.append(
            {
                "model": model, "prompt": prompt, "link": link, "way": way, "delay, ms": 1e3 * result.transfers.exposed_s,
                "decode iteration, ms": 1e3 * decode, "tokens until 1 %": result.transfers.exposed_s / decode / 0.01,
                "closed form": (left + network.latency_s) / decode / 0.01,
            }
        )  # fmt: skip
    return rows[:2] if quick else rows


def alone_rate(instance: Instance, prompt: float, output: float, target: float) -> float:
    """Requests per second of a co-located replica. In each iteration as many requests enter as leave, so c prompt tokens go with
    c x output / prompt decodes. Bisection gives the largest c that takes at most `target` seconds and whose KV fits.
    """
    held = instance.capacity.num_blocks * instance.capacity.block_size

    def iteration(chunk: int) -> tuple[int, float]:
        decodes = round(chunk * output / prompt)
        work = [(int(prompt + output / 2), 1)] * decodes + [(int(prompt / 2), chunk)]
        return decodes, instance.cost.seconds(work)

    low, high = 0, 16384
    while high - low > 1:
        chunk = (low + high) // 2
        decodes, seconds = iteration(chunk)
        fits = seconds <= target and decodes <= 256 and decodes * (prompt + output / 2) < held
        low, high = (chunk, high) if fits else (low, chunk)
    return low / prompt / iteration(low)[1] if low else 0.0


def pool_rates(instance: Instance, prompt: float, output: float, target: float) -> tuple[float, float]:
    """Requests per second of a replica of each pool: prompts alone, and the most decodes that the target and KV allow."""
    held = instance.capacity.num_blocks * instance.capacity.block_size
    most = max(1, min(256, int(held / (prompt + output))))
    while most > 1 and instance.cost.seconds([(int(prompt + output / 2), 1)] * most) > target:
        most -= 1
    decodes = instance.cost.seconds([(int(prompt + output / 2), 1)] * most)
    return 1 / instance.cost.seconds([(0, int(prompt))]), (most / output / decodes if decodes <= target else 0.0)


def closed_form(site: Site, prompt: float, output: float, target: float) -> float:
    """The ratio of two pools to co-located, each with its best TP and its best numbers of replicas. It knows no pipelines."""
    candidates = Candidates(site)
    alone, pools = 0.0, 0.0
    rates = {}
    for (tp, pp, sp), instance in candidates.shapes.items():
        if pp == sp == 1:
            alone = max(alone, site.gpus // tp * alone_rate(instance, prompt, output, target))
            rates[tp] = pool_rates(instance, prompt, output, target)
    for (a, (prefill, _)), (b, (_, decode)) in product(rates.items(), rates.items()):
        for number in range(1, site.gpus // a):
            pools = max(pools, min(number * prefill, (site.gpus - number * a) // b * decode))
    return pools / alone if alone else inf


def rule(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The closed form next to each simulated cell. The mean of a log-normal here is 1.16 of its median."""
    table = []
    for row in rows:
        target = Slo.parse(TARGETS[row["targets"]]).tbt
        assert target is not None
        predicted = closed_form(THIRTEEN, 1.16 * row["prompt"], 1.16 * row["output"], target.seconds)
        simulated = row["pools / co-located"]
        table.append(
            {key: row[key] for key in ("targets", "prompt", "output")}
            | {"closed form": predicted, "simulated": simulated}
            | {"same winner": "yes" if (predicted > 1) == (simulated > 1) else "no"}
        )
    return table


PARTS = {"lengths": lengths, "links": across, "bursts": bursts, "models": models, "outputs": outputs}


def draw(part: str, rows: list[dict[str, Any]], file: Path) -> None:
    ratio, title = "two pools / co-located", "Llama-2-13B, 8 A100"
    ratios = [row.get("pools / co-located", 0.0) for row in rows]
    if part == "lengths":
        over: dict[str, list[tuple[float, float]]] = {}
        for row, value in zip(rows, ratios, strict=True):
            over.setdefault(f"{row['targets']}, prompt {row['prompt']}", []).append((row["output"], value))
        plot.lines(over, "output tokens", ratio, title, file, log="x", even=1.0)
        return
    sides: dict[str, list[tuple[str, float]]] = {}
    if part == "links":
        for row, link in product(rows, LINKS):
            sides.setdefault(row["way"], []).append((f"{row['model']}, {link}", row[link]))
        plot.dots(sides, ratio, "TP4 to TP4", file, even=1.0)
    elif part == "outputs":
        for row in rows:
            name = f"{row['way']}, prompt {row['prompt']}"
            sides.setdefault(name, []).append((f"{row['model']}, {row['link']}", row["tokens until 1 %"]))
        plot.dots(sides, "output tokens until the delay is 1 %", "KV transfer between nodes", file, log=True)
    elif part == "rule":
        names = [f"{row['targets']} {row['prompt']}/{row['output']}" for row in rows]
        sides = {what: list(zip(names, (row[what] for row in rows), strict=True)) for what in ("closed form", "simulated")}
        plot.dots(sides, f"{ratio}; rows: targets, prompt/output tokens", title, file, even=1.0)
    else:
        what, title = {"bursts": ("arrivals", title), "models": ("model", "16 A100")}[part]
        plot.dots({ratio: list(zip((row[what] for row in rows), ratios, strict=True))}, ratio, title, file, even=1.0)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=[*PARTS, "rule"], nargs="+", help="what to look at")
    arguments.add_argument("--plots", type=Path, metavar="FOLDER", help="draw each part into this folder")
    args = arguments.parse_args()
    facts = machine()
    cells: list[dict[str, Any]] | None = None
    for part in args.part:
        if part == "rule":
            cells = cells or lengths(args.quick)
        rows = rule(cells or []) if part == "rule" else PARTS[part](args.quick)
        cells = rows if part == "lengths" else cells
        show(f"Co-located or two pools: {part}", rows, facts, args.json)
        if args.plots:
            draw(part, rows, args.plots / f"finding_disaggregation_{part}.png")


if __name__ == "__main__":
    main()
