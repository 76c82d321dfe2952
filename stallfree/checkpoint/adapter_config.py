"""adapter_config.json of a PEFT folder: the rank and scale of each module, and what would make the adapter compute something else.

Patterns in it are regular expressions, and are run as they are: open only folders that you trust as much as a model. It knows
nothing of the file with the weights.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from stallfree.checkpoint.dimensions import CheckpointError
from stallfree.checkpoint.safetensors import read_json

Value = TypeVar("Value", int, float)

CONFIG = "adapter_config.json"

UNSUPPORTED = {
    "use_dora": "DoRA also scales each row of the matrix",
    "lora_bias": "biases are not supported",
    "use_qalora": "QALoRA pools the inputs of A",
    "alora_invocation_tokens": "an activated LoRA changes only a part of the prompt",
    "modules_to_save": "whole matrices are not supported",
    "trainable_token_indices": "embeddings are not supported",
    "target_parameters": "parameters outside of linear layers are not supported",
    "layer_replication": "repeated layers are not supported",
}
"""Keys that change what the adapter computes, and why any value but an empty one is refused."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model as it is. The others (PiSSA, OLoRA, CorDA, LoftQ) take a part out of its
matrices before training, and the folder does not say which part (PEFT, tuners/lora/layer.py)."""

MERGE = "merge it into its base model (peft's merge_and_unload) and serve the result"

AGAIN = "save the adapter again with peft"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What counts in the configuration. Modules have full names, `model.layers.3.self_attn.q_proj`.

    `rank_patterns`, `alpha_patterns`: ranks and alphas of modules that differ from `rank` and `alpha`; in adapter_config.json, a
    key is the module's name, its end after a dot, or a regular expression for either. `root`: scales are divided by the root of the
    rank. `targets` and `excluded`: the ends of modules' names from a dot on, or a regular expression for a whole name; None if the
    configuration does not say. `layers`: None for all.
    """

    rank: int
    alpha: float
    root: bool
    rank_patterns: tuple[tuple[re.Pattern[str], int], ...]
    alpha_patterns: tuple[tuple[re.Pattern[str], float], ...]
    targets: re.Pattern[str] | tuple[str, ...] | None
    excluded: re.Pattern[str] | tuple[str, ...] | None
    layers: frozenset[int] | None

    def targeted(self, layer: int, name: str) -> bool:
        """Whether PEFT would give the module an adapter."""
        if self.excluded is not None and _names(self.excluded, name):
            return False
        return (self.targets is None or _names(self.targets, name)) and (self.layers is None or layer in self.layers)

    def rank_of(self, name: str) -> int:
        return _matching(self.rank_patterns, name, self.rank)

    def scale(self, name: str, rank: int) -> float:
        """The factor on B A: alpha / rank, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732)."""
        return _matching(self.alpha_patterns, name, self.alpha) / (math.sqrt(rank) if self.root else rank)


def read_config(folder: Path) -> AdapterConfig:
    """Read adapter_config.json. Raises CheckpointError if it is missing or damaged, or describes what is not supported."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; a PEFT folder needs it (is {folder} the right folder?)")
    values = read_json(file)
    _check_supported(file, values)
    rank, alpha, layers = values.get("r"), values.get("lora_alpha"), values.get("layers_to_transform")
    if not _whole(rank) or rank < 1:
        raise _refused(file, "r", rank, "expected a whole number above 0", AGAIN)
    if not _number(alpha):
        raise _refused(file, "lora_alpha", alpha, "expected a number", AGAIN)
    listed = [layers] if _whole(layers) else layers or []
    if not isinstance(listed, list) or not all(map(_whole, listed)):
        raise _refused(file, "layers_to_transform", layers, "expected numbers of layers", AGAIN)
    return AdapterConfig(
        rank,
        alpha,
        bool(values.get("use_rslora")),
        _patterns(file, "rank_pattern", values),
        _patterns(file, "alpha_pattern", values),
        _modules(file, "target_modules", values),
        _modules(file, "exclude_modules", values),
        frozenset(listed) if listed else None,
    )


def _check_supported(file: Path, values: Mapping[str, Any]) -> None:
    if (kind := values.get("peft_type")) != "LORA":
        raise _refused(file, "peft_type", kind, "only LORA is supported", MERGE)
    for key, why in UNSUPPORTED.items():
        if value := values.get(key):
            raise _refused(file, key, value, why, MERGE)
    if (bias := values.get("bias")) not in ("none", None):
        raise _refused(file, "bias", bias, "biases are not supported", MERGE)
    if (start := values.get("init_lora_weights")) not in PLAIN_STARTS:
        way = f"save it with path_initial_model_for_weight_conversion, or {MERGE}"
        raise _refused(file, "init_lora_weights", start, "such an adapter belongs to a base model that was changed, too", way)


def _patterns(file: Path, key: str, values: Mapping[str, Any]) -> tuple[tuple[re.Pattern[str], Any], ...]:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict) or not all(map(_number, patterns.values())):
        raise _refused(file, key, patterns, "expected an object of numbers", AGAIN)
    return tuple((_compiled(file, key, rf"(.*\.)?({pattern})"), value) for pattern, value in patterns.items())


def _modules(file: Path, key: str, values: Mapping[str, Any]) -> re.Pattern[str] | tuple[str, ...] | None:
    """What a key that names modules says: a list of names, or a regular expression. "all-linear" says nothing: the modules that an
    adapter can change here are all linear."""
    modules = values.get(key)
    if modules is None or modules == "all-linear":
        return None
    if isinstance(modules, str):
        return _compiled(file, key, modules)
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise _refused(file, key, modules, "expected a list of names or a regular expression", AGAIN)
    return tuple(f".{name}" for name in modules)


def _names(modules: re.Pattern[str] | tuple[str, ...], name: str) -> bool:
    if isinstance(modules, re.Pattern):
        return modules.fullmatch(name) is not None
    return f".{name}".endswith(modules)


def _matching(patterns: tuple[tuple[re.Pattern[str], Value], ...], name: str, default: Value) -> Value:
    """The value of the first pattern that matches, as PEFT looks it up."""
    return next((value for pattern, value in patterns if pattern.fullmatch(name)), default)


def _compiled(file: Path, key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refused(file, key, pattern, f"not a regular expression ({error})", AGAIN) from None


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refused(file: Path, key: str, value: object, why: str, way: str) -> CheckpointError:
    return CheckpointError(f"{file}: {key} is {repr(value)[:120]}, {why}; {way}")
