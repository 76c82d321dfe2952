"""The time of an iteration from the device's data sheet and the model's dimensions: the sum of its kernels, and the engine around
them.

The linear part of a layer depends only on the number of tokens, and is remembered by it. Attention depends on a few sums over the
shape. It knows no clock and no requests, and it learns nothing: this machine cannot correct a model of another one.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from stallfree.core.nearest import nearest
from stallfree.core.plan import Shape, parts
from stallfree.perf import kernels
from stallfree.perf.adapters import Adapters
from stallfree.perf.hardware import Hardware
from stallfree.perf.kernels import NONE, Attention, Chunks, Cost
from stallfree.perf.ring import Striped
from stallfree.perf.shape import Sharded

QUANTUM = 64
"""`room` fills an iteration to a multiple of these tokens: the height of the smallest tile of matrix products."""


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine of a year: the kernels of the `libraries` it uses (`hardware.YEARS`), and the time that it adds to them.

    On the host, before each iteration: `iteration_s`, `sequence_s` per piece of work, and `workers_s` for messages to several
    devices. To launch a layer's kernels: `layer_s`, and `layer_sequence_s` per piece of work; a layer with quicker kernels waits
    for that. All of these are of a DGX A100's host; `Hardware.host` says how much faster another one is. `front_s`: a request's way
    to the scheduler and its first token's way back. `in_step`: collectives start together on all ranks. `fused`: the compiler
    merges the addition of residuals into norms. `masked`: see `Attention`. `adapter_s`: of a device, for each of the
    adapters' kernels, besides the time of its bytes.
    """

    about: str
    libraries: str
    iteration_s: float
    sequence_s: float
    workers_s: float = 0.0
    layer_s: float = 0.0
    layer_sequence_s: float = 0.0
    front_s: float = 0.0
    in_step: bool = True
    fused: bool = False
    masked: float = 0.0
    adapter_s: float = 3e-6


ENGINES = {
    "vllm-2026": Engine(
        # Fitted to whole deployments of Llama-3.1-70B in fp8 on 2, 4 and 8 H100 (vLLM 0.24, aiconfigurator): TPOT within 4 % at the
        # median. front_s: their TTFT.
        "vLLM 0.24: CUDA graphs, and the host's work for the next iteration while one runs",
        libraries="2026",
        iteration_s=0.4e-3,
        sequence_s=12e-6,
        front_s=16e-3,
        fused=True,
    ),
    "fused": Engine(
        # TurboMind of 2023 (LMDeploy 0.1, its published tables of an A100) is within 10 % at the median. front_s: as vllm-2026.
        "kernels fused and launched from C++, as by TensorRT-LLM or TurboMind",
        libraries="2026",
        iteration_s=0.3e-3,
        sequence_s=0.0,
        front_s=16e-3,
        fused=True,
    ),
    "graph": Engine(
        # Schedule, sampling, input preparation and output processing of the 2024 reference engine: vidur, cpu_overheads, medians
        # on A100, Llama-2-7B on one device.
        "CUDA graphs, attention that skips the mask, and the host's work between iterations, as by engines of 2024",
        libraries="2024",
        iteration_s=0.9e-3,
        sequence_s=0.04e-3,
    ),
    "eager-2024": Engine(
        # Host: the same source, CodeLlama-34B on two devices; workers are Ray's. Layers: Yi-34B, TP2, A100 PCIe (Sarathi-Serve,
        # artifact of OSDI'24, figure 2): 46.8 ms for one decode in 60 layers, and about 1.1 ms for each further one up to 128,
        # which neither their KV (1,020 tokens each) nor the host accounts for.
        "kernels launched one by one from Python, as by research engines of early 2024",
        libraries="2024",
        iteration_s=1.5e-3,
        sequence_s=0.05e-3,
        workers_s=6.3e-3,
        layer_s=0.7e-3,
        layer_sequence_s=18e-6,
        in_step=False,
        masked=1.0,
    ),
    "vllm-2023": Engine(
        # Splitwise (ISCA'24), the tables of its simulator: Llama-2-70B on 2, 4 and 8 A100 and H100. A decode takes 0.56 ms a
        # layer on A100 and 0.37 on H100 however the layer is split, and 0.25 ms more for each sequence.
        "vLLM of 2023: kernels launched one by one from Python, workers of Ray",
        libraries="2024",
        iteration_s=1.5e-3,
        sequence_s=0.25e-3,
        layer_s=0.54e-3,
        front_s=20e-3,
        in_step=False,
        masked=1.0,
    ),
    "lightllm-2023": Engine(
        # S-LoRA (arXiv 2311.03285), which is built on it: Llama-7B on an A100-80G, 10 requests/s. layer_s: 9.64 requests/s without
        # adapters. adapter_s: 8.05 with five of rank 8.
        "LightLLM of 2023 with S-LoRA's kernels: launched one by one from Python",
        libraries="2024",
        iteration_s=1.5e-3,
        sequence_s=0.05e-3,
        layer_s=0.8e-3,
        in_step=False,
        masked=1.0,
        adapter_s=68e-6,
    ),
}
USUAL = "vllm-2026"
"""The engine that is meant if none is named."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A kernel of an iteration: its name, how many times it runs in sequence, and the cost of each run."""

    name: str
    count: int
    cost: Cost


class Sums(NamedTuple):
    """The quantities that the price of an iteration depends on: pieces of work, and tokens; decodes, and the tokens of KV before
    them; what attention sums up over chunks; the ranks of its adapters.
    """

    requests: int
    tokens: int
    decodes: int
    context: int
    chunks: Chunks
    ranks: int = 0


class Roofline:
    """The cost model of `sharded` on `device`s, with one of `ENGINES`. `node`: devices used on each node, None for all. `network`:
    the link between nodes, None for the device's first. `adapters`: the matrices that they are on (`adapters.MODULES`). `sp`:
    groups of `sharded.tp` devices that share the tokens of each iteration (`ring.py`). Raises ValueError if no link joins the
    devices.

    A tensor-parallel group lies within a node if it fits. Pipeline stages follow each other in the same node while it has room.
    """

    def __init__(
        self,
        device: Hardware,
        sharded: Sharded,
        engine: str = USUAL,
        *,
        node: int | None = None,
        network: str | None = None,
        adapters: str = "attention",
        sp: int = 1,
    ):
        if sp < 1 or (sp > 1 and sharded.pp > 1):
            raise ValueError(
                f"sequence parallelism {sp} with {sharded.pp} pipeline stages has no price; give sp of 1 or more, and pp 1"
            )
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}{nearest(engine, ENGINES)}; known: {', '.join(ENGINES)}")
        if node is not None and not 1 <= node <= device.node:
            raise ValueError(f"a node of {device.name} has {device.node} devices, so {node} of it cannot be used")
        model, tp = sharded.model, sharded.tp
        self._sp = sp
        self.device, self.sharded, self.engine = device, sharded, ENGINES[engine]
        self.measured = device.kernels(self.engine.libraries)
        used = node or device.node
        self._per_node = min(tp, used)
        self._ring = device.link(tp, self._per_node, network) if tp > 1 else None
        # A stage and the next are in one node if the first device of the one and the last of the other are.
        same = [(stage + 2) * tp <= (stage * tp // used + 1) * used for stage in range(sharded.pp - 1)]
        self._sends = [device.link(2 * tp, used) if here else device.link(used + 1, used, network) for here in same]
        known = self.measured.attention
        attention = Attention if sp == 1 else partial(Striped, sp, device.link(sp * tp, used, network))
        self._attention: Attention = attention(
            device=device,
            measured=known.get(sharded.kv, known["fp16"]),
            heads=sharded.heads,
            kv_heads=sharded.kv_heads,
            head_dim=model.head_dim,
            kv_bytes=sharded.kv_bytes_per_layer,
            masked=self.engine.masked,
        )
        self._num_layers = model.num_layers
        self.adapters = Adapters(device, sharded, adapters, self.engine.adapter_s)
        host = self.engine.iteration_s + (self.engine.workers_s if sp * tp * sharded.pp > 1 else 0.0)
        self._host_s, self._sequence_s = host / device.host, self.engine.sequence_s / device.host
        # Seconds of a layer without attention, and before the layers, by the iteration's tokens; after them, by its rows of logits.
        self._layers: dict[int, float] = {}
        self._befores: dict[int, float] = {}
        self._afters: dict[int, float] = {}

    @property
    def front_s(self) -> float:
        """Seconds of a request's way to the scheduler and of its first token's way back."""
        return self.engine.front_s

    def seconds(self, shape: Shape) -> float:
        """From the begin of the host's part to the end of the last stage; the host's part alone if there is no work."""
        return self._seconds(self._sums(shape)) if shape else self._host_s

    def batch(self, decodes: int, context: int, chunks: Shape) -> float:
        return self._seconds(self._summed(decodes, context, chunks))

    def stages(self, shape: Shape) -> list[float]:
        """Seconds of each pipeline stage, which add up to `seconds`. The first has the host's part and the embedding, the last the
        LM head, and each the time of its own send.
        """
        sums = self._sums(shape)
        layer = self._layer(sums)
        stages = [layers * layer + send for layers, send in zip(self.sharded.stages, [*self.sends(sums.tokens), 0.0], strict=True)]
        before, after = self._ends(sums)
        stages[0] += before
        stages[-1] += after
        return stages

    def sends(self, tokens: int) -> list[float]:
        """Seconds to send the activations of `tokens` from each pipeline stage to the next; empty for one stage."""
        return [kernels.send(link, self._activations(tokens)).seconds for link in self._sends]

    def room(self, shape: Shape, start: int, most: int, limit: float) -> int:
        sums = self._sums(shape)

        def within(count: int) -> bool:
            return self._seconds(self._with(sums, start, count)) <= limit

        def largest(counts: Sequence[int]) -> int:
            return bisect_left(counts, True, key=lambda count: not within(count))

        if most < 1 or within(most):
            return max(0, most)
        whole = range(QUANTUM - sums.tokens % QUANTUM, most, QUANTUM)
        number = largest(whole)
        return whole[number - 1] if number else largest(range(1, min(most, whole.start) if whole else most))

    def learn(self, shape: Shape, seconds: float) -> float:
        """`seconds` over those expected. It learns nothing, because the device and the model do not change."""
        return seconds / self.seconds(shape)

    def operators(self, shape: Shape) -> list[Operator]:
        """Every kernel of the iteration, in the order of a layer, and the time that the engine adds. They add up to `seconds`."""
        layers = self._num_layers
        sums = self._sums(shape)
        tokens, requests = sums.tokens, sums.requests
        operators = [Operator("host", 1, Cost(self._host_s + self._sequence_s * requests))]
        operators.append(Operator("embedding", 1, self._embedding(tokens)))
        inside = [*self._linear(tokens), *self._attentions(shape)]
        operators += [Operator(op.name, op.count * layers, op.cost) for op in inside]
        waiting = self._launching(requests) - sum(op.count * op.cost.seconds for op in inside)
        if waiting > 0:
            operators.append(Operator("waiting for launches", layers, Cost(waiting, launch_s=waiting)))
        operators += [Operator("send", 1, kernels.send(link, self._activations(tokens))) for link in self._sends]
        operators += self._head(requests)
        return operators

    def _sums(self, shape: Shape) -> Sums:
        """The sums of an iteration."""
        return self._summed(*parts(shape))

    def _summed(self, decodes: int, context: int, chunks: Shape) -> Sums:
        ranks = 0
        if chunks and min(chunks, key=_count)[1] < 0:
            ranks = sum([total for total, count in chunks if count < 0])
            chunks = [piece for piece in chunks if piece[1] >= 0]
        sums = self._attention.sums(chunks) if chunks else NONE
        return Sums(decodes + len(chunks), decodes + sums.tokens, decodes, context, sums, ranks)

    def _with(self, sums: Sums, start: int, count: int) -> Sums:
        """The sums with one more piece of work."""
        requests, tokens, decodes, context, chunks, ranks = sums
        if count == 1:
            return Sums(requests + 1, tokens + 1, decodes + 1, context + start, chunks, ranks)
        more, cached, pairs, tiles, longest, split = self._attention.sums(((start, count),))
        both = Chunks(
            chunks.tokens + more, chunks.cached + cached, chunks.pairs + pairs, chunks.tiles + tiles,
            max(chunks.longest, longest), chunks.split or split,
        )  # fmt: skip
        return Sums(requests + 1, tokens + count, decodes, context, both, ranks)

    def _seconds(self, sums: Sums) -> float:
        between = sum(self.sends(sums.tokens)) if self._sends else 0.0
        return sum(self._ends(sums)) + self._num_layers * self._layer(sums) + between

    def _layer(self, sums: Sums) -> float:
        requests, tokens, decodes, context, chunks, ranks = sums
        layer = self._layers.get(tokens)
        if layer is None:
            layer = self._layers[tokens] = sum(op.count * op.cost.seconds for op in self._linear(tokens))
        if decodes:
            layer += self._attention.decodes(decodes, context)
        if chunks.tokens:
            layer += self._attention.chunks(chunks)
        if ranks:
            layer += self.adapters.seconds(ranks, tokens)
        launching = self._launching(requests)
        return layer if layer > launching else launching

    def _ends(self, sums: Sums) -> tuple[float, float]:
        """Seconds before the first layer and after the last."""
        requests, tokens = sums[:2]
        before, after = self._befores.get(tokens), self._afters.get(requests)
        if before is None:
            before = self._befores[tokens] = self._embedding(tokens).seconds
        if after is None:
            after = self._afters[requests] = sum(op.cost.seconds for op in self._head(requests))
        return self._host_s + self._sequence_s * requests + before, after

    def _launching(self, requests: int) -> float:
        return (self.engine.layer_s + self.engine.layer_sequence_s * requests) / self.device.host

    def _linear(self, tokens: int) -> Iterator[Operator]:
        """The kernels of one layer on one device that depend only on the number of tokens."""
        tokens = -(-tokens // self._sp)
        device, measured, sharded, model = self.device, self.measured, self.sharded, self.sharded.model
        yield Operator("norm", 2, kernels.elementwise(device, measured, "norm", tokens, model.hidden_size))
        for matrix in sharded.layer():
            yield Operator(matrix.name, 1, kernels.matmul(device, measured, tokens, matrix))
        if not model.positions:
            turned = (sharded.heads + sharded.kv_heads) * model.head_dim
            yield Operator("rope", 1, kernels.elementwise(device, measured, "rope", tokens, turned))
        channels = model.active_experts * model.ffn_size // sharded.tp
        yield Operator(
            "activation",
            1,
            kernels.elementwise(device, measured, "gated activation" if model.gated else "activation", tokens, channels),
        )
        if not self.engine.fused:
            yield Operator("add", 2, kernels.elementwise(device, measured, "add", tokens, model.hidden_size))
        if self._ring is not None:
            size = self._activations(tokens)
            cost = kernels.all_reduce(self._ring, sharded.tp, self._per_node, size, self.engine.in_step)
            yield Operator("all-reduce", 1 if model.parallel else 2, cost)

    def _attentions(self, shape: Shape) -> Iterator[Operator]:
        _, tokens, decodes, context, chunks, ranks = self._sums(shape)
        if decodes:
            yield Operator("attention, decodes", 1, self._attention.cost_of_decodes(decodes, context))
        if chunks.tokens:
            yield Operator("attention, chunks", 1, self._attention.cost_of_chunks(chunks))
        if ranks:
            yield Operator("adapters", 1, Cost(self.adapters.seconds(ranks, tokens)))

    def _embedding(self, tokens: int) -> Cost:
        share = -(-tokens // self._sp)
        return kernels.elementwise(self.device, self.measured, "embedding", share, self.sharded.model.hidden_size)

    def _head(self, requests: int) -> list[Operator]:
        """One row of logits for each piece of work, and gathering their parts."""
        operators = [Operator("lm head", 1, kernels.matmul(self.device, self.measured, requests, self.sharded.head()))]
        if self._ring is not None:
            size = 2.0 * requests * self.sharded.head().rows * (self.sharded.tp - 1)
            operators.append(Operator("gather logits", 1, kernels.send(self._ring, size)))
        return operators

    def _activations(self, tokens: int) -> float:
        """Bytes of the activations between two layers."""
        return 2.0 * tokens * self.sharded.model.hidden_size


def _count(piece: tuple[int, int]) -> int:
    return piece[1]
