"""Between two engines on one machine KV can go from device to device, without the memory that both share."""

import asyncio
import threading

import pytest

from stallfree.transfer import line as meetings
from stallfree.transfer import sending
from stallfree.transfer.frames import Broken
from stallfree.transfer.terms import Terms
from tests.transfer.conftest import LAYERS, PROMPTS, decoding, engine, free, prefilling, serve
from tests.transfer.test_layers import pieces
from tests.waiting import comes

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from stallfree.executors.torch import Options, TorchExecutor
from stallfree.executors.torch import line as lines
from stallfree.executors.torch.line import Line

PROCESSOR = torch.device("cpu")


@pytest.fixture
def made(checkpoint, monkeypatch):
    """Makes engines at a place. Their frames have one layer of six blocks or more."""

    def make(place: str, records=None):
        executor = TorchExecutor(checkpoint, Options("f32", "f32"), 1 << 22)
        monkeypatch.setattr(sending, "FRAME", executor.block_bytes // LAYERS * 6)
        executor.place = place
        return engine(executor, 48, records)

    return make


async def opened(asks):
    await comes(lambda: all(peer._line for peer in asks.peers))


def handed(prefiller, decoder, before=opened) -> list[list[int]]:
    async def run():
        async with prefilling(prefiller) as address, decoding(decoder, address) as (thread, asks):
            await before(asks)
            return await serve(thread, asks, PROMPTS)

    return asyncio.run(run())


async def nothing(asks):
    pass


def test_kv_goes_by_the_line_alone_and_tokens_are_the_same(made, monkeypatch):
    expected = handed(made(""), made(""), nothing)
    records, sent = [], pieces(monkeypatch)
    decoder = made("gloo b", records)
    assert expected == handed(made("gloo a"), decoder)
    assert sent
    assert all(header["line"] for header in sent)
    assert not any("at" in header for header in sent)
    assert len(PROMPTS) == sum(len(r.delivered) for r in records)
    assert all(d.num_bytes for r in records for d in r.delivered)
    free(decoder)


def test_what_the_line_has_no_room_for_goes_through_memory(made, monkeypatch):
    expected = handed(made(""), made(""), nothing)
    monkeypatch.setattr(lines, "MOST", 8)  # bytes: less than any piece
    sent = pieces(monkeypatch)
    assert expected == handed(made("gloo a"), made("gloo b"))
    assert sent
    assert not any("line" in header for header in sent)


@pytest.mark.parametrize(("here", "there"), [("gloo a", "gloo a"), ("gloo a", "nccl b"), ("", "gloo b"), ("gloo a", "")])
def test_there_is_no_line_where_none_is_possible(made, here, there, monkeypatch):
    sent = pieces(monkeypatch)
    handed(made(here), made(there), nothing)
    assert sent
    assert not any("line" in header for header in sent)


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_without_a_line_that_could_be_opened_kv_goes_through_memory(made, side, monkeypatch, caplog):
    expected = handed(made(""), made(""), nothing)
    monkeypatch.setattr(lines, "PATIENCE_S", 0.2)
    prefiller, decoder = made("gloo a"), made("gloo b")

    def broken(path, end, broken):
        raise RuntimeError("no such device")

    (prefiller if side == "prefill" else decoder).executor.open_line = broken

    async def told(asks):
        await comes(lambda: "no line" in caplog.text)

    assert expected == handed(prefiller, decoder, told)
    assert "KV goes through the host's memory" in caplog.text


def test_a_line_that_breaks_ends_the_connection_and_prompts_are_computed_here(made, monkeypatch):
    expected = handed(made(""), made(""), nothing)
    decoder = made("gloo b")

    async def cut(asks):
        await opened(asks)
        peer = asks.peers[0]

        def receive(number, layers):
            raise RuntimeError("the other GPU is gone")

        peer._line.receive = receive

    assert expected == handed(made("gloo a"), decoder, cut)
    free(decoder)


def both(path, tensors):
    """Both ends of a line."""
    ends = {}

    def open_end(number):
        ends[number] = Line(str(path), number, PROCESSOR, lambda layers: tensors[number])

    threads = [threading.Thread(target=open_end, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends[0], ends[1]


def test_blocks_arrive_where_the_other_end_wants_them(tmp_path):
    rows = torch.arange(64, dtype=torch.uint8).view(8, 8)
    taken = [torch.zeros(8, 8, dtype=torch.uint8) for _ in range(2)]
    one, two = both(tmp_path / "line", [taken, [rows, rows + 100]])
    two.send([1, 3], range(2)).result()
    two.send([5], range(2)).result()
    one.receive(2, range(2))([7, 0])
    one.receive(1, range(2))([2])
    for end in (one, two):
        end.close()
        end.close()
    assert torch.equal(rows[[1, 3, 5]], taken[0][[7, 0, 2]])
    assert torch.equal(rows[[1, 3, 5]] + 100, taken[1][[7, 0, 2]])
    assert two.send([1], range(2)) is None


def test_an_end_alone_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "PATIENCE_S", 0.2)
    with pytest.raises(RuntimeError):
        Line(str(tmp_path / "line"), 0, PROCESSOR, lambda layers: [])


def test_what_waits_for_kv_ends_with_the_line(tmp_path):
    tensors = [torch.zeros(8, 8, dtype=torch.uint8)]
    one, two = both(tmp_path / "line", [tensors, tensors])
    threading.Timer(0.2, one.close).start()
    with pytest.raises(RuntimeError):
        one.receive(1, range(1))
    two.close()


@pytest.mark.parametrize("name", [None, "../x", "stallfree-line-" + "0" * 32, "stallfree-" + "0" * 32])
def test_a_place_that_no_engine_has_made_is_refused(name):
    with pytest.raises(Broken, match="no place .* at which to meet"):
        meetings.meeting_at(name)


def test_a_place_is_there_while_the_ends_meet():
    with meetings.meeting() as path:
        assert path == meetings.meeting_at(path.name)
    with pytest.raises(Broken):
        meetings.meeting_at(path.name)


def test_numbers_in_fewer_bits_take_no_line(made):
    own = made("gloo a")
    assert ("gloo a", "") == tuple(Terms.of(own.executor, "tiny", form).place for form in ("same", "u8"))
    own.close()
