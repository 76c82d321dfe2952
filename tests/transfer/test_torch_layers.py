"""Between two torch engines, KV leaves layer by layer: tokens and KV are exactly those of one engine."""

import asyncio

import pytest

from stallfree.core.request import Request
from stallfree.executors.sampling import Sampling
from stallfree.transfer import sending
from tests.transfer.conftest import LAYERS, PROMPTS, decoding, engine, free, prefilling, read, serve
from tests.transfer.test_layers import pieces

pytest.importorskip("torch")
pytest.importorskip("transformers")

from stallfree.executors.torch import Options, TorchExecutor


@pytest.fixture
def made(checkpoint, monkeypatch):
    """Makes engines whose frames have one layer of six blocks or more."""

    def make(budget: int = 300, kv: str = "f32", *, overlap: bool = False, records=None):
        executor = TorchExecutor(checkpoint, Options("f32", kv), 1 << 22, overlap=overlap)
        return engine(executor, budget, records)

    own = make()
    monkeypatch.setattr(sending, "FRAME", own.executor.block_bytes // LAYERS * 6)
    own.close()
    return make


def alone(own) -> list[list[int]]:
    """The tokens of one engine."""
    for i, prompt in enumerate(PROMPTS):
        own.submit(Request(f"r{i}", prompt, 6, sampling=Sampling(temperature=0)))
    tokens: dict[str, list[int]] = {}
    while own.busy:
        for output in own.step():
            tokens.setdefault(output.id, []).extend(output.tokens)
    own.close()
    return [tokens[f"r{i}"] for i in range(len(PROMPTS))]


def handed(prefiller, decoder, transfer_kv: str = "same", prompts=PROMPTS) -> list[list[int]]:
    async def run():
        async with (
            prefilling(prefiller, transfer_kv=transfer_kv) as address,
            decoding(decoder, address, transfer_kv=transfer_kv) as (thread, asks),
        ):
            return await serve(thread, asks, prompts)

    return asyncio.run(run())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [48, 300])
def test_tokens_are_those_of_one_engine(made, way, budget, overlap, monkeypatch):
    """In f32, with prompts in one iteration and in several."""
    expected = alone(made())
    records, sent = [], pieces(monkeypatch)
    decoder = made(overlap=overlap, records=records)
    assert expected == handed(made(budget, overlap=overlap), decoder)
    assert len(PROMPTS) == sum(len(r.delivered) for r in records)
    assert any(header["layers"] < LAYERS for header in sent)
    free(decoder)


def test_the_kv_that_arrives_is_the_kv_that_was_computed_byte_by_byte(made, way):
    """The blocks that the prompt fills, when the last iteration of the prompt has run and when they are delivered."""
    prefiller, decoder = made(), made()
    filled = len(PROMPTS[-1]) // 16
    there, here = (bytearray(filled * own.executor.block_bytes) for own in (prefiller, decoder))
    submit, deliver = prefiller.submit, decoder.prefetch.deliver

    def watched(request, reading, *, transfer, watch):
        def watch_and_read(work):
            watch(work)
            prefiller.executor.read_blocks(work.blocks[:filled], memoryview(there))

        submit(request, reading, transfer=transfer, watch=watch_and_read)

    def delivered(request, *rest):
        decoder.executor.read_blocks(request.blocks[:filled], memoryview(here))
        deliver(request, *rest)

    prefiller.submit, decoder.prefetch.deliver = watched, delivered
    handed(prefiller, decoder, prompts=PROMPTS[-1:])
    assert any(there)
    assert there == here


@pytest.mark.parametrize("name", ["u8", "u4"])
def test_fewer_bits_leave_layer_by_layer_as_they_leave_in_whole_blocks(made, name, monkeypatch):
    """The pieces have other blocks in them, but each block's numbers are quantised by themselves."""
    sent = pieces(monkeypatch)
    by_layer = handed(made(), made(), name)
    assert any(header["layers"] < LAYERS for header in sent)
    sent.clear()
    monkeypatch.delattr(TorchExecutor, "follow")
    assert by_layer == handed(made(), made(), name)
    assert sent
    assert not any("layers" in header for header in sent)


def test_sampled_tokens_and_their_log_probabilities_are_the_same(made):
    request = {"temperature": 0.7, "seed": 5, "logprobs": 2}

    async def run(prefiller, decoder):
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            own = Request("r", PROMPTS[-1], 6, sampling=Sampling(**request))
            return [o.tokens for o in await read(thread.submit([own], transfer=asks.transfers(None)))]

    own = made()
    own.submit(Request("r", PROMPTS[-1], 6, sampling=Sampling(**request)))
    expected = []
    while own.busy:
        expected += [output.tokens for output in own.step()]
    assert expected == asyncio.run(run(made(), made()))
