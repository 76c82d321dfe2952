"""From names to a running engine: finds the model, opens its checkpoint, makes executor, text, policy and engine. The one place
that knows them all; what each of them does is theirs.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stallfree import __version__, policies
from stallfree.checkpoint.fetch import cache_folder
from stallfree.core.plan import Capacity
from stallfree.core.record import Fingerprints, Run, StepRecord
from stallfree.core.scheduler import Limits
from stallfree.core.slo import Slo
from stallfree.engine import calibrate
from stallfree.engine.engine import Engine
from stallfree.engine.text import Text
from stallfree.executors.base import Executor
from stallfree.perf.fitted import Errors, Fitted

MOST_KV = 4 << 30
"""Bytes of KV cache that are taken unasked, at the most."""

SIMULATED = (0.008, 0.04, 0.005, 0.005, 0.0, 0.0)
"""What the simulated executor's iterations cost, as prices of the cost model."""

EXECUTORS = {"openvino": "runs a model on this machine's processor", "simulated": "sleeps as a cost model says; no model"}


@dataclass(frozen=True)
class Options:
    """What an engine is made of. `kv_memory` in bytes (None: a quarter of what is free, at most 4 GiB); `token_budget` and
    `max_model_len` in tokens (None: the policy's and the model's own); `threads` None: all cores; `slo`: latency targets in
    words, for policies that take them and to count late tokens with.
    """

    model: str | None = None
    executor: str = "openvino"
    policy: str = "sarathi"
    slo: str | None = None
    token_budget: int | None = None
    weights: str = "int8"
    kv: str = "u8"
    kv_memory: int | None = None
    max_model_len: int | None = None
    max_seqs: int = 256
    max_tokens: int = 8192
    prefix_cache: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class Assembled:
    """An engine, the `name` under which its model is served, what the model's weights are, in words, the latency targets that it
    is held to, if any, and the run that it begins.
    """

    engine: Engine
    name: str
    weights: str
    slo: Slo | None
    run: Run


def assemble(
    options: Options,
    *,
    record: Callable[[StepRecord], None] | None = None,
    fingerprints: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: calibrate.Progress = lambda done, of: None,
) -> Assembled:
    """Raises ValueError, FetchError or MemoryError with a message for the user; what needs no model is checked first.

    `fingerprints`: records are to carry what replay needs. `progress` is told of the calibration, if one is needed.
    """
    known = policies.takes(options.policy)
    targets = None if options.slo is None else Slo.parse(options.slo)
    chosen: dict[str, object] = {"token_budget": options.token_budget}
    policies.check(options.policy, **chosen)
    if "cost" not in known:
        policies.load(options.policy, **chosen)
    limits = Limits(options.max_seqs, options.max_tokens)
    if options.executor not in EXECUTORS:
        near = policies.nearest(options.executor, EXECUTORS)
        raise ValueError(f"unknown executor {options.executor!r}{near}; known: {', '.join(EXECUTORS)}")
    executor, text, name, weights, key = (_simulated if options.executor == "simulated" else _openvino)(options, say)
    cost = None
    if "cost" in known:
        cost = _cost(executor, key, say, progress)
        chosen["cost"] = cost
    if "slo" in known:
        chosen["slo"] = targets
    policy = policies.load(options.policy, **chosen)
    capacity = executor.capacity
    prints = Fingerprints(capacity.block_size, secrets.token_bytes(16)) if fingerprints else None
    engine = Engine(executor, text, policy, limits, reuse=options.prefix_cache, record=record, prints=prints)
    slo = getattr(policy, "slo", targets)
    run = Run(
        options.policy,
        capacity,
        limits,
        options.prefix_cache,
        "" if slo is None else str(slo),
        {"token_budget": options.token_budget} if options.token_budget is not None else {},
        None if cost is None else cost.state(),
    )
    return Assembled(engine, name, weights, slo, run)


def recalibrate(options: Options, say: Callable[[str], None], progress: calibrate.Progress) -> tuple[Fitted, Errors, Path]:
    """Calibrate the model of `options` on this machine again; the cost model, how well it fits, and where it is remembered."""
    executor, _, _, _, key = _openvino(options, say)
    try:
        model, errors = calibrate.calibrate(executor, progress)
    finally:
        executor.close()
    folder = cache_folder() / "calibration"
    return model, errors, calibrate.remember(model, errors, key or {}, folder, executor.capacity)


def _cost(executor: Executor, key: Mapping[str, object] | None, say: Callable[[str], None], progress: calibrate.Progress) -> Fitted:
    """The cost model of `executor`: the one remembered for `key`, or a new one, remembered then."""
    if key is None:
        return Fitted(SIMULATED)
    folder = cache_folder() / "calibration"
    found = calibrate.remembered(key, folder)
    if found is not None:
        return found
    say("calibrating: timing iterations on this machine, once (`stallfree calibrate` does it again)")
    model, errors = calibrate.calibrate(executor, progress)
    calibrate.remember(model, errors, key, folder, executor.capacity)
    return model


Made = tuple[Executor, Text, str, str, dict[str, object] | None]
"""An executor, its text, the model's name, its weights in words, and what its speed depends on (None: nothing to measure)."""


def _openvino(options: Options, say: Callable[[str], None]) -> Made:
    from stallfree.checkpoint import open_checkpoint
    from stallfree.checkpoint.fetch import EMBEDDED, locate
    from stallfree.executors.openvino import OpenVINOExecutor, available_bytes

    path = locate(options.model, say)
    checkpoint = open_checkpoint(path)
    text = Text.from_folder(path) if checkpoint.metadata is None else Text.from_gguf(checkpoint.metadata)
    say(f"loading {path.name}")
    executor = OpenVINOExecutor(
        checkpoint,
        weights=options.weights,
        kv=options.kv,
        kv_bytes=options.kv_memory or min((available_bytes() or MOST_KV) // 4, MOST_KV),
        max_model_len=options.max_model_len,
        threads=options.threads,
    )
    name = EMBEDDED if options.model is None else options.model if not Path(options.model).exists() else path.stem
    stat = path.stat()
    key = calibrate.machine() | {
        "executor": "openvino",
        "model": [path.name, stat.st_size, stat.st_mtime_ns],
        "weights": options.weights,
        "kv": options.kv,
        "threads": options.threads,
        "max_model_len": executor.capacity.max_model_len,
        "release": __version__,
    }
    return executor, text, name, f"{options.weights} weights, {options.kv} KV", key


def _simulated(options: Options, say: Callable[[str], None]) -> Made:
    from stallfree.executors.simulated import SimulatedExecutor

    length = options.max_model_len or 8192
    capacity = Capacity(block_size=32, num_blocks=(options.kv_memory or 1 << 30) // (32 * 13_000), max_model_len=length)
    text = bytes_as_text()
    return SimulatedExecutor(capacity, text.encode("abcdefghijklmnopqrstuvwxyz ")), text, "simulated", "none", None


def bytes_as_text() -> Text:
    """The text of a model that there is not: a token is a byte, and a conversation is its messages, one a line."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Text(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ())
