"""Groups of instances that form anew for every iteration, against groups that stay: which serves more, over mixes of lengths?

Simulated: Llama-2-7B on the eight A800 of a node, engine `graph`. Capacity is the highest rate at which 90 % of the requests end
within 25 times the time that they take alone on all devices, as LoongServe counts it (arXiv 2404.09526); and the highest at which
90 % of each quarter by length do and the queue drains at the end, because a machine that computes long ones last may be far above
what it can sustain. One draw of each rate. The sides:

    loongserve      four instances of TP2; its four steps, with whole prompts
    stall-free      the same instances; chunks beside decodes, iterations with decodes within 100 ms
    SP4 TP2         one ring of all, whole prompts first
    4 x TP2         four groups apart, with one queue, whole prompts first
    TP8             one group, whole prompts first
    TP8 chunks      one group, chunks of 2,048 beside decodes (sarathi:2048)
    TP8 slo         one group, policy slo with tbt=100ms

    python benchmarks/finding_elastic.py --plot docs/images/finding_elastic.png
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, parser, show

from stallfree.elastic.fixed import Fixed
from stallfree.elastic.loongserve import LoongServe
from stallfree.elastic.stall_free import StallFree
from stallfree.metrics import plot
from stallfree.metrics.capacity import search
from stallfree.metrics.timeline import Timeline
from stallfree.sim.deployment import Deployment
from stallfree.sim.elastic import Rings, serve
from stallfree.sim.simulator import Simulator
from stallfree.workload.traffic import Traffic

LOADS = {
    "zipf 1.0": ("zipf=4..200000,s=1.0/uniform=16..256", 1.122, 0.481),
    "zipf 1.2": ("zipf=4..200000,s=1.2/uniform=16..256", 2.925, 1.478),
    "zipf 1.4": ("zipf=4..200000,s=1.4/uniform=16..256", 8.757, 5.723),
    "chats": ("median=240,p90=1100/median=200,p90=500", 29.47, 23.13),
    "mixed": (
        "median=240,p90=1100/median=200,p90=500 + 33.3%:zipf=2700..210500,s=1/uniform=16..128 "
        "+ 33.3%:zipf=15100..497300,s=1/uniform=16..128",
        0.553,
        0.208,
    ),
}
"""The lengths of prompts and outputs; LoongServe's goodput and that of the best other system, published for its own lengths."""
MODEL, HARDWARE, ENGINE, TBT_S = "llama2-7b", "a800", "graph", 0.1
ENGINES = (ENGINE, "vllm-2023", "eager-2024")
SINGLE = {"TP8": ("vLLM", 6.35), "TP8 chunks": ("SplitFuse", 23.13)}
"""The sides that are most like two systems, and their published goodput on ShareGPT, requests/s."""
LONGEST = 498_000
SCALE, SHARE = 25.0, 0.9
QUARTERS = 4
DRAIN = 0.5
"""After the last arrival everything must have ended in this share of the time of the arrivals."""
LASTING_S = 60.0
"""Requests arrive for at least so many seconds, so that a queue shows."""
SIDES = ("loongserve", "stall-free", "SP4 TP2", "4 x TP2", "TP8", "TP8 chunks", "TP8 slo")
TRIALS = 1
SHORT = 2000
"""A prompt with fewer tokens is short."""


@cache
def rings(tp: int, sp: int, engine: str = ENGINE) -> Rings:
    return Rings(Deployment(MODEL, HARDWARE, tp, sp=sp, engine=engine))


@cache
def alone(prompt: int, output: int) -> float:
    """Seconds of a request alone on all devices, by the quicker of TP8 and a ring of four."""
    ways = ((rings(8, 1), 1), (rings(2, 4), 4))
    return min(r.seconds(degree, [(0, prompt)]) + output * r.seconds(degree, [(prompt + output // 2, 1)]) for r, degree in ways)


def run(side: str, lengths: str, rate: float, seed: int, requests: int, engine: str = ENGINE) -> list[Timeline]:
    """The timelines under a load. Raises ValueError if a request does not fit."""
    arrivals = Traffic("poisson", lengths, LONGEST, requests=requests).lasting(LASTING_S, rate).stream(rate, seed)
    if side in ("TP8 chunks", "TP8 slo"):
        policy = {"policy": "sarathi", "token_budget": 2048} if side == "TP8 chunks" else {"policy": "slo", "slo": f"tbt={TBT_S}s"}
        return Simulator(Deployment(MODEL, HARDWARE, 8, engine=engine, max_model_len=LONGEST, **policy)).run(arrivals).lines
    place = rings(8, 1, engine) if side == "TP8" else rings(2, 4, engine)
    make: dict[str, Callable[[], Any]] = {
        "loongserve": lambda: LoongServe(place, 4),
        "stall-free": lambda: StallFree(place, 4, TBT_S, lambda s: SCALE * alone(s.length, 0)),
        "SP4 TP2": lambda: Fixed(place, [range(4)]),
        "4 x TP2": lambda: Fixed(place, [[number] for number in range(4)]),
        "TP8": lambda: Fixed(place, [[0]]),
    }
    return serve(arrivals, place, [make[side]()]).lines


def within(lines: Sequence[Timeline], parts: int = 1) -> float:
    """The share of requests that ended within `SCALE` times their time alone; with several `parts` of as many requests each by the
    length of the prompt, the least share of a part."""
    ordered = sorted(lines, key=lambda line: line.prompt_tokens)
    met = [line.tokens[-1] - line.arrival <= SCALE * alone(line.prompt_tokens, len(line.tokens)) for line in ordered]
    return min(float(np.mean(part)) for part in np.array_split(met, parts))


def drained(lines: Sequence[Timeline]) -> bool:
    """Whether all ended soon enough after the last arrival: a queue has not grown all the time."""
    last = max(line.arrival for line in lines)
    return max(line.tokens[-1] for line in lines) - last <= DRAIN * last


def capacity(load: str, side: str, requests: int, parts: int, engine: str = ENGINE) -> dict[str, Any]:
    lengths, published, _ = LOADS[load]
    if side == "4 x TP2" and load == "mixed":  # an instance holds 269,206 tokens
        return {"load": load, "side": side, "requests/s": None}

    def passes(rate: float, seed: int) -> bool:
        lines = run(side, lengths, rate, seed, requests, engine)
        return within(lines, parts) >= SHARE and (parts == 1 or drained(lines))

    found = search(passes, published, tolerance=0.05, most_trials=TRIALS)
    return {"load": load, "side": side, "requests/s": found.rate}


def ratios(load: str, rates: Mapping[tuple[str, str], float | None]) -> dict[str, Any]:
    """The elastic sides over the best of the others: of those with whole prompts on the same rings, and of all."""
    _, ours, theirs = LOADS[load]
    loongserve, stall_free, *others = [rates[load, side] or 0.0 for side in SIDES]
    return {
        "load": load, "published": ours / theirs, "loongserve / SP4 TP2 or TP8": loongserve / max(others[0], others[2]),
        "loongserve / best whole": loongserve / max(others[:3]), "loongserve / best": loongserve / max(others),
        "stall-free / best": stall_free / max(others),
    }  # fmt: skip


def systems(requests: int, pool: ProcessPoolExecutor) -> list[dict[str, Any]]:
    """LoongServe's factor over single systems, on chats: with the engine of this finding on both sides, and with older ones on the
    other side."""
    ours = pool.submit(capacity, "chats", "loongserve", requests, 1)
    cases = {(side, engine): pool.submit(capacity, "chats", side, requests, 1, engine) for side in SINGLE for engine in ENGINES}
    return [
        {"system": f"{system} ({side})", "published": LOADS["chats"][1] / published}
        | {engine: ours.result()["requests/s"] / cases[side, engine].result()["requests/s"] for engine in ENGINES}
        for side, (system, published) in SINGLE.items()
    ]


def beside(load: str, side: str, rate: float, requests: int) -> dict[str, Any]:
    """What long prompts do to short ones, and to decodes, at one rate for all sides."""
    lines = run(side, LOADS[load][0], rate, 1, requests)
    short = [line.ttft or 0.0 for line in lines if line.prompt_tokens < SHORT]
    longer = [(line.ttft or 0.0) / alone(line.prompt_tokens, 0) for line in lines if line.prompt_tokens >= SHORT]
    gaps = np.concatenate([np.diff(line.tokens) for line in lines])
    first, last = np.quantile(short, [0.5, 0.9]) if short else (np.nan, np.nan)
    return {
        "load": load, "side": side, "requests/s": rate, "short prompts: TTFT median, ms": 1e3 * first, "P90, ms": 1e3 * last,
        "long: TTFT / alone, median": float(np.median(longer)) if longer else np.nan,
        "TBT median, ms": 1e3 * float(np.median(gaps)), "P99, ms": 1e3 * float(np.quantile(gaps, 0.99)),
        "longest, s": float(gaps.max()), "within 25x": within(lines),
    }  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    parts = ["capacity", "systems", "beside"]
    arguments.add_argument("parts", nargs="*", metavar="PART", default=parts, help=f"{', '.join(parts)}; without one, all")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the capacities over the loads")
    args = arguments.parse_args()
    requests, loads = (100, ["zipf 1.2"]) if args.quick else (400, list(LOADS))
    with ProcessPoolExecutor() as pool:
        if "capacity" in args.parts:
            for number, title in ((1, "of all requests"), (QUARTERS, "of each quarter by length, sustained")):
                cases = list(product(loads, SIDES))
                rows = list(pool.map(capacity, *zip(*cases, strict=True), [requests] * len(cases), [number] * len(cases)))
                rates = {(row["load"], row["side"]): row["requests/s"] for row in rows}
                table = [{"load": load} | {side: rates[load, side] for side in SIDES} for load in loads]
                show(f"Capacity, requests/s, 90 % {title}", table, machine(), args.json)
                show("Ratios", [ratios(load, rates) for load in loads], machine(), None)
            if args.plot:
                numbered = list(enumerate(loads))
                sides = {side: [(n, rate) for n, load in numbered if (rate := rates[load, side])] for side in SIDES}
                words = ", ".join(f"{n}: {load}" for n, load in numbered)
                plot.lines(sides, words, "requests/s, sustained", "Llama-2-7B on 8 A800", args.plot, log="y")
        if "systems" in args.parts:
            show("LoongServe over one system, chats", systems(requests, pool), machine(), None)
        if "beside" in args.parts:
            rates = {"zipf 1.0": 0.8, "zipf 1.2": 2.0, "zipf 1.4": 6.0, "chats": 15.0, "mixed": 0.3}
            cases = [(load, side, rates[load]) for load, side in product(loads, SIDES) if (load, side) != ("mixed", "4 x TP2")]
            show("At one rate", list(pool.map(beside, *zip(*cases, strict=True), [requests] * len(cases))), machine(), None)


if __name__ == "__main__":
    main()
