"""Every executor serves any policy: results in order, a token for each request that samples, equal plans give equal tokens."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from stallfree.checkpoint import open_checkpoint
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, Plan, Work
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.speculation import Speculation
from stallfree.engine.assemble import EXECUTORS
from stallfree.executors.openvino import OpenVINOExecutor
from stallfree.executors.sampling import Sampling
from stallfree.executors.simulated import Linear, SimulatedExecutor
from stallfree.policies import load, names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A llama of two layers and a vocabulary of 256, with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    heads, kv_heads, dim, hidden, ffn, vocab, layers = 4, 2, 32, 128, 256, 256, 2
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "intermediate_size": ffn,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
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


@pytest.fixture(params=EXECUTORS)
def executor(request, tiny):
    if request.param == "simulated":
        executor = SimulatedExecutor(Capacity(16, 64, 512), range(256), Linear(0.0001, 0.000001, 0.0))
    elif request.param == "torch":
        torch = pytest.importorskip("stallfree.executors.torch", exc_type=ImportError)
        executor = torch.TorchExecutor(tiny, torch.Options("f32", "f32", max_model_len=512), 4 << 20)
    else:
        executor = OpenVINOExecutor(tiny, weights="f32", kv="f32", kv_bytes=4 << 20, max_model_len=512)
    yield executor
    executor.close()


class Told:
    """A proposer that was told what comes, by request. It is wrong at every seventh position."""

    draft_s = 0.0

    def __init__(self, outputs):
        self.outputs = outputs

    def propose(self, requests, most):
        return [
            tuple(
                (token + (len(r.output) + i) % 7 // 6) % 256
                for i, token in enumerate(self.outputs[int(r.id)][len(r.output) :][:count])
            )
            for r, count in zip(requests, most, strict=True)
        ]


GREEDY = ({"temperature": 0},) * 3
VARIED = ({"temperature": 1, "seed": 5, "logprobs": 2}, {"temperature": 0.8, "top_p": 0.9}, {"presence_penalty": 1.5, "seed": 9})


def serve(
    executor, policy: str, limits: Limits | None = None, *, hows=GREEDY, most: int = 9, told: list[list[int]] | None = None
) -> list[list[int]]:
    speculation = None if told is None else Speculation(Told(told), Linear(1.0, 0.0, 0.0), 4)
    scheduler = Scheduler(load(policy), executor.capacity, limits, speculation=speculation)
    rng = np.random.default_rng(1)
    requests = [
        Request(str(i), rng.integers(0, 256, n).tolist(), most, sampling=Sampling(**how))
        for i, (n, how) in enumerate(zip((3, 90, 150), hows, strict=True))
    ]
    for request in requests:
        scheduler.submit(request)
    while scheduler.ledger.requests:
        plan = scheduler.schedule(0)
        executor.submit(plan)
        result = executor.collect()
        assert result.error is None
        assert {w.id for w in plan.work if w.samples} == set(result.tokens)
        assert result.seconds > 0
        assert all(len(result.tokens[id]) == len(details) for id, details in result.details.items())
        scheduler.complete(plan, result, 0)
    scheduler.ledger.check()
    assert speculation is None or speculation.drafted > speculation.accepted > most
    return [r.output for r in requests]


def test_capacity_is_told_before_the_first_plan(executor):
    assert executor.capacity.block_size >= 1
    assert executor.capacity.num_blocks >= 1
    assert executor.capacity.depth >= 1


def test_the_tokens_are_the_same_under_every_policy(executor):
    served = [serve(executor, name) for name in names()]
    assert [served[0]] * len(served) == served


def test_the_tokens_are_the_same_when_the_limit_is_small(executor):
    assert serve(executor, "sarathi") == serve(executor, "sarathi", Limits(max_seqs=2, max_tokens=7))


@pytest.mark.parametrize("hows", [GREEDY, VARIED])
def test_with_drafts_the_tokens_are_the_same(executor, hows):
    alone = serve(executor, "sarathi", hows=hows, most=40)
    assert alone == serve(executor, "sarathi", hows=hows, most=40, told=alone)


def test_blocks_that_are_handed_out_can_be_taken_in_elsewhere(executor):
    """KV is copied into other blocks of the same executor; a decode gives the same token there as with the first blocks."""
    size = executor.capacity.block_size
    prompt = np.random.default_rng(2).integers(0, 256, 2 * size + 5).tolist()
    moved = bytearray(3 * executor.block_bytes)
    ran = [run(executor, prompt, 0, (0, 1, 2)), run(executor, [7], len(prompt), (0, 1, 2))]
    executor.read_blocks((0, 1, 2), memoryview(moved))
    run(executor, prompt[::-1], 0, (0, 1, 2))
    executor.write_blocks((9, 3, 5), memoryview(moved))
    assert ran[1] == run(executor, [7], len(prompt), (9, 3, 5))
    again = bytearray(len(moved))
    executor.read_blocks((9, 3, 5), memoryview(again))
    assert moved == again
    assert executor.layout


def run(executor, tokens, start, blocks):
    """The token sampled after `tokens`, which begin at `start`."""
    work = Work("a", start, len(tokens), True, False, tuple(tokens), blocks, Sampling(temperature=0, logprobs=3), "", tokens, [])
    executor.submit(Plan(0, 0.0, (work,)))
    result = executor.collect()
    return result.tokens["a"], result.details.get("a")


def test_results_come_in_the_order_of_the_plans(executor):
    scheduler = Scheduler(load("sarathi"), Capacity(executor.capacity.block_size, executor.capacity.num_blocks, 512, depth=2))
    for id in "ab":
        scheduler.submit(Request(id, range(200), 1))
    plans: list[Plan] = [scheduler.schedule(0), scheduler.schedule(0)]
    for plan in plans:
        executor.submit(plan)
    assert [0, 1] == [executor.collect().step for _ in plans]
