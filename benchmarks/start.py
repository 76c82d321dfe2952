"""How long does a start take the second time, and how much memory meanwhile and afterwards? The executor alone, in a process of its
own, with models of known shapes and random weights (made_gguf.py).

`first`: the weights are converted. `second`: they are mapped from the file that keeps them. Both end when a decode has run, as a
server is ready; `packed, s`: when the runtime has packed its weights, too. `graph`: whether it does, by the trial that a server
makes once for a model, before these starts. `peak / stays`: the process's largest resident memory while it loads, over what is
resident then. `stays / file`: without KV.
Limits: 3 s for the second start of 1.1B, 10 s for 8B; 1.15 for peak / stays; 1.25 for stays / file, 8B.

    python benchmarks/start.py [--shapes 1.1b 8b] [--folder FOLDER]
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import machine, parser, show
from made_gguf import KINDS, SHAPES, make

from stallfree.checkpoint import open_checkpoint
from stallfree.core.plan import Work
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.openvino.trial import choose

SECONDS = {"1.1b": 3.0, "8b": 10.0}
KV = 256 << 20


def start(model: str, weights: str, packs: str, folder: str) -> None:
    """Print what a start takes, as JSON."""
    began = time.perf_counter()
    executor = OpenVINOExecutor(
        open_checkpoint(model), weights=weights, kv_bytes=KV, max_model_len=2048, folder=Path(folder), packs=packs
    )
    executor.logits([Work("a", 0, 1, True, False, (1,), (0,), None, "", (1,), ())])
    seconds = time.perf_counter() - began
    executor.settle()
    packed = time.perf_counter() - began
    resident = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    stays = int(resident[1]) << 10 if resident else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"seconds": seconds, "packed": packed, "stays": stays, "peak": peak}))


def main() -> None:
    if sys.argv[1:2] == ["--start"]:
        start(*sys.argv[2:])
        return
    arguments = parser(__doc__)
    arguments.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    arguments.add_argument("--kind", choices=KINDS, default="q4_k", help="the files' quantisation (q4_k)")
    arguments.add_argument("--weights", nargs="+", choices=("file", "int8"), default=["file", "int8"])
    arguments.add_argument("--folder", type=Path, help="where files are made, and found the next time (a temporary folder)")
    args: argparse.Namespace = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        for shape in args.shapes:
            model = folder / f"{shape}-{args.kind}.gguf"
            if not model.is_file():
                make(shape, args.kind, model)
            for weights in args.weights:
                graph, why = choose(open_checkpoint(model), (weights,), "u8", None, large=True).graphs[weights]
                print(f"{model.name}, {weights}: {why}", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=folder) as kept:
                    for number in ("first", "second"):
                        command = [sys.executable, __file__, "--start", str(model), weights, "later" if graph else "never", kept]
                        done = subprocess.run(command, check=True, capture_output=True, text=True)
                        found, size = json.loads(done.stdout), model.stat().st_size
                        rows.append(
                            {
                                "model": model.name,
                                "file, MiB": size >> 20,
                                "weights": weights,
                                "graph": "yes" if graph else "no",
                                "start": number,
                                "s": round(found["seconds"], 1),
                                "packed, s": round(found["packed"], 1),
                                "limit, s": SECONDS[shape] if number == "second" else None,
                                "stays, MiB": found["stays"] >> 20,
                                "stays / file": round(found["stays"] / size, 2),
                                "peak / stays": round(found["peak"] / found["stays"], 2),
                            }
                        )
                        print(json.dumps(rows[-1]), file=sys.stderr)
    show("Starts", rows, machine(), args.json)


if __name__ == "__main__":
    main()
