"""How does a mixture of experts move the best token budget? Simulated: Mixtral 8x7B on two GPUs and Qwen3-30B-A3B on one, A100 and
H100, each beside two dense models that differ from it in the width of the FFN alone: `active` has the weights that a token of the
mixture meets, `total` all of them. P99 TBT within 50 ms.

    prices      milliseconds of an iteration by its decodes, the prompt tokens that fit into the target beside 32 of them, and the
                speed of prefill by the size of chunks
    capacity    requests/s under every fixed budget, and under the slo policy, which knows only the target
    learned     of the mixtures: the errors of calibrated prices, and requests/s under the slo policy, with and without a price for
                the experts that an iteration meets

    python benchmarks/finding_moe.py prices capacity learned --plot docs/images/finding_moe.png
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import machine, parser, show

from stallfree.core.plan import Shape
from stallfree.core.policy import CostModel
from stallfree.core.slo import Slo
from stallfree.metrics import plot
from stallfree.perf import shape as models
from stallfree.perf.fitted import device_shapes
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Simulator, calibrated, instance
from stallfree.sim.trials import Trials
from stallfree.workload.traffic import Traffic

MIXTURES = {"mixtral-8x7b": 2, "qwen3-30b-a3b": 1}
"""The number of GPUs that each is on."""
DEVICES = ("a100-80g", "h100")
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SLO = "tbt=50ms"
LOAD = Traffic("poisson", "openchat", 8192, requests=200)
CONTEXT = 2048
"""Tokens before each decode of `prices`."""
DECODES = (1, 4, 16, 64)
CHUNKS = (128, 512, 2048)
WHOLE = 8192
"""The chunk with which the others are compared."""


@dataclass(frozen=True)
class Case:
    mixture: str
    variant: str
    device: str
    model: str

    @property
    def words(self) -> dict[str, Any]:
        return {"device": self.device, "model": self.mixture, "FFN": self.variant}

    def deployment(self, **policy: Any) -> Deployment:
        return Deployment(
            model=self.model, hardware=self.device, tp=MIXTURES[self.mixture], max_model_len=8192, slo=SLO, **policy
        )  # fmt: skip


def cases(folder: Path, quick: bool) -> Iterator[Case]:
    """Writes a config.json for each dense model into `folder`."""
    for device, mixture in product(DEVICES[:1] if quick else DEVICES, MIXTURES):
        sizes = models.load(mixture)
        yield Case(mixture, "experts", device, mixture)
        for variant, width in (("active", sizes.active_experts), ("total", sizes.experts)):
            file = folder / f"{mixture}-{variant}.json"
            values = {
                "model_type": "llama", "hidden_size": sizes.hidden_size, "intermediate_size": width * sizes.ffn_size,
                "num_hidden_layers": sizes.num_layers, "num_attention_heads": sizes.num_heads, "head_dim": sizes.head_dim,
                "num_key_value_heads": sizes.num_kv_heads, "vocab_size": sizes.vocab_size,
                "max_position_embeddings": sizes.max_model_len,
            }  # fmt: skip
            file.write_text(json.dumps(values))
            yield Case(mixture, variant, device, str(file))


def prices(all_cases: list[Case], quick: bool) -> list[dict[str, Any]]:
    target = Slo.parse(SLO).tbt
    assert target is not None
    rows = []
    for case in all_cases:
        cost = instance(case.deployment()).cost
        decodes = {number: 1e3 * cost.seconds([(CONTEXT, 1)] * number) for number in DECODES}
        room = cost.room([(CONTEXT, 1)] * 32, 0, WHOLE, target.seconds)
        speed = {size: size / cost.seconds([(0, size)]) for size in (*CHUNKS, WHOLE)}
        rows.append(
            case.words
            | {f"{number} decodes, ms": ms for number, ms in decodes.items()}
            | {"prompt tokens in the target": room, "prefill, tokens/s": speed[WHOLE]}
            | {f"in chunks of {size}": speed[size] / speed[WHOLE] for size in CHUNKS}
        )
    return rows


def capacity(all_cases: list[Case], quick: bool) -> list[dict[str, Any]]:
    budgets = (*(BUDGETS[1::3] if quick else BUDGETS), None)
    traffic = replace(LOAD, requests=100) if quick else LOAD
    simulators, searches = {}, {}
    for case, budget in product(all_cases, budgets):
        policy = {"policy": "slo"} if budget is None else {"policy": "sarathi", "token_budget": budget}
        name = f"{case} {budget}"
        simulators[name] = Simulator(case.deployment(**policy))
        searches[name] = traffic, Slo.parse(SLO), 8.0
    with Trials(simulators) as trials:
        found = {name: capacity.rate for name, capacity in trials.capacities(searches, lowest=0.05).items()}
    rows = []
    for case in all_cases:
        rates = {budget: found[f"{case} {budget}"] for budget in budgets}
        slo = rates.pop(None)
        best = max(rates, key=lambda budget: rates[budget])
        rows.append(
            case.words
            | {str(budget): rate for budget, rate in rates.items()}
            | {"slo": slo, "best": str(best), "slo / best": slo / rates[best] if rates[best] else None}
            | {"kept by 512": rates[512] / rates[best] if rates.get(512) else None}
        )
    return rows


@dataclass(frozen=True)
class Blind:
    """The cost model `of` a mixture, which does not say that it is one."""

    of: CostModel

    def seconds(self, shape: Shape) -> float:
        return self.of.seconds(shape)


def learned(all_cases: list[Case], quick: bool) -> list[dict[str, Any]]:
    simulators, searches, errors = {}, {}, {}
    mixtures = [case for case in all_cases if case.variant == "experts"]
    for case in mixtures:
        plain = instance(case.deployment())
        samples = [(shape, plain.cost.seconds(shape)) for shape in device_shapes(plain.capacity.max_model_len)]
        for known, place in (("with", plain), ("without", plain._replace(cost=Blind(plain.cost)))):  # type: ignore[arg-type]
            name = f"{case} {known}"
            errors[name] = calibrated(place).errors(samples)
            simulators[name] = Simulator(case.deployment(policy="slo"), place)
            searches[name] = replace(LOAD, requests=100) if quick else LOAD, Slo.parse(SLO), 4.0
    with Trials(simulators) as trials:
        found = {name: capacity.rate for name, capacity in trials.capacities(searches, lowest=0.05).items()}
    rows: list[dict[str, Any]] = []
    for case in mixtures:
        row = {"device": case.device, "model": case.mixture}
        for known in ("without", "with"):
            name = f"{case} {known}"
            row |= {f"{known}: error, median": errors[name].median, f"{known}: largest": errors[name].largest}
            row |= {f"{known}: requests/s": found[name]}
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Capacity as a share of the best fixed one, because the models' capacities are far apart."""
    sides = {}
    for row in rows:
        if row["device"] == "h100":
            rates = {float(budget): row[str(budget)] for budget in BUDGETS}
            best = max(rates.values())
            sides[f"{row['model']}, {row['FFN']}"] = [(budget, rate / best) for budget, rate in rates.items()]
    title = f"H100, openchat, {SLO} at P99"
    plot.lines(sides, "token budget", "capacity over that with the best budget", title, file, log="x")


PARTS = {"prices": prices, "capacity": capacity, "learned": learned}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=PARTS, nargs="+", help="what to look at")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the capacities over the budget")
    args = arguments.parse_args()
    facts = machine()
    with TemporaryDirectory() as folder:
        all_cases = list(cases(Path(folder), args.quick))
        for part in args.part:
            rows = PARTS[part](all_cases, args.quick)
            show(f"Mixtures of experts: {part}", rows, facts, args.json)
            if args.plot and part == "capacity" and not args.quick:
                draw(rows, args.plot)


if __name__ == "__main__":
    main()
