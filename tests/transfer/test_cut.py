"""A request is cut at any token: in its prompt or after the first tokens of its output. The tokens are those of one engine."""

import asyncio

import pytest

from stallfree.core.request import Request
from stallfree.transfer.cut import Cut
from tests.transfer.conftest import GREEDY, Remembering, decoding, engine, expected, free, prefilling, read

PROMPT = [(7 * i) % 251 for i in range(61)]
LENGTHS = (1, 2, 4, 5, 8, 61)


async def serve(thread, asks, prompts, cut, max_tokens=9):
    requests = [Request(f"r{i}", prompt, max_tokens, arrival=i, sampling=GREEDY) for i, prompt in enumerate(prompts)]
    outputs = await read(thread.submit(requests, transfer=asks.transfers(None, Cut(cut))))
    return [[token for o in outputs if o.id == r.id for token in o.tokens] for r in requests]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 7, 8, 9, 32, 59, 60, 61, 62, 63, 64, 65, 68, 69, 70, 1000])
def test_at_any_cut_the_tokens_are_those_of_one_engine(cut, overlap, way):
    records = []
    decoder, prefiller = engine(Remembering(overlap=overlap), records=records), engine(Remembering(overlap=overlap))
    prompts = [PROMPT[:length] for length in LENGTHS]

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, prompts, cut)

    assert [expected(prompt, 9) for prompt in prompts] == asyncio.run(run())
    free(decoder)
    free(prefiller)
