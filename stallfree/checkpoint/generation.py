"""The sampling values that a model's makers recommend: `generation_config.json` of a folder, `general.sampling.*` of a GGUF file.
It knows their names and ranges, and not how to sample.
"""

import json
from collections.abc import Mapping
from math import inf, isfinite
from pathlib import Path

from stallfree.checkpoint.dimensions import CheckpointError

EMBEDDED_SAMPLING: Mapping[str, float] = {"temperature": 0.2, "top_p": 0.9}
"""For SmolLM2-135M-Instruct, whose file has no recommendation: the values of the example on its model card."""

RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, inf),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.001, inf),
}
"""The recommendations that are followed, with their least and largest value. A `top_k` of -1 or 0 is off."""
GGUF = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}
"""GGUF's names after `general.sampling.`, with ours."""


def recommended(path: Path, metadata: Mapping[str, object] | None) -> dict[str, float]:
    """The recommendations for the checkpoint at `path`, by the names of `RANGES`. `"do_sample": false` is temperature 0.
    `metadata`: a GGUF file's, None for a folder. Raises CheckpointError for a value outside its range.
    """
    if metadata is not None:
        prefix = "general.sampling."
        return _checked({ours: metadata.get(prefix + name) for name, ours in GGUF.items()}, f"{path}: {prefix}*")
    file = path / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    sampling = _checked({name: values.get(name) for name in RANGES}, str(file))
    return sampling | {"temperature": 0.0} if values.get("do_sample") is False else sampling


def _checked(values: Mapping[str, object], where: str) -> dict[str, float]:
    sampling: dict[str, float] = {}
    for name, value in values.items():
        if value is None:
            continue
        least, most = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (isfinite(value) and least <= value <= most):
            limits = f"from {least:g} on" if most == inf else f"from {least:g} to {most:g}"
            raise CheckpointError(f"{where}: {name} is {value!r}, expected a number {limits}; correct the file, or remove it there")
        sampling[name] = max(0, int(value)) if name == "top_k" else float(value)
    return sampling
