"""Options that several commands share. This module knows their names and units, not what they do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from stallfree.server.keys import Keys
    from stallfree.server.tenants import Tenants

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine can reach."""


def keys(host: str, key: str | None, file: Path | None, *, tenants: Path | None = None) -> Keys:
    """The keys of --api-key and --api-key-file. Prints a warning if other machines can reach `host` without a key, and if others
    can read the file. The file of --tenants always has keys. Raises ValueError for keys that cannot be read.
    """
    from stallfree.server.keys import Keys

    keys = Keys.of(key, file)
    if not keys and tenants is None and host not in LOOPBACK:
        remedy = "set STALLFREE_API_KEY (or --api-key, --api-key-file)"
        typer.echo(f"warning: --host {host} without an API key lets in all who can reach it; {remedy}", err=True)
    _warn_if_open("--api-key-file", file)
    return keys


def tenants(file: Path | None, keys: Keys, slo: str | None, *, share_prefixes: bool) -> Tenants:
    """The tenants in the `file` of --tenants. Their keys open the server together with `keys`. `slo`: the words of --slo, which
    have the classes. `share_prefixes`: tenants find each other's cached prefixes. Raises ValueError for a file that cannot be used,
    and for words that are no targets.
    """
    from stallfree.core.classes import Classes
    from stallfree.server.tenants import Tenants

    tenants = Tenants(file, keys, None if slo is None else Classes.parse(slo), share_prefixes=share_prefixes)
    _warn_if_open("--tenants", file)
    return tenants


def _warn_if_open(option: str, file: Path | None) -> None:
    from stallfree.server.keys import open_to_others

    if file is not None and open_to_others(file):
        typer.echo(f"warning: all users of this machine can read or change {option} {file}; run `chmod 600 {file}`", err=True)


def names(given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of --served-model-name, each once; none if the option was left out. Raises ValueError for an empty one."""
    if not all(name.strip() for name in given or ()):
        raise ValueError("--served-model-name is empty; give a name, or leave the option out for the model's own")
    return tuple(dict.fromkeys(given or ()))


def memory(text: str | int) -> int:
    """The bytes in "2GiB", "512 MiB", "1.5g" or a plain number of bytes. Raises BadParameter for other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", str(text), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise typer.BadParameter(f"{text!r} is not an amount of memory; write 512MiB or 2GiB")
    return int(float(match[1]) * 1024 ** ("", "k", "m", "g", "t").index(match[2].lower()))


def progress(label: str) -> Callable[[int, int], None]:
    """A function that shows the percentage done after `label`, in one line. It prints only on a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{label}: {100 * done // total} %", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def addresses(text: str, option: str) -> list[tuple[str, int]]:
    """The (host, port) pairs of "host:port,host:port", the value of `option`. Raises ValueError for text that is no address."""
    pairs = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(?:\[([0-9a-fA-F:.]+)\]|([^\s:\[\]]+)):(\d{1,5})\s*", part)
        if match is None or not 0 < int(match[3]) < 65536:
            raise ValueError(f"{option} {part!r} is not an address; write 127.0.0.1:9000, with commas between several")
        pairs.append((match[1] or match[2], int(match[3])))
    return pairs


Model = Annotated[
    str | None,
    typer.Argument(help="The model; the same as --model."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="GGUF file, folder with safetensors, or hub id.", show_default="the embedded SmolLM2-135M-Instruct"
    ),
]


def one_model(argument: str | None, option: str | None) -> str | None:
    """The model that the argument or the option names. Raises ValueError if they name different ones."""
    if None not in (argument, option) and argument != option:
        raise ValueError(f"{argument} and --model {option} name two models; give one of them")
    return argument or option


Executor = Annotated[str, typer.Option(help="What runs the model: openvino, torch, simulated, or ./file.py:Class.")]
Policy = Annotated[str, typer.Option(help="Scheduling policy (see `stallfree list policies`), or ./file.py:Class.")]
Slo = Annotated[
    str | None,
    typer.Option(
        help="Latency targets, as tbt=100ms@p99 or ttft=2s@p90,tpot=50ms; of several classes: 'chat: ttft=1s; batch: ttlt=10min'.",
        show_default="5 small decode iterations",
    ),
]
TokenBudget = Annotated[
    int | None, typer.Option(help="Tokens per iteration, for policies that take a budget.", show_default="the policy's")
]
PolicyOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option of the policy. May be given several times.")
]
Weights = Annotated[
    Literal["auto", "file", "int4", "int8", "fp8", "bf16", "fp16", "f32"] | None,
    typer.Option(
        help="Precision of the weights; file: the bits that they have in the file; auto: the quicker of file and int8, by a trial.",
        show_default="auto; executor torch: bf16",
    ),
]
Kv = Annotated[
    Literal["u4", "u8", "fp8", "bf16", "fp16", "f32"] | None,
    typer.Option(help="Precision of the KV cache; with u4, keys have 8 bits.", show_default="u8; executor torch: bf16"),
]
Device = Annotated[
    Literal["cpu", "cuda"] | None, typer.Option(help="Where executor torch runs.", show_default="cuda if there is a GPU")
]
Tp = Annotated[int, typer.Option(help="Tensor parallelism: ranks that share each layer (executor torch).", min=1)]
Sp = Annotated[
    int,
    typer.Option(
        help="Sequence parallelism: groups of --tp ranks that share the tokens of each request (executor torch). With --policy "
        "elastic or loongserve, instances that are together anew in each iteration.",
        min=1,
    ),
]
Pp = Annotated[int, typer.Option(help="Pipeline parallelism: stages that share the layers (executor torch).", min=1)]
Workers = Annotated[Literal["local", "ray"], typer.Option(help="Where ranks run: on this machine, or on a Ray cluster.")]
GpuMemory = Annotated[
    float, typer.Option("--gpu-memory-utilization", help="Share of a GPU's memory for weights, KV and iterations.")
]
GenerationConfig = Annotated[
    Literal["auto", "none"], typer.Option(help="Sampling defaults: those that the model's makers recommend (auto), or none.")
]
OnWorkerLoss = Annotated[
    Literal["fail", "restart"], typer.Option(help="After a rank is lost, running requests fail, or start again.")
]
KvMemory = Annotated[
    int | None,
    typer.Option(
        parser=memory,
        metavar="SIZE",
        help="Memory for the KV cache, such as 2GiB.",
        show_default="a quarter of the free memory, at most 4GiB",
    ),
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, in tokens.", show_default="the model's")]
MaxSeqs = Annotated[int, typer.Option(help="Most requests running at once.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens in one iteration, whatever the policy.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the executor.", show_default="one for each core of a socket")]
KvHostMemory = Annotated[
    int | None,
    typer.Option(
        parser=memory,
        metavar="SIZE",
        help="This machine's memory for cached prefixes that the KV cache has no room for, such as 8GiB.",
        show_default="none",
    ),
]
PrefixCache = Annotated[bool, typer.Option(help="Share the KV of equal prompt beginnings.")]
Recorded = Annotated[
    Path, typer.Argument(metavar="RUN.jsonl", help="A file that `stallfree serve --record RUN.jsonl` wrote.", show_default=False)
]
ServersKey = Annotated[
    str | None,
    typer.Option(envvar="STALLFREE_API_KEY", help="Clients must send it as a bearer token or as x-api-key.", show_envvar=True),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keys of clients, one a line: name:key or name:sha256=HEX.", show_default=False),
]
TenantsFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Tenants with keys, weights, classes and limits (TOML); SIGHUP reads it again.", show_default=False
    ),
]
SharePrefixes = Annotated[
    bool,
    typer.Option(
        "--share-prefixes",
        help="Let keys find each other's cached prefixes; how soon an answer begins may then tell what another key asked.",
    ),
]
OnLate = Annotated[
    Literal["refuse", "serve"],
    typer.Option(
        help="Requests whose first token would miss the target for ttft: refused with status 429 and the predicted time, or served."
    ),
]
ServedNames = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Name of the model in the API. May be given several times: all are accepted, answers have the first.",
        show_default="its own",
    ),
]
Sanitize = Annotated[
    bool, typer.Option("--sanitize-control-tokens", help="Read control tokens that clients write (<|im_start|>) as text.")
]
ToolParser = Annotated[
    str | None,
    typer.Option(help="How the model writes tool calls: hermes, mistral, pythonic, llama_json, plain; by its chat template."),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="Guess the next tokens and check several at once: ngram (from the text so far), draft:MODEL (a smaller model), or "
        "./file.py:Class.",
        show_default="nothing is guessed",
    ),
]
DraftTokens = Annotated[int, typer.Option(help="The most tokens guessed for a stream in an iteration.")]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER",
        help="A LoRA adapter (PEFT's safetensors), served as a model of that name. May be given several times.",
        show_default=False,
    ),
]
OneAdapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="NAME=FOLDER", help="The LoRA adapter (PEFT's safetensors) that answers.", show_default=False
    ),
]
AdaptersFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="A folder of LoRA adapters: each sub-folder is one, under its name.", show_default=False),
]
MaxAdapterRank = Annotated[int, typer.Option(help="The largest rank of an adapter.", min=1)]
AdminKey = Annotated[
    str | None,
    typer.Option(
        envvar="STALLFREE_ADMIN_KEY",
        help="Who sends this key may add and remove adapters while the server runs.",
        show_envvar=True,
        show_default="nobody may",
    ),
]
Start = Annotated[float, typer.Option(help="The first rate to try, in requests per second.")]
Tolerance = Annotated[float, typer.Option(help="Largest error of the capacity, as a share of it.")]
Trials = Annotated[int, typer.Option(help="Most trials at one rate. They end once one verdict leads by two.")]
Shortest = Annotated[float, typer.Option(help="Minimum seconds of arrivals per trial; requests are added.")]
Html = Annotated[Path | None, typer.Option(help="Write table and plots to this new file; needs matplotlib.", show_default=False)]
RequestsOut = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a row for each request to this new .csv or .jsonl.", show_default=False),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", min=0, show_default="the model's recommendation")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass(frozen=True)
class Served:
    """The engine's options in commands that serve: the fields of `engine.assemble.Options`, with a server's defaults."""

    model: Model = None
    slo: Slo = None
    policy: Policy = "slo"
    policy_option: PolicyOption = None
    token_budget: TokenBudget = None
    executor: Executor = "openvino"
    weights: Weights = None
    kv: Kv = None
    kv_memory: KvMemory = None
    kv_host_memory: KvHostMemory = None
    max_model_len: MaxModelLen = None
    max_seqs: MaxSeqs = 256
    max_tokens: MaxTokens = 8192
    prefix_cache: PrefixCache = True
    threads: Threads = None
    device: Device = None
    tp: Tp = 1
    sp: Sp = 1
    pp: Pp = 1
    workers: Workers = "local"
    gpu_memory_utilization: GpuMemory = 0.9
    generation_config: GenerationConfig = "auto"
    on_worker_loss: OnWorkerLoss = "fail"
    speculate: Speculate = None
    draft_tokens: DraftTokens = 7
    adapter: Adapter = None
    adapters: AdaptersFolder = None
    max_adapter_rank: MaxAdapterRank = 256
