"""Packs matrices of four bits as other tools do: the inverse of `checkpoint/packing.py`."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from stallfree.checkpoint.packing import AWQ_ORDER
from tests.models import change_json

GROUP = 32
SCHEME = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": False}
CONFIGS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEME}},
        "ignore": ["lm_head"],
    },
}
"""`quantization_config` by method."""


def words(codes: np.ndarray, order=range(8)) -> np.ndarray:
    """Eight codes along the last axis in each int32 word."""
    split = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    return sum(split[..., k] << np.uint32(4 * place) for k, place in enumerate(order)).view(np.int32)


def stored(method: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, np.ndarray]:
    """What stands for a matrix: tensors by the ends of their names. `codes`: [out, in]; `scales`, `zeros`: [out, groups]."""
    if method == "awq":
        parts = {"qweight": words(codes.T, AWQ_ORDER), "qzeros": words(zeros.T, AWQ_ORDER), "scales": scales.T}
    elif method == "gptq":
        parts = {
            "qweight": words(codes.T.reshape(-1, 8, len(codes)).swapaxes(1, 2)),
            "qzeros": words(zeros.T - 1),
            "scales": scales.T,
        }
        parts["qweight"] = parts["qweight"].reshape(-1, len(codes))
    else:
        parts = {"weight_packed": words(codes), "weight_scale": scales, "weight_zero_point": words(zeros.T).T}
    return {name: np.ascontiguousarray(value) for name, value in parts.items()}


def numbers(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """What these stand for. `groups`: the group of each input, if those of a group are not side by side."""
    groups = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1]) if groups is None else groups
    return scales[:, groups] * (codes - zeros[:, groups].astype(np.float32))


def rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and zeros for a matrix [out, in]."""
    grouped = values.reshape(len(values), -1, GROUP)
    low, high = grouped.min(2), grouped.max(2)
    scales = ((high - low) / 15).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.rint(-low / scales), 1, 15)
    codes = np.clip(np.rint(grouped / scales[..., None] + zeros[..., None]), 0, 15).reshape(values.shape)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def pack_folder(folder: Path, method: str) -> dict[str, np.ndarray]:
    """Pack the matrices of a folder's layers. Returns them as numbers, by name."""
    tensors, dense = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts = rounded(tensors.pop(name))
        dense[name] = numbers(*parts)
        tensors |= {f"{name.removesuffix('weight')}{end}": value for end, value in stored(method, *parts).items()}
    save_file(tensors, folder / "model.safetensors")
    change_json(folder / "config.json", quantization_config=CONFIGS[method])
    return dense
