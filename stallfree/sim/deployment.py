"""What is simulated, in plain values that fit on a command line, in a file, or through a pipe to another process. It does not know
what they mean; `simulator` does.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deployment:
    """`model`: a built-in name or a config.json. `hardware`: a device's name or its TOML. `tp`: devices that share each layer;
    `pp`: pipeline stages; `sp`: groups of `tp` devices that share each iteration's tokens, and the KV. `weights`, `kv`:
    precisions. `engine`: what launches the kernels (`perf.roofline.ENGINES`), or a file with an engine's fitted times
    (`perf.profiled`). `node`: devices used of each node (None: all). `network`: between nodes (None: the device's first).

    `policy`: by name, with its own options (`policy_option`, each NAME=VALUE; `token_budget` for short). `slo`: in words,
    perhaps of several classes. `tenant_weights`: of tenants with another weight than 1, in words (`workload.mix.weights`).
    `max_seqs` requests run at once; an iteration has at most `max_tokens`, a request `max_model_len` tokens (None: the model's
    context). KV is in blocks of `block_size` tokens; it gets what the weights leave of `gpu_memory_utilization`, a share of the
    device's memory. An admission leaves the share `watermark` of it free. `max_output`: the tokens that requests ask for, which
    matters if the policy reserves KV for them (None: the actual output). `prefix_cache`: equal prefixes share KV; `router`: for the
    `replicas`. `prefill_replicas`: how many of them compute prompts, or have large chunks, if `policy` is a system of two kinds of
    replicas (`sim.systems`; None: half). `rank`: the ranks of adapters, in turn, in words (None: there are none);
    `adapter_modules`: what they change (`perf.adapters.MODULES`). `draft_acceptance`: how likely a guessed token is right (None:
    nothing is guessed); `draft_tokens`: the most guesses for a stream in an iteration; `draft_model`: who guesses, with its time on
    the same devices (None: guesses cost nothing). `on_late`: requests whose first token would come too late by the policy's
    forecast are refused ("refuse"), or served ("serve").
    """

    model: str | None = None
    hardware: str = "a100-80g"
    tp: int = 1
    pp: int = 1
    sp: int = 1
    weights: str = "fp16"
    kv: str = "fp16"
    engine: str = "vllm-2026"
    node: int | None = None
    network: str | None = None
    policy: str = "slo"
    policy_option: list[str] | None = None
    token_budget: int | None = None
    slo: str | None = None
    tenant_weights: str | None = None
    max_seqs: int = 256
    max_tokens: int = 8192
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    watermark: float = 0.01
    max_output: int | None = None
    replicas: int = 1
    router: str = "round-robin"
    prefill_replicas: int | None = None
    prefix_cache: bool = False
    rank: str | None = None
    adapter_modules: str = "attention"
    draft_acceptance: float | None = None
    draft_tokens: int = 7
    draft_model: str | None = None
    on_late: str = "serve"

    @property
    def devices(self) -> int:
        """How many devices each replica takes."""
        return self.tp * self.pp * self.sp


@dataclass(frozen=True, slots=True)
class Split:
    """Two pools: `prefill` replicas compute prompts, `decode` replicas decode. `pairing`: who computes a prompt and who decodes
    (`sim.pairings`); or which requests move between any two replicas (`sim.movers`), by the targets of `prefill`. They are on
    `nodes` nodes of `per_node` devices each, joined by `link` (`perf.links`). `near`: KV stays in a node that also has a replica it
    may go to, and goes over the devices' own links.
    """

    prefill: Deployment
    decode: Deployment
    pairing: str = "distserve"
    link: str = "ib-200g"
    nodes: int = 1
    per_node: int = 8
    near: bool = False
