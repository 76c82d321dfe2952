"""A prompt for an adapter is computed by an engine that has the same one under this name; else it is computed where it decodes."""

import asyncio

import pytest

from stallfree.checkpoint.adapter import open_adapter
from stallfree.core.request import Request
from tests.adapters import made_adapter
from tests.checkpoint.test_adapter import CONFIG
from tests.transfer.conftest import GREEDY, Remembering, decoding, engine, prefilling, read

PROMPT = [(7 * j) % 251 for j in range(61)]


class Adapting(Remembering):
    """Every adapter moves each token by a number that its weights say. `computed`: the prompts that were computed here, with their
    adapters."""

    def __init__(self):
        super().__init__()
        self.moves: dict[str, int] = {}
        self.computed: list[tuple[int, str]] = []

    def adapter_blocks(self, adapter):
        return 2

    def load_adapter(self, key, adapter, blocks):
        (a,), _ = adapter.read("q_proj", range(1))
        self.moves[key] = int(1000 * abs(a[0, 0]))

    def drop_adapter(self, key):
        del self.moves[key]

    def submit(self, plan):
        self.computed += [(w.count, w.adapter) for w in plan.work if w.count > 1]
        super().submit(plan)
        result = self.results[-1]
        adapters = {w.id: w.adapter for w in plan.work}
        moved = {id: ((tokens[0] + self.moves.get(adapters[id], 0)) % 251,) for id, tokens in result.tokens.items()}
        self.results[-1] = type(result)(result.step, moved, result.seconds)


def made(tmp_path, name: str, seed: int, executor=None):
    """An engine that knows an adapter under this name."""
    own = engine(executor or Adapting())
    folder = tmp_path / f"{name}-{seed}"
    if not folder.exists():
        made_adapter(folder, CONFIG, rank=8, seed=seed)
    own.adapters.add(name, open_adapter(folder, CONFIG))
    return own


async def ask(thread, transfer=None) -> list[int]:
    request = Request("r", PROMPT, 6, adapter="dutch", sampling=GREEDY)
    outputs = await read(thread.submit([request], **({"transfer": transfer} if transfer else {})))
    assert [None] == list({output.error for output in outputs})
    return [token for output in outputs for token in output.tokens]


def alone(tmp_path) -> list[int]:
    """The tokens of one engine."""
    own = made(tmp_path, "dutch", 1)
    own.submit(Request("r", PROMPT, 6, adapter="dutch", sampling=GREEDY))
    tokens: list[int] = []
    while own.busy:
        for output in own.step():
            tokens += output.tokens
        if own.waits:
            own.adapters.join()
    return tokens


def test_the_prompt_and_the_answer_have_the_same_adapter(tmp_path, way):
    decoder, prefiller = made(tmp_path, "dutch", 1), made(tmp_path, "dutch", 1)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await ask(thread, asks.transfers(None))

    assert alone(tmp_path) == asyncio.run(run())
    assert {"dutch"} == {adapter for _, adapter in prefiller.executor.computed}
    assert [] == decoder.executor.computed


@pytest.mark.parametrize("seed", [2, None])
def test_an_engine_with_another_adapter_of_that_name_or_none_computes_nothing(tmp_path, seed, caplog):
    decoder = made(tmp_path, "dutch", 1)
    prefiller = engine(Adapting()) if seed is None else made(tmp_path, "dutch", seed)

    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            return await ask(thread, asks.transfers(None))

    assert alone(tmp_path) == asyncio.run(run())
    assert [] == prefiller.executor.computed
    assert {"dutch"} == {adapter for _, adapter in decoder.executor.computed}
    assert "is not loaded" in caplog.text
