"""The embedded model, prefilled in one engine and decoded in another: greedy tokens equal those of one engine.

Exactness is a promise of f32 weights and KV, as in `test_embedded`.
"""

import asyncio
import random

import pytest

from stallfree.core.request import Request
from stallfree.engine.assemble import Options, assemble
from stallfree.executors.sampling import Sampling
from stallfree.transfer.cut import Cut
from stallfree.transfer.terms import Terms
from tests.end_to_end.test_embedded import PROMPTS
from tests.transfer.conftest import decoding, prefilling, read

EXACT = Options(weights="f32", kv="f32", kv_memory=128 << 20, max_model_len=512, policy="sarathi", token_budget=32)


@pytest.fixture
def pair():
    """The engine that decodes, with its records, and the one that prefills."""
    records = []
    decode, prefill = assemble(EXACT), assemble(EXACT)
    decode.engine.record = records.append
    return decode, prefill, records


def requests(text):
    sampling = Sampling(temperature=0, logprobs=2)
    return [Request(str(i), text.encode(p), 24, arrival=i, sampling=sampling) for i, p in enumerate(PROMPTS)]


def test_greedy_tokens_are_those_of_one_engine(pair, monkeypatch):
    decode, prefill, records = pair
    monkeypatch.setattr("tests.transfer.conftest.terms", lambda engine, kv: Terms.of(engine.executor, decode.identity, kv))

    async def run():
        alone, handed = requests(decode.engine.text), requests(decode.engine.text)
        async with prefilling(prefill.engine) as address, decoding(decode.engine, address) as (thread, asks):
            outputs = await read(thread.submit(handed, transfer=asks.transfers(None)))
            decode.engine.scheduler.ledger.pool.forget()
            await read(thread.submit(alone))
        return [r.output for r in alone], [r.output for r in handed], outputs

    alone, handed, outputs = asyncio.run(run())
    assert alone == handed
    assert {str(i) for i in range(len(PROMPTS))} == {transfer.id for record in records for transfer in record.delivered}
    assert all(len(output.details.top) == 2 for output in outputs)


def test_at_any_cut_tokens_and_log_probabilities_are_those_of_one_engine(pair, monkeypatch):
    """Greedy and sampled, with penalties over prompt and output, at random cuts and at those next to a block's end."""
    decode, prefill, records = pair
    monkeypatch.setattr("tests.transfer.conftest.terms", lambda engine, kv: Terms.of(engine.executor, decode.identity, kv))
    rng, size = random.Random(0), decode.engine.executor.capacity.block_size
    text = decode.engine.text.encode(PROMPTS[0] * 3)[: 2 * size + 9]
    cuts = [1, size - 1, size, size + 1, 2 * size, len(text) - 1, len(text), len(text) + 1, len(text) + 5, 3 * size + 1]
    cuts += [rng.randrange(1, len(text) + 20) for _ in range(3)]

    def made():
        how = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 7}, {"temperature": 0.0, "repetition_penalty": 1.3}]
        how.append({"temperature": 0.8, "seed": 8, "presence_penalty": 0.5, "frequency_penalty": 0.7, "top_p": 0.9})
        return [
            Request(str(i), [*text[i:], *text[:i]], 12, arrival=i, salt=str(i), sampling=Sampling(logprobs=2, **how[i % len(how)]))
            for i in range(len(cuts))
        ]

    async def run():
        alone, moved = made(), made()
        async with prefilling(prefill.engine) as address, decoding(decode.engine, address) as (thread, asks):
            transfers = {request.id: asks.transfers(None, Cut(cut)) for request, cut in zip(moved, cuts, strict=True)}
            there = await read(thread.submit(moved, transfer=lambda request: transfers[request.id](request)))
            decode.engine.scheduler.ledger.pool.forget()
            return alone, await read(thread.submit(alone)), moved, there

    alone, here, moved, there = asyncio.run(run())
    assert [r.output for r in alone] == [r.output for r in moved]
    for mine, theirs in zip(alone, moved, strict=True):
        assert pytest.approx(logprobs(mine, here), abs=1e-3) == logprobs(theirs, there)  # another batch changes the last bits
    delivered = {d.id: d.cut for r in records for d in r.delivered}
    # A request that ends at the prefill engine is not delivered.
    assert {str(i): cut if cut < len(text) else None for i, cut in enumerate(cuts) if cut + 1 < len(text) + 12} == delivered


def logprobs(request, outputs):
    return [output.details.logprob for output in outputs if output.id == request.id]


def test_copies_of_a_model_are_one_and_other_weights_are_not(pair):
    assert pair[0].identity == pair[1].identity
    assert "f32 weights" in pair[0].identity
