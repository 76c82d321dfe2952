"""An engine with any set of features, on a small model with random weights in float32, and the same requests for each.

Some features belong to the requests (`OF_REQUESTS`): their tokens are compared with those of a plain engine that serves the same
requests, one after another. A set that cannot be had raises ValueError with the product's own words.
"""

import json
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher
from safetensors.numpy import save_file

from stallfree.checkpoint import Checkpoint, open_checkpoint
from stallfree.checkpoint.adapter import Adapter, open_adapter
from stallfree.core.ledger import Limits
from stallfree.core.plan import UNKNOWN, Plan, StepResult
from stallfree.core.policy import Setup
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.core.speculation import Speculation
from stallfree.elastic.stall_free import StallFree
from stallfree.engine import groups, proposing
from stallfree.engine.assemble import Options
from stallfree.engine.engine import Engine
from stallfree.engine.host_tier import HostTier
from stallfree.executors.base import Lost, RunsGroups
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.sampling import Sampling
from stallfree.executors.simulated import Linear
from stallfree.grammar.compiling import Grammars, vocabulary
from stallfree.grammar.constraint import GrammarConstraint
from stallfree.grammar.sources import Grammar, as_lark, of_regex
from stallfree.parsers.hermes import Hermes
from stallfree.parsers.pieces import Tool
from stallfree.perf.fitted import Fitted
from stallfree.policies import load
from stallfree.proposers.model import DraftModel
from stallfree.proposers.ngram import Ngram
from stallfree.transfer.terms import Terms
from tests.adapters import made_adapter
from tests.server.models import HERMES, chat_text

FEATURES = {
    "chunked": "prompts in chunks of at most 16 tokens an iteration",
    "overlap": "an iteration is planned while one runs (torch on a GPU; here on the processor)",
    "TP2": "two ranks share each layer (torch)",
    "SP2": "two groups of ranks share the tokens of each request (torch)",
    "PP2": "two pipeline stages (torch)",
    "hand-off": "another engine computes the prompts and hands KV over",
    "cut": "another engine computes a part of a prompt, or a prompt and the first tokens of its output",
    "prefix cache": "equal beginnings share KV",
    "salt": "requests with a `cache_salt` share KV only with their like",
    "host tier": "host memory keeps KV that the cache has no room for (`--kv-host-memory`)",
    "u8 KV": "`--kv u8`, the default on a processor",
    "u4 KV": "`--kv u4`",
    "few tokens": "int8 weights and u8 KV; iterations of at most 16 tokens, which do not take the graph",
    "ngram": "`--speculate ngram`",
    "draft model": "`--speculate draft:MODEL`",
    "adapters": "some requests use a LoRA adapter",
    "structured": "some answers follow a grammar",
    "tools": "some answers are forced tool calls",
    "n": "several completions of a prompt",
    "preemption": "running requests lose their KV and are computed again",
    "restart": "all KV is lost with a worker, and requests are computed again",
    "slack": "policy slo with classes: streams with time sit out",
    "groups": "two instances form groups anew for each iteration (`--policy elastic --sp 2`, torch)",
}
OF_REQUESTS = frozenset({"salt", "adapters", "structured", "tools", "n"})
KV = frozenset({"u8 KV", "u4 KV"})
NUMBERS = KV | {"few tokens"}
"""Features with other numbers: they are compared with a plain engine that has the same."""
REFUSED = {
    **{
        frozenset({"overlap", ranks}): "several ranks run as a pipeline, one plan in each stage, without overlap"
        for ranks in ("TP2", "SP2", "PP2", "groups")
    },
    **{
        frozenset({ranks, kv}): "executor torch has KV in f32, bf16, fp16 or fp8"
        for ranks in ("overlap", "TP2", "SP2", "PP2", "groups")
        for kv in ("u8 KV", "u4 KV")
    },
    KV: "KV has one format: `--kv` takes one",
    frozenset({"few tokens", "u4 KV"}): "few tokens take another way only with KV in 8 bits",
    **{
        frozenset({"few tokens", ranks}): "few tokens take another way only in executor openvino"
        for ranks in ("overlap", "TP2", "SP2", "PP2", "groups")
    },
    frozenset({"groups", "SP2"}): "`--sp` is the number of instances",
    frozenset({"groups", "chunked"}): "policy elastic bounds an iteration by its time, not by its tokens",
    frozenset({"groups", "prefix cache"}): "policy elastic has no prefix cache",
    frozenset({"groups", "slack"}): "policy elastic takes the place of policy slo, which has slack",
    **{
        frozenset({"groups", way}): "with policy elastic no blocks of KV can be handed over: it is anywhere, token by token"
        for way in ("hand-off", "cut")
    },
    **{
        frozenset({"groups", other}): "policy elastic has no pipeline stages, drafts, adapters or host memory"
        for other in ("PP2", "ngram", "draft model", "adapters", "host tier")
    },
    frozenset({"ngram", "draft model"}): "one proposer guesses: `--speculate` takes one",
}
"""Pairs that cannot be had, and why."""

TORCH = frozenset({"overlap", "TP2", "SP2", "PP2", "groups"})
TEXT = chat_text(HERMES)
LONGEST, MEMORY = 256, 6 << 20
SHORT = 128 << 10
"""Bytes of KV of each instance, where requests are to be preempted."""
TOKENS = 18
"""Of each answer."""
FEW = 16
"""Tokens of an iteration that are few, if that is among the features."""


def write_model(folder: Path, seed: int = 0) -> Checkpoint:
    """A llama of two layers with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    heads, kv_heads, dim, hidden, ffn, vocab, layers = 4, 2, 32, 64, 96, 272, 2
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "intermediate_size": ffn,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": LONGEST, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + f"self_attn.{x}_proj.weight": (n * dim, hidden) for x, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        }
        shapes |= {at + "self_attn.o_proj.weight": (hidden, heads * dim), at + "mlp.down_proj.weight": (hidden, ffn)}
        shapes |= {at + f"mlp.{x}_proj.weight": (ffn, hidden) for x in ("gate", "up")}
        shapes |= {at + f"{x}_layernorm.weight": (hidden,) for x in ("input", "post_attention")}
    tensors = {n: np.ones(s, np.float32) if len(s) == 1 else rng.normal(0, 0.2, s).astype(np.float32) for n, s in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


class Fewer:
    """An executor that says it has only `blocks` KV blocks."""

    def __init__(self, executor: Any, blocks: int):
        self._executor = executor
        self.capacity = replace(executor.capacity, num_blocks=min(blocks, executor.capacity.num_blocks))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


class Losing(Fewer):
    """An executor whose worker is lost in iteration `at`, with all KV."""

    def __init__(self, executor: Any, at: int):
        super().__init__(executor, executor.capacity.num_blocks)
        self._left = at
        self._out = 0
        self._loaded: set[str] = set()
        self.lost = False

    def submit(self, plan: Plan) -> None:
        self._executor.submit(plan)
        self._out += 1

    def load_adapter(self, key: str, adapter: Adapter, blocks: Sequence[int]) -> None:
        if key in self._loaded:  # it came after the loss
            self._executor.drop_adapter(key)
        self._executor.load_adapter(key, adapter, blocks)
        self._loaded.add(key)

    def drop_adapter(self, key: str) -> None:
        self._executor.drop_adapter(key)
        self._loaded.discard(key)

    def collect(self) -> StepResult:
        result: StepResult = self._executor.collect()
        self._out -= 1
        self._left -= 1
        if self._left == 0:
            while self._out:
                self._executor.collect()
                self._out -= 1
            for key in self._loaded:
                self._executor.drop_adapter(key)
            self._loaded.clear()
            self.lost = True
            if isinstance(self._executor, RunsGroups):
                from stallfree.executors.torch.slots import Slots

                self._executor._slots = Slots(self._executor.rooms)  # type: ignore[attr-defined]
                raise Lost("a worker was lost")
            blocks = tuple(range(self.capacity.num_blocks))
            self._executor.write_blocks(blocks, memoryview(bytearray(b"\x3f" * (len(blocks) * self._executor.block_bytes))))
            raise Lost("a worker was lost")
        return result


class Preempting:
    """A policy that takes a running request's KV away in every fifth iteration; else it is `inner`."""

    def __init__(self, inner: Any):
        self._inner, self._plans, self.preempted = inner, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def plan(self, draft: Any) -> None:
        self._plans += 1
        idle = [r for r in draft.running if not r.in_flight and r.output]
        if self._plans % 5 == 0 and idle and self.preempted < 12:
            draft.preempt(idle[-1])
            self.preempted += 1
            for line in (draft.decoding, draft.prefilling):
                if idle[-1] in line:
                    line.remove(idle[-1])
        self._inner.plan(draft)


class HandedOver:
    """A transfer from the engine `source`, which computes the tokens before the `cut` at once."""

    def __init__(self, source: Engine, target: Engine, cut: int | None = None):
        self._source, self._target = source, target
        self.cut = cut

    def start(self, request: Request) -> None:
        source, size, prompt, cut = self._source, self._source.executor.capacity.block_size, len(request.prompt), request.cut
        moved, count = bytearray(), -(-cut // size)

        def watch(work: Any) -> None:
            if work.start + work.count == cut:
                moved.extend(bytes(count * source.executor.block_bytes))
                source.executor.read_blocks(work.blocks[:count], memoryview(moved))

        twin = Request(
            request.id,
            request.prompt[:cut],
            max(0, cut - prompt) + 1,
            adapter=request.adapter,
            salt=request.salt,
            sampling=replace(request.sampling) if cut >= prompt else Sampling(temperature=0.0),
        )
        source.submit(twin, watch=watch)
        outputs = []
        while source.busy:
            outputs += source.step()
            if source.waits:
                source.adapters.join()
        *first, last = [output for output in outputs if output.tokens]
        for output in first:
            self._target.prefetch.extend(request, output.tokens[0], output.details)
        if request.finish_reason is not None:
            return
        self._target.executor.write_blocks(request.blocks[:count], memoryview(moved))
        if cut < prompt:
            self._target.prefetch.resume(request, len(moved), 0.0)
        else:
            self._target.prefetch.deliver(request, last.tokens[0], last.details, len(moved), 0.0)

    def cancel(self) -> None:
        pass


class World:
    """What all runs share, made when it is first wanted: executors by what they run, adapters, and compiled grammars."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.checkpoint = write_model(folder / "model")
        self._executors: dict[Any, Any] = {}
        self._references: dict[Any, list[list[int]]] = {}
        self._adapters: list[Adapter] = []
        self._grammars = Grammars(TEXT)
        self._matchers: dict[str, LLMatcher] = {}

    def close(self) -> None:
        for executor in self._executors.values():
            executor.close()
        self._grammars.close()

    @property
    def adapters(self) -> list[Adapter]:
        if not self._adapters:
            for seed in range(2):
                folder = made_adapter(self._folder / f"adapter-{seed}", self.checkpoint.config, rank=8, seed=seed)
                self._adapters.append(open_adapter(folder, self.checkpoint.config))
        return self._adapters

    def constraint(self, source: str) -> GrammarConstraint:
        if source not in self._matchers:
            self._matchers[source] = LLMatcher(vocabulary(TEXT), as_lark(source), log_level=0)
        return GrammarConstraint(self._matchers[source], Grammar(source, "test"), 272, self._grammars._searching)

    def executor(self, features: Collection[str], use: str = "") -> Any:
        """The executor for these features. `use`: another one of the same kind, for the engine that hands over or to guess."""
        if set(features) >= KV:
            raise ValueError(REFUSED[KV])  # there is no option for it
        kv = "u8" if {"u8 KV", "few tokens"} & set(features) else "u4" if "u4 KV" in features else "f32"
        weights = "int8" if "few tokens" in features else "f32"
        ranks = tuple(sorted(TORCH & set(features)))
        if weights == "int8" and (ranks or "u4 KV" in features):
            raise ValueError(next(why for pair, why in REFUSED.items() if "few tokens" in pair and pair <= set(features)))
        if "groups" in ranks and not use:
            _check_groups(features)
        short = {"groups", "preemption"} <= set(features)
        key = (ranks if not use else bool(ranks) and "torch", weights, kv, use, short)
        if key not in self._executors:
            self._executors[key] = self._made(ranks, weights, kv, use, SHORT if short else MEMORY)
        if "groups" in ranks and {"hand-off", "cut"} & set(features):
            Terms.of(self._executors[key], "model")
        return self._executors[key]

    def _made(self, ranks: tuple[str, ...], weights: str, kv: str, use: str, memory: int) -> Any:
        if not ranks or use == "draft":
            executor = OpenVINOExecutor(self.checkpoint, weights=weights, kv=kv, kv_bytes=MEMORY, max_model_len=LONGEST)
            executor.few = FEW
            return executor
        from stallfree.executors import torch

        options = torch.Options("f32", kv, LONGEST, threads=1)
        if use or ranks == ("overlap",):
            return torch.TorchExecutor(self.checkpoint, options, MEMORY, overlap=not use)
        if "overlap" in ranks:
            raise ValueError(REFUSED[frozenset(ranks)])  # there is no option for it
        if "groups" in ranks:
            workers = torch.workers("local")
            return torch.Cluster(self.checkpoint, options, memory, tp=1 + ("TP2" in ranks), instances=2, workers=workers)
        tp, sp, pp = (1 + (name in ranks) for name in ("TP2", "SP2", "PP2"))
        return torch.ParallelExecutor(self.checkpoint, options, MEMORY, tp=tp, sp=sp, pp=pp, workers=torch.workers("local"))

    def requests(self, features: Collection[str], world_salt: str = "") -> list[Request]:
        """The same requests for the same features: prompts that repeat themselves, of which some begin alike."""
        rng = random.Random(3)
        begin = [rng.randrange(250) for _ in range(40)]
        made = []
        for number in range(6):
            own = [rng.randrange(250) for _ in range(7)]
            prompt = [*(begin if number % 2 else own * 2), *own, *own, *own[:3]]
            how: dict[str, Any] = {"temperature": 0.0} if number % 3 else {"temperature": 0.9, "seed": number}
            if number == 2:
                how |= {"repetition_penalty": 1.3, "logprobs": 1}
            kind = ""
            if "structured" in features and number in (0, 3):
                how["constraint"], kind = self.constraint(of_regex("[a-c]{3,5}(-[0-9]{2,4})*")), "structured"
            if "tools" in features and number in (1, 4):
                how["constraint"], kind = self.constraint(_calls()), "tools"
            for copy in range(2 if "n" in features and number in (0, 5) else 1):
                made.append(
                    Request(
                        f"{number}.{copy}{kind and '-' + kind}",
                        prompt,
                        TOKENS,
                        stop_ids=TEXT.eos_ids if kind else frozenset(),
                        adapter=str(number % 2) if "adapters" in features and number in (1, 2, 5) else "",
                        salt="ab"[number // 2 % 2] if "salt" in features else "",
                        sampling=Sampling(**(how | ({"seed": number + 10 * copy} if copy else {}))),
                    )
                )
                if kind:
                    made[-1].sampling = replace(
                        made[-1].sampling,
                        constraint=self.constraint(of_regex("[a-c]{3,5}(-[0-9]{2,4})*") if kind == "structured" else _calls()),
                    )
        return made

    def expected(self, features: Collection[str]) -> list[list[int]]:
        """What a plain engine answers to the same requests, one after another."""
        own = frozenset(features) & (OF_REQUESTS | NUMBERS)
        if own not in self._references:
            outputs = []
            with self._engine(own) as engine:
                for request in self.requests(own):
                    engine.submit(request)
                    run(engine)
                    outputs.append(request.output)
            self._references[own] = outputs
        return self._references[own]

    def serve(self, features: Collection[str]) -> None:
        """Serve the requests with these features, and check that each had effect and changed no token."""
        if {"ngram", "draft model"} <= set(features):
            proposing.check("ngram, draft:model", 4)
        expected = self.expected(features)
        records: list[StepRecord] = []
        requests = self.requests(features)
        unknown = [0]
        with self._engine(features, records, unknown) as engine:
            source = engine.source
            for number, request in enumerate(requests):
                if "slack" in features:
                    request.slo = Slo.parse("tbt=150ms" if number % 2 else "ttlt=900s")
                if request is requests[-1]:
                    run(engine)  # what it shares with others is in the prefix cache then
                    if "host tier" in features:  # or, after a request that needs all blocks, in host memory
                        pool = engine.scheduler.ledger.pool
                        length = min(LONGEST, pool.num_free * pool.block_size) - 2
                        engine.submit(Request("filler", [number] * length, 1, sampling=Sampling(temperature=0.0)))
                        run(engine)
                prompt = len(request.prompt)
                cuts = [prompt // 3, prompt + 5] if "cut" in features else []
                cuts += [None] if "hand-off" in features else []
                engine.submit(request, transfer=None if source is None else HandedOver(source, engine, cuts[number % len(cuts)]))
                if number % 2:
                    for _ in range(3):
                        step(engine)
            run(engine)
            got = {request.id: request.output for request in requests}
            assert dict(zip(got, expected, strict=True)) == got
            for name in features:
                assert self._took_effect(name, engine, requests, records, unknown[0]), f"{name} had no effect"
            engine.scheduler.ledger.check()
            pool = engine.scheduler.ledger.pool
            assert pool.num_free == pool.num_blocks, "KV blocks are held by nobody"
            if source is not None:
                source.scheduler.ledger.check()
                assert source.scheduler.ledger.pool.num_free == source.executor.capacity.num_blocks

    def _took_effect(self, name: str, engine: Any, requests: list[Request], records: list[StepRecord], unknown: int) -> bool:
        texts = {r.id: TEXT.decode(r.output) for r in requests}
        checks: dict[str, Callable[[], bool]] = {
            "chunked": lambda: max(sum(count for _, _, count in r.work) for r in records) <= 16,
            "overlap": lambda: unknown > 0,
            "TP2": lambda: engine.executor.tp == 2,
            "SP2": lambda: engine.executor.sp == 2,
            "PP2": lambda: engine.executor.capacity.depth == 2,
            "hand-off": lambda: len(requests) == sum(len(r.delivered) for r in records),
            "cut": lambda: any(d.cut for r in records for d in r.delivered) and any(r.shown for r in records),
            "prefix cache": lambda: any(count for r in records for _, count in r.cached) or bool(engine.source),
            "salt": lambda: len({r.root for r in requests if not r.adapter}) > 1,
            "host tier": lambda: any(r.restored for r in records) or any(r.num_restored for r in requests),
            "u8 KV": lambda: "u8" in engine.executor.layout,
            "u4 KV": lambda: "u4" in engine.executor.layout,
            "few tokens": lambda: max(sum(count for _, _, count in r.work) for r in records) <= engine.executor.few,
            "ngram": lambda: engine.scheduler.speculation.drafted > 0,
            "draft model": lambda: engine.scheduler.speculation.drafted > 0,
            "adapters": lambda: any(r.loaded for r in records) and len({r.adapter for r in requests}) > 2,
            "structured": lambda: all(texts[id].startswith(("a", "b", "c")) for id in texts if id.endswith("structured")),
            "tools": lambda: all('"name"' in text[:24] for id, text in texts.items() if id.endswith("tools")),
            "n": lambda: len(requests) > len({tuple(r.prompt) for r in requests}),
            "preemption": lambda: any(r.num_preemptions for r in requests),
            "restart": lambda: engine.executor.lost,
            "slack": lambda: any(r.stalled for r in records),
            "groups": lambda: {"instance 0 of 2", "instances 0, 1 of 2"} <= {r.reason for r in records},
        }
        return checks[name]()

    @contextmanager
    def _engine(
        self, features: Collection[str], records: list[StepRecord] | None = None, unknown: list[int] | None = None
    ) -> Iterator[Any]:
        executor = self.executor(features)
        held = [executor]
        if "host tier" in features and records is not None:
            executor = Fewer(executor, LONGEST // executor.capacity.block_size)
        if "restart" in features:
            executor = Losing(executor, 9)
        if unknown is not None and "overlap" in features:
            _count_unknown(executor, unknown)
        whole = Limits(8, 512)
        if "few tokens" in features:  # beside an adapter's token, others take the graph, so nobody is beside anybody
            whole = Limits(1 if "adapters" in features else FEW, FEW)
        limits = replace(whole, max_tokens=min(16, whole.max_tokens)) if "chunked" in features else whole
        policy: Any = (
            load("slo", Setup(Fitted(), Slo.parse("tbt=200ms"))) if "slack" in features else load("sarathi", token_budget=512)
        )
        if "groups" in features:
            policy = StallFree(Rings(), 2, 0.05, lambda stream: time.perf_counter() - stream.arrival + 0.1)
        if "slack" in features:
            policy._turns = Alternating()
        if "preemption" in features and "groups" not in features:  # these have little room for KV then
            policy = Preempting(policy)
            if "overlap" in features:  # what is in flight cannot be preempted by a policy, but KV may be short
                executor = Fewer(executor, 8)
        speculation = None
        if "ngram" in features:
            told = {request.id: output for request, output in zip(self.requests(features), self.expected(features), strict=True)}
            speculation = Speculation(Told(Ngram(), told), Linear(1.0, 0.0, 0.0), 4)
        if "draft model" in features:
            draft = DraftModel(self.executor((), "draft"))
            draft.draft_s = 1e-6
            speculation = Speculation(draft, Linear(1.0, 0.0, 0.0), 3)
        reuse = bool({"prefix cache", "salt", "host tier"} & set(features))
        engine: Any = Engine(
            executor, TEXT, policy, limits, reuse=reuse, restart=True, speculation=speculation,
            record=None if records is None else records.append,
        )  # fmt: skip
        engine.source = None
        if "host tier" in features and records is not None:
            engine.host = HostTier(executor, engine.scheduler.ledger.pool, MEMORY, in_host=True)
        engines = [engine]
        if {"hand-off", "cut"} & set(features):
            other = self.executor(features, "prefill")
            held.append(other)
            engine.source = Engine(other, TEXT, load("sarathi", token_budget=512), whole, reuse=reuse)
            engines.append(engine.source)
        if "adapters" in features:
            for each in engines:
                for number, adapter in enumerate(self.adapters):
                    each.adapters.add(str(number), adapter)
        try:
            yield engine
        finally:
            for each, own in zip(engines, held, strict=True):
                for key in list(each.scheduler.ledger.adapters.resident):
                    own.drop_adapter(key)


def _check_groups(features: Collection[str]) -> None:
    """Raises ValueError for features that groups do not have, in the product's words if there is an option for them."""
    words = {"ngram": {"speculate": "ngram"}, "draft model": {"speculate": "draft:model"}, "PP2": {"pp": 2}}
    words |= {"host tier": {"kv_host_memory": MEMORY}, "adapters": {"adapter": ["0=adapter"]}}
    given: dict[str, Any] = {}
    for name in features:
        given |= words.get(name, {})
        if name in ("SP2", "chunked", "prefix cache", "slack"):
            raise ValueError(REFUSED[frozenset({"groups", name})])  # there is no option for it
    groups.check(Options(policy="elastic", executor="torch", sp=2, **given))


class Rings:
    """Prices such that a prompt of these is worth two instances, and a lone decode none."""

    def seconds(self, degree: int, shape: Any) -> float:
        return sum(0.001 + count * 2e-3 / degree for _, count in shape) + 0.001 * degree

    def moving(self, tokens: int) -> float:
        return 1e-6 * tokens


class Alternating:
    """Whose turn it is, in place of `qos.turns`: every other stream sits out every other iteration, however fast the machine is."""

    def __init__(self) -> None:
        self._odd = False

    def sitting(self, draft: Any, dues: Any, wanted: float, margin: float) -> tuple[set[Request], float]:
        self._odd = not self._odd
        return set(draft.decoding[::2] if self._odd and len(draft.decoding) > 1 else ()), inf

    def join(self, draft: Any, shape: Any, sitting: set[Request], limit: float) -> None:
        pass


class Told:
    """A proposer that was told the answers, with a mistake in every fifth token. It says them where `inner` has no guess."""

    draft_s = 0.0

    def __init__(self, inner: Any, answers: dict[str, list[int]]):
        self._inner, self._answers = inner, answers

    def _right(self, request: Request, count: int) -> tuple[int, ...]:
        done = len(request.output)
        return tuple(token + (done + i) % 5 // 4 for i, token in enumerate(self._answers.get(request.id, [])[done : done + count]))

    def propose(self, requests: Any, most: Any) -> list[Any]:
        found = self._inner.propose(requests, most)
        return [guess or self._right(r, count) for guess, r, count in zip(found, requests, most, strict=True)]


def _calls() -> str:
    tool = Tool("f", "", {"properties": {"x": {"type": "integer"}}, "required": ["x"]})
    return Hermes().grammar([tool], parallel=False, special=TEXT.own_tokens(Hermes.marks))


def _count_unknown(executor: Any, unknown: list[int]) -> None:
    submit = executor.submit

    def counting(plan: Plan) -> None:
        unknown[0] += sum(work.tokens == (UNKNOWN,) for work in plan.work)
        submit(plan)

    executor.submit = counting


def step(engine: Engine) -> None:
    engine.step()
    if engine.waits:
        engine.adapters.join()


def run(engine: Engine) -> None:
    while engine.busy:
        step(engine)
