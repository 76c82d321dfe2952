"""How to sample from a model, as its makers recommend: `generation_config.json` of a folder, `general.sampling.*` of a GGUF file.
It knows their names and ranges, and nothing of sampling.
"""

import json
from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path

from stallfree.checkpoint.dimensions import CheckpointError

EMBEDDED_SAMPLING: Mapping[str, float] = {"temperature": 0.2, "top_p": 0.9}
"""For SmolLM2-135M-Instruct, whose file says nothing of it: what the example on its model card uses."""

RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, inf),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.001, inf),
}
"""The recommendations that are followed, with the least and the largest value; -1 and 0 for `top_k` are off."""
GGUF = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}
"""GGUF's names behind `general.sampling.`, with ours."""


def recommended(path: Path, metadata: Mapping[str, object] | None) -> dict[str, float]:
    """What is recommended for the checkpoint at `path`, by the names of `RANGES`; empty if nothing is. `"do_sample": false` is
    temperature 0. `metadata` are a GGUF file's, None for a folder. Raises CheckpointError for a value that cannot be.
    """
    if metadata is not None:
        prefix = "general.sampling."
        return _checked({ours: metadata.get(prefix + name) for name, ours in GGUF.items()}, f"{path}: {prefix}*")
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    found = _checked({name: told.get(name) for name in RANGES}, str(file))
    return found | {"temperature": 0.0} if told.get("do_sample") is False else found


def _checked(told: Mapping[str, object], where: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in told.items():
        if value is None:
            continue
        least, most = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (isfinite(value) and least <= value <= most):
            limits = f"from {least:g} on" if most == inf else f"from {least:g} to {most:g}"
            raise CheckpointError(f"{where}: {name} is {value!r}, expected a number {limits}; correct the file, or remove it there")
        found[name] = max(0, int(value)) if name == "top_k" else float(value)
    return found
