"""What do adapters cost on the embedded model? An iteration with them, streams while others are loaded, and the start.

`graph`: memory and seconds of the graph with adapters, which the first one that is loaded has compiled.

`start`: seconds and memory until 10,000 folders with adapters are known, of which the headers are read.

`iterations`: 16 decodes at 512 tokens of context, each side in turn in one process, medians. Adapters of rank 8 on attention (q, k,
v and o) and on all modules: none in the batch, one for all, 16 different ones; and none on an executor that never had an adapter.

`chunk`: the same decodes with a chunk of 512 tokens of a prompt among them, which has the first adapter.

`loading`: 8 streams of 512 tokens without an adapter, each followed by another, and twice a second a request for one of a thousand
adapters that are registered, which answers one token. On one side all these requests are for 8 adapters that are resident; on the
other each is for the next of the 1,000, so that one is loaded from the disk each time. The sides take short turns, because a
machine's speed drifts. TBT is that of the streams; one "beside a load" ended with an iteration during which an adapter was loaded.

    python benchmarks/adapters.py
"""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, parser, show
from safetensors.numpy import save_file

from stallfree.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from stallfree.checkpoint.adapter import MODULES, PLACES, module_shapes, open_adapter
from stallfree.checkpoint.fetch import locate
from stallfree.core.plan import Plan, Work
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.engine.adapters import Library, folders
from stallfree.engine.engine import Engine
from stallfree.engine.text import Text
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.sampling import GREEDY
from stallfree.policies import load

ATTENTION = MODULES[:4]
DECODES, CONTEXT, RANK = 16, 512, 8
WARM = 2
"""Rounds that are not counted."""
REGISTERED, DISTINCT = 1000, 40
"""Adapters that have a name, and different files behind the names."""
KV_BYTES = 160 << 20
"""So much that about 32 adapters are resident beside the streams' KV."""
CHUNK, FOLDERS = 512, 10_000
STREAMS, STREAM_TOKENS, EVERY_S = 8, 512, 0.5


def write(folder: Path, config: ModelConfig, modules: Sequence[str], seed: int) -> Path:
    """A folder as PEFT saves it, with small random weights in 16 bits."""
    folder.mkdir(parents=True)
    rng, shapes, tensors = np.random.default_rng(seed), module_shapes(config), {}
    for layer in range(config.num_layers):
        for module in modules:
            out, inner = shapes[module]
            name = f"base_model.model.model.layers.{layer}.{PLACES[module]}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.02, (RANK, inner)).astype(np.float16)
            tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.02, (out, RANK)).astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    names = ", ".join(f'"{module}"' for module in modules)
    (folder / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {RANK}, "lora_alpha": {2 * RANK}, "target_modules": [{names}]}}'
    )
    return folder


def linked(made: Path, folder: Path) -> None:
    """Another name for the same bytes on the disk."""
    folder.mkdir(parents=True)
    for file in made.iterdir():
        os.link(file, folder / file.name)


def work_of(executor: OpenVINOExecutor, keys: Sequence[str], chunk: int = 0) -> tuple[Work, ...]:
    """One decode for each of `keys`, each with KV of its own, and a chunk of so many tokens with the first of them."""
    size = executor.capacity.block_size
    each = -(-(CONTEXT + 1) // size)
    tables = [tuple(range(i * each, (i + 1) * each)) for i in range(len(keys) + 1)]
    decodes = [
        Work(str(i), CONTEXT, 1, True, True, (7 + i,), tables[i], GREEDY, key, range(CONTEXT), ()) for i, key in enumerate(keys)
    ]
    prompt = range(1000, 1000 + chunk)
    return (
        *decodes,
        *([Work("chunk", 0, chunk, True, False, tuple(prompt), tables[-1], GREEDY, keys[0], prompt, ())] * bool(chunk)),
    )


def alternated(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median time of each side, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + WARM):
        for name, run in sides.items():
            seconds = run()
            if number >= WARM:
                times[name].append(seconds)
    return {name: statistics.median(taken) for name, taken in times.items()}


def timed(executor: OpenVINOExecutor, keys: Sequence[str], chunk: int = 0) -> Callable[[], float]:
    """A function that runs an iteration of `work_of` and gives the seconds that it took: the best of three in a row, because what
    changes between two iterations costs once, as when requests come and go."""
    work, steps = work_of(executor, keys, chunk), count()

    def run() -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            executor.submit(Plan(next(steps), 0.0, work))
            executor.collect()
            times.append(time.perf_counter() - began)
        return min(times)

    return run


def graph(checkpoint: Checkpoint, folder: Path) -> list[dict[str, Any]]:
    executor = OpenVINOExecutor(checkpoint, kv_bytes=256 << 20)
    at, rows = executor.capacity.num_blocks, []
    for number, title in enumerate(("the first adapter, with its graph", "the second")):
        adapter = open_adapter(write(folder / str(number), checkpoint.config, ATTENTION, number), checkpoint.config)
        at -= executor.adapter_blocks(adapter)
        before, began = resident_bytes(), time.perf_counter()
        executor.load_adapter(str(number), adapter, range(at, at + executor.adapter_blocks(adapter)))
        rows.append({"loaded": title, "s": time.perf_counter() - began, "MB more": (resident_bytes() - before) / 1e6})
    executor.close()
    return rows


def start(checkpoint: Checkpoint, text: Text, folder: Path, quick: bool) -> list[dict[str, Any]]:
    made = write(folder / "made", checkpoint.config, ATTENTION, 0)
    for number in range(FOLDERS // 10 if quick else FOLDERS):
        linked(made, folder / "all" / str(number))
    engine = Engine(OpenVINOExecutor(checkpoint, kv_bytes=KV_BYTES), text, load("sarathi"))
    library = Library(engine.adapters, checkpoint.config)
    before, began = resident_bytes(), time.perf_counter()
    for name, adapter in library.open_all(folders((), folder / "all")).items():
        library.add(name, adapter)
    seconds, more = time.perf_counter() - began, resident_bytes() - before
    engine.close()
    return [{"folders": len(library.named), "s": seconds, "MB more": more / 1e6}]


def resident_bytes() -> int:
    """Memory of this process now. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def iterations(checkpoint: Checkpoint, folder: Path, quick: bool, chunk: int = 0) -> list[dict[str, Any]]:
    rows = []
    for title, modules in (("attention", ATTENTION), ("all modules", MODULES)):
        plain, adapted = (OpenVINOExecutor(checkpoint, kv_bytes=256 << 20) for _ in range(2))
        at = adapted.capacity.num_blocks
        for number in range(DECODES):
            adapter = open_adapter(write(folder / title / str(number), checkpoint.config, modules, number), checkpoint.config)
            at -= adapted.adapter_blocks(adapter)
            adapted.load_adapter(str(number), adapter, range(at, at + adapted.adapter_blocks(adapter)))
        sides = {
            "never any": timed(plain, [""] * DECODES, chunk),
            "none": timed(adapted, [""] * DECODES, chunk),
            "one for all": timed(adapted, ["0"] * DECODES, chunk),
            "16 different": timed(adapted, [str(number) for number in range(DECODES)], chunk),
        }
        medians = alternated(sides, (10 if quick else 60) // (10 if chunk else 1))
        base = medians["never any"]
        for name, value in medians.items():
            rows.append({"adapters on": title, "batch": name, "ms": 1e3 * value, "over never any": value / base})
        for executor in (plain, adapted):
            executor.close()
    return rows


class Streams:
    """An engine with streams, each followed by another, and the gaps between their tokens."""

    def __init__(self, checkpoint: Checkpoint, text: Text, folder: Path):
        executor = OpenVINOExecutor(checkpoint, kv_bytes=KV_BYTES)
        self.engine = Engine(executor, text, load("sarathi", token_budget=64), record=self._count)
        self.loads = 0
        self.library = Library(self.engine.adapters, checkpoint.config)
        for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
            self.library.add(path.name, self.library.open(path.name, path))
        self.engine.adapters.warm_up()
        self._numbers, self._last = count(), dict[str, float]()
        self._rng = np.random.default_rng(0)
        for _ in range(STREAMS):
            self._ask("", 64, STREAM_TOKENS)

    def _count(self, step: StepRecord) -> None:
        self.loads += len(step.loaded)

    def _ask(self, adapter: str, length: int, tokens: int) -> None:
        ids = self._rng.integers(1000, 40_000, length).tolist()
        name = f"{'stream' if not adapter else 'other'} {next(self._numbers)}"
        self.engine.submit(Request(name, ids, tokens, adapter=adapter, arrival=time.perf_counter()))

    def run(self, seconds: float, adapters: Any) -> list[tuple[float, bool]]:
        """The streams' gaps over this time, and whether each was beside a load, while a request for the next of `adapters` comes
        every `EVERY_S` seconds."""
        gaps: list[tuple[float, bool]] = []
        self._last.clear()
        began = time.perf_counter()
        due = began
        while (now := time.perf_counter()) < began + seconds:
            if now >= due:
                self._ask(next(adapters), 16, 1)
                due += EVERY_S
            outputs = self.engine.step()
            loads = self.engine.adapters.under_way
            for output in outputs:
                at = time.perf_counter()
                if output.id.startswith("stream"):
                    if output.finish_reason is not None:
                        self._ask("", 64, STREAM_TOKENS)
                    elif output.id in self._last:
                        gaps.append((at - self._last[output.id], loads))
                    self._last[output.id] = at
                elif output.error:
                    raise RuntimeError(output.error)
        return gaps


def loading(checkpoint: Checkpoint, text: Text, folder: Path, quick: bool) -> list[dict[str, Any]]:
    for number in range(REGISTERED):
        if number < DISTINCT:
            write(folder / str(number), checkpoint.config, ATTENTION, number)
            continue
        linked(folder / str(number % DISTINCT), folder / str(number))
    streams = Streams(checkpoint, text, folder)
    here, all_of = cycle(map(str, range(8))), cycle(map(str, range(REGISTERED)))
    gaps: dict[str, list[tuple[float, bool]]] = {"8 that are resident": [], "each another of 1,000": []}
    loads = dict.fromkeys(gaps, 0)
    turn_s, turns = (3.0, 2) if quick else (4.0, 15)
    streams.run(5.0, here)
    accounts = streams.engine.scheduler.ledger.adapters
    for _ in range(turns):
        for name, adapters in zip(gaps, (here, all_of), strict=True):
            streams.run(1.0, adapters)  # the change from one side to the other is not counted
            before = streams.loads
            gaps[name] += streams.run(turn_s, adapters)
            loads[name] += streams.loads - before
    rows = []
    base = np.percentile([gap for gap, _ in gaps["8 that are resident"]], 99)
    for name, pairs in gaps.items():
        values, beside = [gap for gap, _ in pairs], [gap for gap, loads in pairs if loads]
        p50, p99 = np.percentile(values, [50, 99])
        rows.append(
            {
                "adapters on": "attention",
                "batch": f"8 streams; requests for {name}",
                "TBT p50, ms": 1e3 * p50,
                "TBT p99, ms": 1e3 * p99,
                "longest, ms": 1e3 * max(values),
                "p50 beside a load, ms": 1e3 * statistics.median(beside) if beside else None,
                "p99 over the first": p99 / base,
                "loads": loads[name],
                "resident": accounts.counts()["resident"],
            }
        )
    streams.engine.close()
    return rows


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", choices=("graph", "start", "iterations", "chunk", "loading"))
    args = arguments.parse_args()
    facts = machine()
    checkpoint = open_checkpoint(locate(None, print))
    text = Text.from_gguf(checkpoint.metadata or {}, checkpoint.config.vocab_size)
    folder = Path(tempfile.mkdtemp(prefix="adapters-"))
    try:
        for name, measure in (
            ("graph", lambda: graph(checkpoint, folder / "graph")),
            ("start", lambda: start(checkpoint, text, folder / "start", args.quick)),
            ("iterations", lambda: iterations(checkpoint, folder / "made", args.quick)),
            ("chunk", lambda: iterations(checkpoint, folder / "chunk", args.quick, CHUNK)),
            ("loading", lambda: loading(checkpoint, text, folder / "registered", args.quick)),
        ):
            if args.only in (None, name):
                show(f"Adapters, {name}", measure(), facts, args.json and args.json.with_suffix(f".{name}.json"))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
