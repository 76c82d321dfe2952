"""From names to a running engine: finds the model, opens its checkpoint, makes executor, text, policy and engine. The one place
that knows them all; what each of them does is theirs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stallfree import policies
from stallfree.core.plan import Capacity
from stallfree.core.record import StepRecord
from stallfree.core.scheduler import Limits
from stallfree.engine.engine import Engine
from stallfree.engine.text import Text
from stallfree.executors.base import Executor

MOST_KV = 4 << 30
"""Bytes of KV cache that are taken unasked, at the most."""

EXECUTORS = {"openvino": "runs a model on this machine's processor", "simulated": "sleeps as a cost model says; no model"}


@dataclass(frozen=True)
class Options:
    """What an engine is made of. `kv_memory` in bytes (None: a quarter of what is free, at most 4 GiB); `token_budget` and
    `max_model_len` in tokens (None: the policy's and the model's own); `threads` None: all cores.
    """

    model: str | None = None
    executor: str = "openvino"
    policy: str = "sarathi"
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
    """An engine, the `name` under which its model is served, and what the model's weights are, in words."""

    engine: Engine
    name: str
    weights: str


def assemble(
    options: Options, *, record: Callable[[StepRecord], None] | None = None, say: Callable[[str], None] = lambda line: None
) -> Assembled:
    """Raises ValueError, FetchError or MemoryError with a message for the user; what needs no model is checked first."""
    policy = policies.load(options.policy, token_budget=options.token_budget)
    limits = Limits(options.max_seqs, options.max_tokens)
    if options.executor not in EXECUTORS:
        near = policies.nearest(options.executor, EXECUTORS)
        raise ValueError(f"unknown executor {options.executor!r}{near}; known: {', '.join(EXECUTORS)}")
    executor, text, name, weights = (_simulated if options.executor == "simulated" else _openvino)(options, say)
    engine = Engine(executor, text, policy, limits, reuse=options.prefix_cache, record=record)
    return Assembled(engine, name, weights)


def _openvino(options: Options, say: Callable[[str], None]) -> tuple[Executor, Text, str, str]:
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
    return executor, text, name, f"{options.weights} weights, {options.kv} KV"


def _simulated(options: Options, say: Callable[[str], None]) -> tuple[Executor, Text, str, str]:
    from stallfree.executors.simulated import SimulatedExecutor

    length = options.max_model_len or 8192
    capacity = Capacity(block_size=32, num_blocks=(options.kv_memory or 1 << 30) // (32 * 13_000), max_model_len=length)
    text = bytes_as_text()
    return SimulatedExecutor(capacity, text.encode("abcdefghijklmnopqrstuvwxyz ")), text, "simulated", "none"


def bytes_as_text() -> Text:
    """The text of a model that there is not: a token is a byte, and a conversation is its messages, one a line."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Text(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", ())
