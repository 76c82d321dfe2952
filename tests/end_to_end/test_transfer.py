"""The embedded model, prefilled in one engine and decoded in another: greedy tokens equal those of one engine.

Exactness is a promise of f32 weights and KV, as in `test_embedded`.
"""

import asyncio

import pytest

from stallfree.core.request import Request
from stallfree.engine.assemble import Options, assemble
from stallfree.executors.sampling import Sampling
from stallfree.transfer.terms import Terms
from tests.end_to_end.test_embedded import PROMPTS
from tests.transfer.conftest import decoding, prefilling, read

EXACT = Options(weights="f32", kv="f32", kv_memory=128 << 20, max_model_len=512, policy="sarathi", token_budget=32)


@pytest.fixture(scope="module")
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


def test_copies_of_a_model_are_one_and_other_weights_are_not(pair):
    assert pair[0].identity == pair[1].identity
    assert "f32 weights" in pair[0].identity
