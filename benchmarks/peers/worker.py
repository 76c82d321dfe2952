"""Shared by all workers: a job on standard input, one JSON line of seconds for each batch on standard output.

A job: {"model": path, "threads": n, "repeats": n, "batches": [{"name", "decodes", "context", "chunk"}, ...]}. A batch is one
iteration: `decodes` sequences get one token each, at positions around `context`, and a prompt of `chunk` tokens is prefilled from
its start; 0 is none. Workers run in environments of their own, so this module needs only the standard library.
"""

import json
import os
import random
import sys
from typing import Any

VOCABULARY = range(100, 40_000)

# Engines print on standard output too. From here on only `say` reaches it.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
_rng = random.Random(3)


def job() -> dict[str, Any]:
    return json.load(sys.stdin)


def say(**answer: Any) -> None:
    """`version="..."` once, then `batch=name, seconds=[...]`, one number for each repetition."""
    print(json.dumps(answer), file=_answers, flush=True)


def tokens(count: int) -> list[int]:
    """Random token ids: no two prompts share a prefix."""
    return [_rng.choice(VOCABULARY) for _ in range(count)]
