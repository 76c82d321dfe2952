"""Hugging Face folders: config.json describes the model, safetensors files hold its tensors.

It never unpickles: a folder with only PyTorch's .bin files is refused. It does not know tokenizers.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from stallfree.checkpoint import Checkpoint
from stallfree.checkpoint.blocks import Blocks
from stallfree.checkpoint.config import (
    CLAMP,
    ModelConfig,
    check,
    check_tensors,
    padded,
    rotary_frequencies,
    rotary_limit,
    rotary_scale,
)
from stallfree.checkpoint.dimensions import CheckpointError, Dimensions, dimensions, positive, size
from stallfree.checkpoint.families import FAMILIES
from stallfree.checkpoint.folding import folded, folded_blocks, fused_rows, gemma, granite
from stallfree.checkpoint.packed import PackedMatrices
from stallfree.checkpoint.packing import Packing
from stallfree.checkpoint.stacked import Part, part_blocks, read_part, unstacked
from stallfree.checkpoint.tensor_file import TYPES, Entry, read_header, read_tensor

INDEX = "model.safetensors.index.json"

PART = re.compile(r"model-\d+-of-\d+\.safetensors")

OTHERS = ("consolidated", "adapter")
"""Beginnings of the names of files that do not hold a whole model under its tensors' names."""

UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention", "clip_qkv")
"""Values of config.json that change the answers and that no executor computes."""

Tensors = dict[str, Entry]
"""Where each tensor is, by its name."""


def read_folder(path: Path) -> Checkpoint:
    """Read config.json and the headers of a folder's safetensors files. Raises CheckpointError if they cannot be used."""
    config, files = _config(path), weights(path)
    packing = _packing(path, config.family)
    tensors, packed = _index(path, files), None
    if packing is not None:
        packed = PackedMatrices(packing, config, tensors, str(path))
        tensors = packed.rest
    if FAMILIES[config.family].fused:
        tensors = _cut(config, tensors)
    stacked: dict[str, Part] = {}
    if (mixture := config.mixture) is not None and mixture.stacked:
        tensors, stacked = unstacked(config, mixture, tensors)
    if config.tie_embeddings is False and "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
        raise CheckpointError(f"{path}: 'lm_head.weight' is missing and config.json does not tie it to the embeddings")
    shapes = {name: shape for name, (_, _, shape, _) in tensors.items()} | {name: part.shape for name, part in stacked.items()}
    check_tensors(config, shapes if packed is None else shapes | packed.shapes, str(path))
    read = partial(folded, config, partial(_read, tensors, stacked, packed))
    codes = {name: "e2m1" for name, part in stacked.items() if part.scales} if packed is None else packed.codes
    blocks = partial(folded_blocks, config, partial(_blocks, stacked) if packed is None else packed.blocks)
    return Checkpoint(path, config, read, None, tuple(files), codes, blocks)


def _read(tensors: Tensors, stacked: dict[str, Part], packed: PackedMatrices | None, name: str) -> np.ndarray:
    if packed is not None and name in packed.shapes:
        return packed.dense(name)
    return read_part(stacked[name]) if name in stacked else read_tensor(tensors, name)


def _blocks(stacked: dict[str, Part], name: str) -> Blocks:
    return part_blocks(stacked[name])


def _packing(path: Path, family: str) -> Packing | None:
    """How matrices are packed, by config.json; None if they are not."""
    quantised = quantisation(path)
    return Packing.of(quantised, str(path / "config.json")) if quantised and not _mxfp4(family, quantised) else None


def quantisation(path: Path) -> object:
    """What a folder's config.json says of packed matrices; None for nothing. Raises CheckpointError as `read_json` does."""
    return read_json(path / "config.json").get("quantization_config")


def read_json(path: Path) -> dict[str, object]:
    """The object in a JSON file. Raises CheckpointError for anything else."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


def _config(path: Path) -> ModelConfig:
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; a Hugging Face folder needs it (is {path} the right folder?)")
    values, source = read_json(file), str(file)
    served = [name for name, family in FAMILIES.items() if family.torch]
    if (kind := values.get("model_type")) not in served:
        raise CheckpointError(f"{source}: model_type {kind!r} is not supported; supported are {', '.join(served)}")
    sizes, bos = dimensions(values, source), values.get("bos_token_id")
    config = ModelConfig(
        **asdict(sizes)
        | (_falcon(values, source) if sizes.family == "falcon" else _llama(values, sizes.family, source))
        | _rotary(values, sizes, source),
        windows=_windows(values, sizes, source),
        factors=_factors(values, sizes, source),
        norm_shift=float(FAMILIES[sizes.family].shifted),
        unrotated=_unrotated(values, sizes, source),
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=_eos(path, values),
    )
    return check(config, source)


def _mxfp4(family: str, quantised: object) -> bool:
    """Whether experts are in MXFP4, and nothing else is quantised."""
    mixture = FAMILIES[family].experts
    return mixture is not None and mixture.stacked and isinstance(quantised, dict) and quantised.get("quant_method") == "mxfp4"


def _llama(values: dict[str, object], family: str, source: str) -> dict[str, Any]:
    """`norm_eps`, and which biases the model has. Raises CheckpointError for an unsupported activation, and for what would change
    its answers and is not computed."""
    key, wanted = ("hidden_activation", "gelu_pytorch_tanh") if FAMILIES[family].gelu else ("hidden_act", "silu")
    if (activation := values.get(key, wanted)) != wanted:
        raise CheckpointError(f"{source}: {key} {activation!r} is not supported; {wanted} is")
    for name in UNSUPPORTED:
        if values.get(name):
            raise CheckpointError(f"{source}: {name} {values[name]!r} is not supported; take a model without it")
    bias = FAMILIES[family].optional_bias and bool(values.get("attention_bias", False))
    return {
        "norm_eps": positive(values, "rms_norm_eps", source),
        "qkv_bias": bias or FAMILIES[family].qkv_bias,
        "output_bias": bias,
        "mlp_bias": FAMILIES[family].mlp_bias and bool(values.get("mlp_bias", False)),
        "shares_of_all": family == "qwen3_moe" and not values.get("norm_topk_prob", False),
        "clamp": tuple(
            positive(values, name, source, usual) for name, usual in zip(("swiglu_alpha", "swiglu_limit"), CLAMP, strict=True)
        ),
    }


def _falcon(values: dict[str, object], source: str) -> dict[str, Any]:
    """As `_llama`, for Falcon. Raises CheckpointError for an unsupported variant."""
    new = bool(values.get("new_decoder_architecture", False))
    if values.get("alibi", False):
        raise CheckpointError(f"{source}: alibi positions are not supported; rotary ones are")
    if not new and not values.get("parallel_attn", True):
        raise CheckpointError(f"{source}: parallel_attn false is not supported; Falcon's released models have it true")
    if (activation := values.get("activation", "gelu")) != "gelu":
        raise CheckpointError(f"{source}: activation {activation!r} is not supported; gelu is")
    return {
        "norm_eps": positive(values, "layer_norm_epsilon", source, 1e-5),
        "mlp_bias": bool(values.get("bias", False)),
        "own_norm": new and values.get("num_ln_in_parallel_attn") != 1,
    }


def _rotary(values: dict[str, object], sizes: Dimensions, source: str) -> dict[str, Any]:
    """`inv_freq`, `local_inv_freq`, `rope_scale` and `max_model_len` of a ModelConfig. Raises CheckpointError for unsupported
    positions."""
    scaling, longest, head_dim = (
        values.get("rope_parameters") or values.get("rope_scaling") or {},
        sizes.max_model_len,
        sizes.head_dim,
    )
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{source}: rope scaling is {scaling!r}, expected an object")
    local: dict[str, Any] = {"rope_theta": values.get("rope_local_base_freq")}
    if "full_attention" in scaling:  # one for each kind of layer
        scaling, local = scaling["full_attention"], scaling.get("sliding_attention", {})
    part = positive({"part": scaling.get("partial_rotary_factor", values.get("partial_rotary_factor"))}, "part", source, 1.0)
    rotated = int(head_dim * part)
    if part != 1 and not FAMILIES[sizes.family].partial:
        raise CheckpointError(f"{source}: rotary positions on a part of the head (partial_rotary_factor) are not supported")
    if part > 1 or rotated % 2:
        raise CheckpointError(f"{source}: partial_rotary_factor {part} of a head of {head_dim} is no even number of dimensions")
    theta = positive({"rope_theta": scaling.get("rope_theta") or values.get("rope_theta")}, "rope_theta", source, 10000.0)
    if (original := values.get("original_max_position_embeddings")) is not None:
        scaling = scaling | {"original_max_position_embeddings": original}
    own: tuple[float, ...] = ()
    if base := FAMILIES[sizes.family].local_base:
        own = rotary_frequencies(head_dim, positive(local, "rope_theta", source, base), {}, source, longest)
        if local.get("rope_type", "default") != "default":
            raise CheckpointError(f"{source}: rope scaling {local['rope_type']!r} in layers with a window is not supported")
    return {
        "inv_freq": padded(rotary_frequencies(rotated, theta, scaling, source, longest), head_dim),
        "local_inv_freq": own,
        "rope_scale": rotary_scale(scaling, source, longest),
        "max_model_len": rotary_limit(scaling, source, longest),
    }


def _factors(values: dict[str, object], sizes: Dimensions, source: str) -> tuple[tuple[str, float], ...]:
    """`factors` of a ModelConfig."""
    if sizes.family == "granite":
        names = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")
        return granite(sizes, *(positive(values, name, source, 1.0) for name in names))
    if sizes.family == "gemma3_text":
        return gemma(sizes, positive(values, "query_pre_attn_scalar", source, 256))
    return ()


def _unrotated(values: dict[str, object], sizes: Dimensions, source: str) -> tuple[int, ...]:
    """The layers without positions: those with a 0 in SmolLM3's list, or else every fourth."""
    if sizes.family != "smollm3":
        return ()
    every = size(values, "no_rope_layer_interval", source, 4)
    listed = values.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(sizes.num_layers)]
    if not isinstance(listed, list) or len(listed) < sizes.num_layers:
        raise CheckpointError(f"{source}: 'no_rope_layers' is {str(listed)[:80]}, expected a number for each layer")
    return tuple(layer for layer, turns in enumerate(listed[: sizes.num_layers]) if not turns)


def _windows(values: dict[str, object], sizes: Dimensions, source: str) -> tuple[int, ...]:
    """Per layer, the sliding window in tokens, or 0. Mistral has one for all layers. Qwen has one only with `use_sliding_window`:
    in all layers of a mixture; otherwise in those that `layer_types` names, or else from `max_window_layers` on."""
    num_layers, layers, pattern = sizes.num_layers, FAMILIES[sizes.family].window, FAMILIES[sizes.family].pattern
    if not layers or values.get("sliding_window") is None:
        return (0,) * num_layers
    if layers == "pattern" and not isinstance(values.get("layer_types"), list):
        every, window = size(values, "sliding_window_pattern", source, pattern), size(values, "sliding_window", source)
        return tuple(window if (layer + 1) % every else 0 for layer in range(num_layers))
    if layers in ("listed", "used") and not values.get("use_sliding_window", False):
        return (0,) * num_layers
    window = size(values, "sliding_window", source)
    if layers in ("all", "used"):
        return (window,) * num_layers
    types = values.get("layer_types")
    if isinstance(types, list) and len(types) == num_layers:
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)
    first = values.get("max_window_layers", num_layers)
    if not isinstance(first, int):
        raise CheckpointError(f"{source}: 'max_window_layers' is {first!r}, expected a whole number")
    return tuple(window if layer >= first else 0 for layer in range(num_layers))


def _cut(config: ModelConfig, tensors: Tensors) -> Tensors:
    """Rows of fused matrices as tensors of their own."""
    cut: Tensors = {}
    for name, (file, kind, shape, offset) in tensors.items():
        module = name.split(".")[-2] if "." in name else ""
        parts = fused_rows(config).get(module)
        if parts is None or kind not in TYPES or sum(parts.values()) != shape[0]:
            cut[name] = file, kind, shape, offset
            continue
        row = np.dtype(TYPES[kind]).itemsize * int(np.prod(shape[1:]))
        for part, rows in parts.items():
            cut[name.replace(module, part)] = file, kind, (rows, *shape[1:]), offset
            offset += rows * row
    return cut


def _eos(path: Path, values: dict[str, object]) -> tuple[int, ...]:
    """The tokens that end a reply, by generation_config.json, or else by config.json."""
    generation = path / "generation_config.json"
    eos = (read_json(generation).get("eos_token_id") if generation.is_file() else None) or values.get("eos_token_id")
    tokens = eos if isinstance(eos, list) else [eos]
    return tuple(t for t in tokens if isinstance(t, int))


def indexed(folder: Path) -> dict[str, str] | None:
    """The file, relative to the folder, that `model.safetensors.index.json` names for each tensor; None without an index. Raises
    CheckpointError for an index that cannot be used."""
    file = folder / INDEX
    if not file.is_file():
        return None
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{file}: 'weight_map' is no object that names a file for each tensor; fetch the file again")
    for name in names.values():
        # Lexically: a hub's cache has links that lead out of the folder.
        if (path := PurePosixPath(name)).is_absolute() or ".." in path.parts or "\\" in name or path.suffix != ".safetensors":
            raise CheckpointError(f"{file}: {name!r} is no safetensors file of the folder; take the model from somewhere else")
    return names


def weights(folder: Path) -> list[Path]:
    """The files that hold the model of a folder: those that its index names; or else model.safetensors; or else numbered parts.
    Other files hold the same model in another form (consolidated), or an adapter. Raises CheckpointError if there are none, or if
    one is missing.
    """
    names = indexed(folder)
    if names is not None:
        files = [folder / name for name in sorted(set(names.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            what = f"names {missing[0]}, which is not there; the model is incomplete, fetch it again"
            raise CheckpointError(f"{folder / INDEX}: {what}")
        return files
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    files = sorted(folder.glob("*.safetensors"))
    if parts := [file for file in files if PART.fullmatch(file.name)]:
        return parts
    if own := [file for file in files if not file.name.startswith(OTHERS)]:
        return own
    others = [file.name for file in files] or sorted(f.name for kind in ("*.bin", "*.pt", "*.pth") for f in folder.glob(kind))
    why = "which holds no whole model in this form" if files else "and pickled weights are never loaded: they can run code"
    what = f"only {others[0]}, {why}" if others else "no weights"
    raise CheckpointError(f"{folder}: no *.safetensors file of a model, {what}; take a safetensors version of the model")


def _index(folder: Path, files: Sequence[Path]) -> Tensors:
    """Every tensor of the folder: file, type, shape and the offset of its bytes. If several files have a tensor, the index says
    which one counts."""
    names = indexed(folder) or {}
    tensors: Tensors = {}
    for file in files:
        header = read_header(file)
        tensors |= {name: entry for name, entry in header.items() if name not in names or folder / names[name] == file}
    return tensors
