"""When does a ring of groups beat tensor parallelism, if both compute prompts in chunks?

One iteration with a chunk of a prompt, by the tokens before it and by its size, on eight devices of a node: the time of TP8 over
that of rings. A ratio above 1: the ring is faster. Priced by the roofline. Prices of a ring's prefill are held against LoongServe's
measurements on A800, of whole prompts; those of its decodes against none (docs/long.md).

    python benchmarks/finding_long.py --plot docs/images/finding_long.png
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from harness import machine, parser, show

from stallfree.metrics import plot
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import instance

PLACES = (("llama2-7b", "a800"), ("llama3-8b", "h100"))
"""A model whose KV is large (0.5 MB a token), and one whose KV is small (0.13 MB)."""
SPLITS = {"TP8": (8, 1), "SP2 TP4": (4, 2), "SP4 TP2": (2, 4), "SP8 TP1": (1, 8)}
"""TP and SP."""
BEFORE, SIZES = (0, 32_000, 128_000, 500_000), (512, 2048, 8192, 32_768)


def chunks(model: str, hardware: str) -> list[dict[str, Any]]:
    costs = {split: instance(Deployment(model, hardware, tp, sp=sp)).cost for split, (tp, sp) in SPLITS.items()}
    rows = []
    for before, size in product(BEFORE, SIZES):
        seconds = {split: cost.seconds([(before, size)]) for split, cost in costs.items()}
        rows.append(
            {"model": model, "on 8": hardware, "tokens before": before, "chunk": size, "TP8, ms": 1e3 * seconds["TP8"]}
            | {f"TP8 / {split}": seconds["TP8"] / seconds[split] for split in list(SPLITS)[1:]}
        )
    return rows


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """The ratio of TP8 to SP4 TP2 over the chunk, by the tokens before it."""
    sides: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = f"{row['model']}, {row['tokens before']:,} tokens before"
        sides.setdefault(name, []).append((row["chunk"], row["TP8 / SP4 TP2"]))
    plot.lines(sides, "tokens of the chunk", "time of TP8 / SP4 TP2", "8 A800 and 8 H100", file, log="x", even=1.0)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios over the chunk")
    args = arguments.parse_args()
    rows = [row for place in PLACES[: 1 if args.quick else None] for row in chunks(*place)]
    show("A ring and tensor parallelism", rows, machine(), args.json)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
