"""What do ranks in separate processes cost? The torch executor in one process, with two ranks a layer, and with two stages.

A small llama with random weights in bfloat16 on this machine's processor (the embedded model's 9 heads do not divide by two ranks),
16 decodes an iteration, sides in turn. `schedule` is the scheduler's part of an iteration. `messages` is the time from the plan's
submission to its result, minus the time that the sampling rank reports from the plan's arrival to its result; with two stages that
rank's report includes its wait for the other. Both together should be at most 1 ms.

    python benchmarks/parallel.py
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, parser, show
from safetensors.numpy import save_file

from stallfree.checkpoint import Checkpoint, open_checkpoint
from stallfree.core.ledger import Limits
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.executors.base import Executor
from stallfree.executors.sampling import Sampling
from stallfree.executors.torch import Options, ParallelExecutor, TorchExecutor, workers
from stallfree.policies import load

LIMIT_MS = 1.0
DECODES, CONTEXT = 16, 64
SIDES = {"one process": (1, 1), "TP 2": (2, 1), "PP 2": (1, 2)}


def random_model(folder: Path) -> Checkpoint:
    """A llama of 12 layers, 512 wide, with 8 heads."""
    hidden, ffn, layers, vocabulary = 512, 1536, 12, 8192
    config = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + f"self_attn.{name}_proj.weight": (out, hidden) for name, out in (("q", 512), ("k", 256), ("v", 256))}
        shapes |= {at + "self_attn.o_proj.weight": (hidden, hidden), at + "mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {at + f"mlp.{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
        shapes |= {at + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    save_file({name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def executor(checkpoint: Checkpoint, tp: int, pp: int) -> Executor:
    options = Options("bf16", "bf16", device="cpu")
    if tp * pp == 1:
        return TorchExecutor(checkpoint, options, 1 << 28)
    return ParallelExecutor(checkpoint, options, 1 << 28, tp=tp, pp=pp, workers=workers("local"))


def iterations(executor: Executor, number: int) -> dict[str, float]:
    """Medians, in milliseconds, of one plan at a time."""
    scheduler = Scheduler(load("sarathi"), executor.capacity, Limits(DECODES))
    for i in range(DECODES):
        scheduler.submit(Request(str(i), [5 + i] * CONTEXT, number + 20, sampling=Sampling(temperature=0)))
    parts: dict[str, list[float]] = {"iteration": [], "schedule": [], "messages": []}
    while len(parts["iteration"]) < number:
        began = time.perf_counter()
        plan = scheduler.schedule(began)
        planned = time.perf_counter()
        executor.submit(plan)
        result = executor.collect()
        ran = time.perf_counter()
        scheduler.complete(plan, result, ran)
        ended = time.perf_counter()
        if all(work.decode for work in plan.work):
            parts["iteration"].append(ended - began)
            parts["schedule"].append(planned - began + ended - ran)
            parts["messages"].append(ran - planned - result.seconds)
    return {name: 1e3 * statistics.median(times) for name, times in parts.items()}


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    rounds, number = (1, 20) if args.quick else (3, 60)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_model(Path(folder))
        for _ in range(rounds):
            for name, (tp, pp) in SIDES.items():
                side = executor(checkpoint, tp, pp)
                try:
                    results[name].append(iterations(side, number))
                finally:
                    side.close()
    rows: list[dict[str, Any]] = []
    for name, turns in results.items():
        middle = {f"{key}, ms": statistics.median(turn[key] for turn in turns) for key in turns[0]}
        both = middle["schedule, ms"] + middle["messages, ms"]
        rows.append({"side": name} | middle | {"schedule + messages, ms": both, "limit, ms": LIMIT_MS})
    show("16 decodes an iteration", rows, facts, args.json)


if __name__ == "__main__":
    main()
