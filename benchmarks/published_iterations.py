"""Iterations of other engines as their authors published them, beside the simulator's engines of those years.

    python -m benchmarks.published_iterations [--json FILE]

Splitwise (ISCA'24): vLLM of 2023 on A100 and H100, from its simulator's repository. A prompt is one iteration and the front end's
time; a token is a decode iteration of the batch, with the prompt and half of the 128 tokens before it. LMDeploy: TurboMind of 2023
(version 0.1.0a1) on A100, from its documentation; first tokens of batches of one, and the median time of later ones. LoongServe
(2404.09526): prefills on 8 A800, by tensor parallelism and by a ring of four groups of two. Nothing is fitted here. `vllm-2023` was
fitted to Splitwise's token times of TP 4 and 8, `fused` to nothing, and the ring's one coefficient to the longest of its prefills.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from stallfree.perf import hardware, shape
from stallfree.perf.roofline import Roofline

DATA = Path(__file__).parent / "data"
SHOWN = ("vllm-2023", "fused", "graph", "eager-2024", "vllm-2026")


def main() -> None:
    parser = harness.parser(__doc__)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for engine in SHOWN:
        for table, pairs in (("Splitwise", splitwise(engine)), ("LMDeploy", lmdeploy(engine)), ("LoongServe", loongserve(engine))):
            errors: dict[str, list[float]] = {}
            for what, measured, priced in pairs:
                errors.setdefault(what, []).append(priced / measured - 1)
            errors["all"] = [error for group in list(errors.values()) for error in group]
            rows += [{"table": table, "engine": engine, "of": what, **_summary(group)} for what, group in errors.items()]
    harness.show("published iterations: |priced / measured - 1|", rows, harness.machine(), options.json)
    prefills = [
        {
            "prefill": f"{row['batch']} x {row['prompt_tokens']}",
            "split": what,
            "measured, ms": round(measured),
            "priced, ms": round(priced),
        }
        for row, (what, measured, priced) in zip(_read("loongserve.csv"), loongserve("graph"), strict=True)
    ]
    harness.show("LoongServe's prefills, engine graph", prefills, harness.machine(), None)


def splitwise(engine: str) -> Iterator[tuple[str, float, float]]:
    """What, and its milliseconds as measured and by `engine`."""
    for row in _read("splitwise.csv"):
        cost, prompt, batch = _cost(row, engine), int(row["prompt_tokens"]), int(row["batch"])
        yield "prompts", float(row["prompt_ms"]), 1000 * (cost.seconds([(0, prompt)] * batch) + cost.front_s)
        yield "tokens", float(row["token_ms"]), 1000 * cost.seconds([(prompt + 64, 1)] * batch)


def lmdeploy(engine: str) -> Iterator[tuple[str, float, float]]:
    """The same."""
    for row in _read("lmdeploy.csv"):
        cost, prompt, batch = _cost(row, engine), int(row["prompt_tokens"]), int(row["batch"])
        if batch == 1:
            yield "prompts", float(row["first_ms"]), 1000 * cost.seconds([(0, prompt)])
        yield "tokens", float(row["token_ms"]), 1000 * cost.seconds([(prompt + int(row["output_tokens"]) // 2, 1)] * batch)


def loongserve(engine: str) -> Iterator[tuple[str, float, float]]:
    """The same."""
    for row in _read("loongserve.csv"):
        sp, batch = int(row["sp"]), int(row["batch"])
        priced = 1000 * _cost(row, engine, sp).seconds([(0, int(row["prompt_tokens"]))] * batch)
        yield f"prompts, SP{sp} TP{row['tp']}", float(row["prefill_ms"]), priced


def _read(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def _cost(row: dict[str, str], engine: str, sp: int = 1) -> Roofline:
    return Roofline(hardware.load(row["hardware"]), shape.Sharded(shape.load(row["model"]), int(row["tp"])), engine, sp=sp)


def _summary(errors: list[float]) -> dict[str, Any]:
    absolute, signed = sorted(map(abs, errors)), sorted(errors)
    size = len(errors)
    return {"points": size, "median": absolute[size // 2], "p90": absolute[size * 9 // 10], "signed median": signed[size // 2]}


if __name__ == "__main__":
    main()
