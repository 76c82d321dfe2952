"""LoRA adapters with random weights, written as the library PEFT writes them, and the models that they are equal to."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.checkpoint.adapter import PLACES, Adapter, module_shapes


def made_adapter(
    folder: Path,
    config: ModelConfig,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    seed: int = 0,
    **changes: object,
) -> Path:
    """Write an adapter for the model of `config`, in the layers of `layers_to_transform` or in all. It changes each output of
    its modules by about as much as the base model gives it. `changes`: keys of adapter_config.json; None leaves one out. A key of
    `rank_pattern` is the end of a module's name."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a/base",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    rng, shapes = np.random.default_rng(seed), module_shapes(config)
    ranks = dict(changes.get("rank_pattern") or {})
    layers = changes.get("layers_to_transform")
    tensors = {}
    for layer in range(config.num_layers) if layers is None else np.atleast_1d(layers).tolist():
        for module in modules:
            name, (out, inner) = f"model.layers.{layer}.{PLACES[module]}", shapes[module]
            own = next((own for end, own in ranks.items() if name.endswith(end)), rank)
            for half, shape, size in (("A", (own, inner), inner**-0.5), ("B", (out, own), 0.5 * own**-0.5)):
                values = rng.normal(0, size, shape).astype(np.float32)
                tensors[f"base_model.model.{name}.lora_{half}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def merged(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The model whose matrices are W + B A."""
    layers = range(checkpoint.config.num_layers)
    names = {f"model.layers.{i}.{place}.weight": (i, module) for i in layers for module, place in PLACES.items()}

    def read(name: str) -> np.ndarray:
        values = checkpoint.read(name)
        if name in names:
            layer, module = names[name]
            a, b = (half[0].astype(np.float64) for half in adapter.read(module, range(layer, layer + 1)))
            values = (values + b @ a).astype(np.float32)
        return values

    return replace(checkpoint, read=read)
