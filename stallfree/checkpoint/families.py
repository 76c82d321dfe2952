"""The table of supported model families: add yours here. A row says what all models of a family have in common, and what runs them.

It reads nothing: `dimensions.py` and the readers of files use it.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """What all models of one `model_type` have in common, and what reads and runs them.

    `gated`: the FFN has two matrices up (SwiGLU), otherwise one. `learned`: rows that a learned position table has beyond the
    context; None where positions are rotary. `tied`: whether the embedding is the LM head too, unless config.json says otherwise.
    `qkv_bias`: queries, keys and values have biases. `optional_bias`: config.json may give attention biases. `qk_norm`: queries and
    keys are normalised. `window`: which layers have config.json's sliding window: "", "all", or "listed" there. `gguf`: it is read
    from GGUF files. `openvino`: the OpenVINO executor runs it. `torch`: the class that runs it, as `module:Class` in
    `executors/torch`; empty for a family that is only simulated.
    """

    torch: str = ""
    openvino: bool = False
    gguf: bool = False
    gated: bool = True
    learned: int | None = None
    tied: bool = False
    qkv_bias: bool = False
    optional_bias: bool = False
    qk_norm: bool = False
    window: str = ""


FAMILIES = {
    "llama": Family("llama:Llama", openvino=True, gguf=True, optional_bias=True),
    "mistral": Family("llama:Llama", openvino=True, window="all"),
    "qwen2": Family("llama:Llama", openvino=True, gguf=True, qkv_bias=True, window="listed"),
    "qwen3": Family("llama:Llama", openvino=True, gguf=True, optional_bias=True, qk_norm=True, window="listed"),
    "mixtral": Family("mixtral:Mixtral", window="all"),
    "qwen3_moe": Family(qk_norm=True),
    "falcon": Family("falcon:Falcon", gated=False, tied=True),
    "opt": Family(gated=False, tied=True, learned=2),
}
