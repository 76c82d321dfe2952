"""KV with fewer bits on its way: how near the numbers are that arrive, how many bytes are sent, and what is refused."""

import asyncio

import numpy as np
import pytest

from stallfree.executors.base import KVNumbers
from stallfree.executors.simulated import SimulatedExecutor
from stallfree.transfer import terms as terms_module
from stallfree.transfer.forms import Form
from stallfree.transfer.frames import send
from stallfree.transfer.terms import Refusal, Terms, connect
from tests.transfer.conftest import Remembering, decoding, engine, free, prefilling, serve
from tests.waiting import PATIENCE_S

LAYERS, HEADS, SIZE, TOKENS, BLOCKS = 2, 3, 8, 4, 5


class Numbers(Remembering):
    """A token's KV is 16 float32: its number in the keys, and its position in the values."""

    def __init__(self, form="f32", **options):
        super().__init__(**options)
        self.numbers = KVNumbers(form, 1, 1, 8, heads_first=True)
        self.block_bytes = self.capacity.block_size * 16 * 4
        self.layout = "numbers"

    def read_blocks(self, blocks, memory):
        kv = self.kv[list(blocks)]
        memory[:] = np.stack([np.repeat(kv[..., i], 8, -1) for i in (0, 1)]).astype(np.float32).tobytes()

    def write_blocks(self, blocks, memory):
        keys, values = np.frombuffer(memory, np.float32).reshape(2, len(blocks), -1, 8)[..., 0]
        self.kv[list(blocks)] = np.rint(np.stack([keys, values], -1))


def numbers(kind="f32", heads_first=True):
    return KVNumbers(kind, LAYERS, HEADS, SIZE, heads_first)


def drawn(heads_first=True):
    """Keys and values of every layer [layers, 2, blocks, heads, tokens, size], with a channel of keys that is large everywhere."""
    values = np.random.default_rng(0).normal(size=(LAYERS, 2, BLOCKS, HEADS, TOKENS, SIZE)).astype(np.float32)
    values[:, 0, ..., 3] += 100
    return values if heads_first else np.ascontiguousarray(values.transpose(0, 1, 2, 4, 3, 5))


def moved(form, raw, tokens=TOKENS):
    packed = form.pack(memoryview(bytearray(raw)), BLOCKS, tokens)
    assert form.size(BLOCKS) == len(packed)
    return np.frombuffer(form.unpack(memoryview(packed), BLOCKS), np.uint8)


def rows(values):
    """Bytes of u8 KV as OpenVINO stores it, and the numbers that they stand for."""
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    scale = (high - low) / 255
    zero = -low / scale
    whole = np.rint(values / scale + zero).astype(np.uint8)
    raw = np.concatenate([np.concatenate([scale, zero], -1).astype(np.float32).view(np.uint8), whole], -1)
    return raw, (whole - zero) * scale


@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize(("name", "bits"), [("u8", 8), ("u4", 4)])
def test_each_number_arrives_within_half_a_step(name, bits, heads_first):
    values = drawn(heads_first)
    arrived = moved(Form(name, numbers(heads_first=heads_first), TOKENS), values.tobytes()).view(np.float32).reshape(values.shape)
    for kind in (0, 1):
        axis = (3 if heads_first else 2) if (name, kind) == ("u4", 0) else 4
        step = np.ptp(values[:, kind], axis, keepdims=True) / (2**bits - 1)
        assert (np.abs(arrived - values)[:, kind] <= 0.5001 * step + 1e-5).all()


@pytest.mark.parametrize(("kind", "precision"), [("fp16", 2**-10), ("bf16", 2**-7)])
def test_halves_arrive_as_halves(kind, precision):
    values = drawn()
    raw = values.astype(np.float16) if kind == "fp16" else (values.view(np.uint32) >> 16).astype(np.uint16)
    arrived = moved(Form("u8", numbers(kind), TOKENS), raw.tobytes()).view(raw.dtype)
    arrived = arrived.astype(np.float32) if kind == "fp16" else (arrived.astype(np.uint32) << 16).view(np.float32)
    step = np.ptp(values, 5, keepdims=True) / 255
    assert (np.abs(arrived.reshape(values.shape) - values) <= 0.5001 * step + 2 * precision * np.abs(values)).all()


def test_quantised_kv_arrives_within_half_a_step_of_each_form():
    raw, values = rows(drawn())
    scales = moved(Form("u4", numbers("u8"), TOKENS), raw.tobytes()).reshape(raw.shape)
    scale, zero = scales[..., :8].copy().view(np.float32)[..., :1], scales[..., :8].copy().view(np.float32)[..., 1:]
    arrived = (scales[..., 8:] - zero) * scale
    for kind, axis in ((0, 3), (1, 4)):
        step = np.ptp(values[:, kind], axis, keepdims=True) / 15 + 2 * np.ptp(values[:, kind], 4, keepdims=True) / 255
        assert (np.abs(arrived - values)[:, kind] <= 0.51 * step).all()


def test_numbers_that_are_all_equal_arrive_exactly():
    values = np.full_like(drawn(), 7.25)
    np.testing.assert_array_equal(values.ravel(), moved(Form("u4", numbers(), TOKENS), values.tobytes()).view(np.float32))


def test_what_a_block_held_before_its_tokens_changes_nothing():
    clean, dirty = drawn(), drawn()
    dirty[:, :, -1, :, 2:] = np.nan
    clean[:, :, -1, :, 2:] = clean[:, :, -1, :, 1:2]
    form = Form("u4", numbers(), TOKENS)
    np.testing.assert_array_equal(moved(form, clean.tobytes()), moved(form, dirty.tobytes(), 2))


def test_sizes_are_the_bits_and_the_scales():
    heads = LAYERS * HEADS * BLOCKS
    assert heads * TOKENS * 2 * (SIZE + 8) == Form("u8", numbers(), TOKENS).size(BLOCKS)
    assert heads * (TOKENS * SIZE + 8 * SIZE + 8 * TOKENS) == Form("u4", numbers(), TOKENS).size(BLOCKS)


@pytest.mark.parametrize(
    ("executor", "name", "says"),
    [
        (Numbers(), "u2", "'u2' is unknown; known are same, u8, u4"),
        (Remembering(), "u8", "Remembering does not tell how its KV holds numbers; take same"),
        (SimulatedExecutor(Remembering().capacity, [1]), "u4", "SimulatedExecutor does not tell"),
        (Numbers("u8"), "u8", "KV in u8 cannot be sent so; KV in f32, bf16 and fp16 as u8 or u4, and u8 as u4 can; take same"),
        (Numbers("u4"), "u4", "KV in u4 cannot be sent so"),
        (Numbers("fp8"), "u4", "KV in fp8 cannot be sent so"),
    ],
)
def test_kv_that_cannot_be_sent_so_is_refused_by_name(executor, name, says):
    with pytest.raises(ValueError, match=says):
        Terms.of(executor, "m", name)


@pytest.mark.parametrize("name", ["u8", "u4"])
def test_what_arrives_is_decoded_from(name, way):
    records = []
    decoder, prefiller = engine(Numbers(), records=records), engine(Numbers())
    prompts = [[5] * length for length in (1, 5, 16)]

    async def run():
        async with (
            prefilling(prefiller, transfer_kv=name) as address,
            decoding(decoder, address, transfer_kv=name) as (thread, asks),
        ):
            return await serve(thread, asks, prompts)

    alone = engine(Numbers())

    async def apart():
        async with decoding(alone) as (thread, asks):
            return await serve(thread, asks, prompts)

    assert asyncio.run(apart()) == asyncio.run(run())
    delivered = {d.id: d.num_bytes for r in records for d in r.delivered}
    blocks = {"u8": 2 * 4 * (8 + 8), "u4": 4 * 8 + 8 * 8 + 4 * 8}[name]
    assert {"r0": blocks, "r1": 2 * blocks, "r2": 4 * blocks} == delivered
    free(decoder)


@pytest.mark.parametrize(("prefill", "decode"), [("u8", "same"), ("same", "u4"), ("u4", "u8")])
def test_two_forms_are_refused_with_both(prefill, decode):
    async def run():
        async with prefilling(engine(Numbers()), transfer_kv=prefill) as (host, port):
            with pytest.raises(Refusal) as refusal:
                await asyncio.to_thread(connect, host, port, Terms.of(Numbers(), "m", decode), "", PATIENCE_S)
            return str(refusal.value)

    says = asyncio.run(run())
    assert f"KV in transfer: {prefill} at the prefill engine, {decode} at the decode engine" in says
    assert "--transfer-kv" in says


def test_a_decode_engine_of_an_older_release_gets_kv_as_it_is_or_is_refused():
    same, fewer = (Terms.of(Numbers(), "m", name) for name in ("same", "u8"))
    older = {"model": "m", "block_size": 4, "block_bytes": 256, "layout": "numbers"}
    assert not same.against(older)
    assert "KV in transfer: u8 at the prefill engine, same at the decode engine" in fewer.against(older)


def test_a_prefill_engine_of_an_older_release_is_refused_unless_kv_goes_as_it_is(monkeypatch):
    def unnamed(sock, header, body=b""):
        send(sock, {key: value for key, value in header.items() if key != "transfer_kv"}, body)

    monkeypatch.setattr(terms_module, "send", unnamed)

    async def run(name):
        async with prefilling(engine(Numbers()), transfer_kv=name) as address:
            sock, _ = await asyncio.to_thread(connect, *address, Terms.of(Numbers(), "m", name), "", PATIENCE_S)
            sock.close()

    asyncio.run(run("same"))
    with pytest.raises(Refusal, match="KV in transfer: same at the prefill engine, u4 at the decode engine"):
        asyncio.run(run("u4"))
