"""An iteration's time by the formulas of DistServe's simulator, which are fitted to its engine or to vLLM, from a JSON file.

In milliseconds, prompts take a + b x tokens + c x (sum of squared lengths), and decodes take a + b x context + c x batch. From a
batch of `decoding_large_small_bs_threshold` on, decodes have other coefficients (LLMServe/DistServe, simdistserve). Those engines
run prompts or decodes, never both. Here an iteration with both takes the larger constant and the variable parts of both. It knows
only the models in the file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stallfree.core.nearest import nearest
from stallfree.core.plan import Shape, parts


class Profiled:
    """The engine in `file` for `model` (the last part of its name) at `tp`. Raises ValueError for what the file lacks."""

    def __init__(self, file: Path, model: str, tp: int):
        self._prefill, self._small, self._large, self._threshold = _read(file, model, tp)

    def seconds(self, shape: Shape) -> float:
        return self.batch(*parts(shape))

    def batch(self, decodes: int, context: int, chunks: Shape) -> float:
        first, per_token, per_pair = self._prefill
        constant = more = 0.0
        if chunks:
            constant = first
            # A chunk takes the time of the prompt up to its end, less that of the prompt up to its begin.
            more = sum([per_token * n + per_pair * ((start + n) ** 2 - start**2) for start, n in chunks])
        if decodes:
            base, per_context, per_request = self._large if decodes >= self._threshold else self._small
            constant = max(constant, base)
            more += per_context * context + per_request * decodes
        return (constant + more) / 1000


def _read(file: Path, model: str, tp: int) -> tuple[Sequence[float], Sequence[float], Sequence[float], int]:
    try:
        profiles: Mapping[str, Mapping[str, Any]] = json.loads(file.read_text())
        models = {name.rpartition("/")[2].lower(): profile for name, profile in profiles.items()}
        if model.lower() not in models:
            raise ValueError(f"it has no {model}{nearest(model, models)}; it has {', '.join(models)}")
        split = models[model.lower()]
        if str(tp) not in split:
            raise ValueError(f"it has {model} at TP {', '.join(split)}, not at {tp}")
        profile = split[str(tp)]
        rows = [[float(value) for value in profile[key]] for key in ("prefill", "decoding_smallbs", "decoding_largebs")]
        if any(len(row) != 3 for row in rows):
            raise ValueError(f"{model} at TP {tp} needs three coefficients in each list")
        return rows[0], rows[1], rows[2], int(profile["decoding_large_small_bs_threshold"])
    except OSError as error:
        raise ValueError(f"the engine {file} cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the engine {file} is no DistServe profile: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"the engine {file}: {error}") from None
