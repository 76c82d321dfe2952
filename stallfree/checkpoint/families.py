"""The table of supported model families: add yours here. A row says what all models of a family have in common, and what runs them.

It reads nothing: `dimensions.py` and the readers of files use it.
"""

from typing import NamedTuple


class Experts(NamedTuple):
    """A mixture of experts instead of the FFN, and the names of its matrices within a layer.

    `width`: the key of config.json for the channels of an expert. `router`: the matrix that chooses among them.
    `gate`, `up`, `down`: those of an expert, whose number takes the place of `{}`. `bias`: all of these have biases. `stacked`: a
    folder has them for all experts of a layer in one tensor. `clamped`: gpt-oss's own activation, instead of SwiGLU.
    """

    width: str = "intermediate_size"
    router: str = "mlp.gate"
    gate: str = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"
    bias: bool = False
    stacked: bool = False
    clamped: bool = False

    def matrices(self, expert: int) -> tuple[str, str, str]:
        """The names of an expert's gate, up and down."""
        return self.gate.format(expert), self.up.format(expert), self.down.format(expert)


class Family(NamedTuple):
    """What all models of one `model_type` have in common, and what reads and runs them.

    `gated`: the FFN has two matrices up (SwiGLU), otherwise one. `learned`: rows that a learned position table has beyond the
    context; None where positions are rotary. `tied`: whether the embedding is the LM head too, unless config.json says otherwise.
    `qkv_bias`: queries, keys and values have biases. `optional_bias`: config.json may give attention biases. `mlp_bias`: it may
    give the FFN's. `qk_norm`: queries and keys are normalised: each "head", or all of them as a "whole". `norms`: whether attention
    and FFN have a norm "before" them, "after", or "both". `gelu`: the gate is GELU (by tanh), not SiLU. `shifted`: a norm
    multiplies by 1 + weight. `fused`: the file has queries, keys and values in one matrix, and gate and up. `partial`: positions
    may turn a part of the head. `window`: which layers
    have config.json's sliding window: "", "all", "listed" there or "used" by all if it is used at all, or always by a "pattern":
    all layers except every `pattern`-th, unless config.json lists them. `local_base`: the rotary base in layers with a window, if
    they have their own and config.json does not say. `sinks`: each head of attention has a logit that no token belongs to.
    `experts`: the mixture that the FFN is. `gguf`: the name
    under which it is in GGUF files; `halves`: there, the two of each rotary pair of queries and keys are side by side. `openvino`:
    the OpenVINO executor runs it. `torch`: the class that runs it, as `module:Class` in `executors/torch`; empty for a family that
    is only simulated.
    """

    torch: str = ""
    openvino: bool = False
    gguf: str = ""
    halves: bool = False
    gated: bool = True
    learned: int | None = None
    tied: bool = False
    qkv_bias: bool = False
    optional_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""
    norms: str = "before"
    gelu: bool = False
    shifted: bool = False
    fused: bool = False
    partial: bool = False
    window: str = ""
    pattern: int = 0
    local_base: float = 0.0
    sinks: bool = False
    experts: Experts | None = None


LLAMA = Family("llama:Llama", openvino=True)
MIXTURE = Family("experts:Mixture", openvino=True)
FAMILIES = {
    "llama": LLAMA._replace(gguf="llama", halves=True, optional_bias=True, mlp_bias=True),
    "mistral": LLAMA._replace(window="all"),
    "qwen2": LLAMA._replace(gguf="qwen2", qkv_bias=True, window="listed"),
    "qwen3": LLAMA._replace(gguf="qwen3", optional_bias=True, qk_norm="head", window="listed"),
    "granite": LLAMA._replace(gguf="granite", halves=True, optional_bias=True, mlp_bias=True),
    "smollm3": LLAMA._replace(gguf="smollm3", halves=True, optional_bias=True, mlp_bias=True, tied=True, window="listed"),
    "olmo2": LLAMA._replace(gguf="olmo2", optional_bias=True, qk_norm="whole", norms="after"),
    "phi3": LLAMA._replace(gguf="phi3", fused=True, partial=True, window="all"),
    "gemma3_text": LLAMA._replace(
        gguf="gemma3", optional_bias=True, qk_norm="head", norms="both", gelu=True, shifted=True, tied=True, window="pattern",
        pattern=6, local_base=10000.0,
    ),
    "mixtral": MIXTURE._replace(
        gguf="llama", halves=True, window="all",
        experts=Experts(
            router="block_sparse_moe.gate", gate="block_sparse_moe.experts.{}.w1", up="block_sparse_moe.experts.{}.w3",
            down="block_sparse_moe.experts.{}.w2",
        ),
    ),
    "qwen3_moe": MIXTURE._replace(
        gguf="qwen3moe", optional_bias=True, qk_norm="head", window="used",
        experts=Experts(width="moe_intermediate_size"),
    ),
    "gpt_oss": MIXTURE._replace(
        gguf="gpt-oss", qkv_bias=True, optional_bias=True, window="pattern", pattern=2, sinks=True,
        experts=Experts(router="mlp.router", bias=True, stacked=True, clamped=True),
    ),
    "falcon": Family("falcon:Falcon", gated=False, tied=True),
    "opt": Family(gated=False, tied=True, learned=2),
}  # fmt: skip
