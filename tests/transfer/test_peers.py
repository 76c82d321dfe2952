"""Which peers are let in, and what becomes of a request whose peer breaks the protocol or falls silent."""

import asyncio
import contextlib
import socket
import struct
import threading
import time
from array import array
from dataclasses import replace

import pytest

from stallfree.executors.sampling import Sampling, to_values
from stallfree.transfer import asking, frames, serving
from stallfree.transfer.asking import Asking
from stallfree.transfer.frames import Broken, Link, receive, send
from stallfree.transfer.terms import Refusal, Terms, address, connect, introduce, welcome
from tests.transfer.conftest import (
    Remembering,
    decoding,
    engine,
    expected,
    free,
    prefilling,
    serve,
    terms,
)
from tests.waiting import PATIENCE_S, comes

PROMPT = [i % 251 for i in range(50)]
BLOCK = 64


def blocks(sock, header, first=0, count=1, size=None):
    body = bytes(BLOCK * count if size is None else size)
    send(sock, {"type": "blocks", "number": header["number"], "first": first, "count": count}, body)


def done(sock, header, **fields):
    send(sock, {"type": "done", "number": header["number"], "token": 1, "details": None, "seconds": 0.0} | fields)


def all_blocks(sock, header):
    blocks(sock, header, 0, 13)


def close(sock):
    sock.shutdown(socket.SHUT_RDWR)


MISDEEDS = {
    "goes at once": lambda sock, header: close(sock),
    "goes in the middle": lambda sock, header: (blocks(sock, header, 0, 5), close(sock)),
    "goes in the middle of a frame": lambda sock, header: (sock.sendall(struct.pack("<II", 100, 100) + b"{"), close(sock)),
    "falls silent": lambda sock, header: blocks(sock, header, 0, 5),
    "says that it failed": lambda sock, header: send(sock, {"type": "failed", "number": header["number"], "why": "no room"}),
    "skips blocks": lambda sock, header: blocks(sock, header, 3, 2),
    "repeats blocks": lambda sock, header: (blocks(sock, header, 0, 2), blocks(sock, header, 0, 2)),
    "sends too many blocks": lambda sock, header: blocks(sock, header, 0, 14),
    "sends less than it says": lambda sock, header: blocks(sock, header, 0, 2, BLOCK),
    "sends no number of blocks": lambda sock, header: blocks(sock, header, 0, 0),
    "names memory that is not shared": lambda sock, header: send(
        sock, {"type": "blocks", "number": header["number"], "first": 0, "count": 1, "at": 1 << 40}
    ),
    "ends too early": lambda sock, header: (blocks(sock, header, 0, 5), done(sock, header)),
    "gives a token that there is not": lambda sock, header: (all_blocks(sock, header), done(sock, header, token=256)),
    "gives no token": lambda sock, header: (all_blocks(sock, header), done(sock, header, token=None)),
    "gives details that are none": lambda sock, header: (all_blocks(sock, header), done(sock, header, details=[1, [[2]]])),
    "says what there is not": lambda sock, header: send(sock, {"type": "hello", "number": 0}),
    "says what is no frame": lambda sock, header: sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "says what is no table": lambda sock, header: sock.sendall(struct.pack("<II", 2, 0) + b"[]"),
    "says what is no JSON": lambda sock, header: sock.sendall(struct.pack("<II", 2, 0) + b"{]"),
}


class Peer:
    """A false prefill engine: it connects as a real one does, then does its misdeed to the first prompt that it gets."""

    def __init__(self, own: Terms, misdeed):
        self._own, self._misdeed = own, misdeed
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.address = self._sock.getsockname()[:2]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        sock, _ = self._sock.accept()
        self._sock.close()
        with sock:
            welcome(sock, self._own, "")
            header = {}
            while header.get("type") != "prefill":
                header = receive(sock)[0]
            self._misdeed(sock, header)
            self._over.wait(PATIENCE_S)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize("misdeed", MISDEEDS.values(), ids=MISDEEDS)
def test_a_prompt_that_does_not_come_as_it_must_is_computed_here(misdeed, hurried):
    records = []
    decoder = engine(records=records)

    async def run(address):
        async with decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT])

    with Peer(terms(decoder), misdeed) as peer:
        assert [expected(PROMPT, 6)] == asyncio.run(run(peer.address))
    assert ["r0"] == [id for r in records for id in r.recalled]
    free(decoder)


def test_a_peer_that_lives_and_sends_nothing_is_given_up(hurried, monkeypatch):
    monkeypatch.setattr(asking, "STALE_S", 0.2)
    decoder = engine()
    types = []

    def dawdle(sock, header):
        with contextlib.suppress(OSError):
            for _ in range(6):
                send(sock, frames.ALIVE)
                time.sleep(0.05)
            while True:
                types.append(receive(sock)[0]["type"])

    async def run(address):
        async with decoding(decoder, address) as (thread, asks):
            return await serve(thread, asks, [PROMPT])

    with Peer(terms(decoder), dawdle) as peer:
        assert [expected(PROMPT, 6)] == asyncio.run(run(peer.address))
    assert "cancel" in types
    free(decoder)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (Terms("other", 4, BLOCK, "remembering"), "model: m at the prefill engine, other at the decode engine; give both"),
        (Terms("m", 8, 2 * BLOCK, "remembering"), "block size: 4 at the prefill engine, 8 at the decode engine; bytes of a block"),
        (Terms("m", 4, BLOCK, "f32"), "KV layout: remembering at the prefill engine, f32 at the decode engine"),
    ],
)
def test_an_engine_of_another_kind_is_refused_with_both_values(other, says, caplog):
    async def run():
        async with prefilling(engine()) as (host, port):
            with pytest.raises(Refusal, match="prefill engine 127.0.0.1:[0-9]+: ") as refusal:
                await asyncio.to_thread(Asking(None, other, [(host, port)], "").check)
            await comes(lambda: "was refused" in caplog.text)
            return str(refusal.value)

    assert says in asyncio.run(run())


@pytest.mark.parametrize(("key", "peers_key"), [("", "secret"), ("other", "secret"), ("secret", "")])
def test_without_the_key_nobody_is_let_in_and_learns_nothing(key, peers_key):
    async def run():
        async with prefilling(engine(), key=peers_key) as (host, port):
            with pytest.raises(Refusal, match="--peer-key") as refusal:
                await asyncio.to_thread(connect, host, port, terms(engine()), key, PATIENCE_S)
            return str(refusal.value)

    assert "remembering" not in asyncio.run(run())


def test_with_the_key_one_is_let_in():
    prefiller, decoder = engine(), engine()

    async def run():
        async with prefilling(prefiller, key="secret") as address, decoding(decoder, address, key="secret") as (thread, asks):
            return await serve(thread, asks, [PROMPT])

    assert [expected(PROMPT, 6)] == asyncio.run(run())


def test_a_prefill_engine_that_only_pretends_to_know_the_key_is_not_believed():
    server = socket.create_server(("127.0.0.1", 0))

    def pretend():
        with server.accept()[0] as sock:
            send(sock, {"stallfree": 1, "nonce": "ab"})
            hello = receive(sock)[0]
            send(sock, {"proof": hello["proof"], "ring": False})

    thread = threading.Thread(target=pretend)
    thread.start()
    with server, pytest.raises(Refusal, match="does not know the peer key"):
        connect(*server.getsockname(), terms(engine()), "secret", PATIENCE_S)
    thread.join()


def test_what_is_no_prefill_engine_is_said_to_be_none():
    server = socket.create_server(("127.0.0.1", 0))

    def talk():
        with server.accept()[0] as sock:
            send(sock, {"hello": "world"})

    thread = threading.Thread(target=talk)
    thread.start()
    with server, pytest.raises(Refusal, match="is not a prefill engine"):
        connect(*server.getsockname(), terms(engine()), "", PATIENCE_S)
    thread.join()


def test_whoever_introduces_himself_byte_by_byte_is_shown_out(monkeypatch):
    monkeypatch.setattr(serving, "MEETING_S", 0.3)

    async def run():
        async with prefilling(engine()) as at:
            await asyncio.to_thread(drip, at)

    def drip(at):
        with socket.create_connection(at) as sock, pytest.raises(ConnectionError):  # noqa: PT012  # one of the two finds out
            receive(sock)
            while True:
                sock.sendall(b"\0")
                time.sleep(0.02)
                with contextlib.suppress(BlockingIOError):
                    if not sock.recv(1, socket.MSG_DONTWAIT):
                        raise ConnectionError

    asyncio.run(run())


def test_a_peer_that_was_said_to_be_missing_is_said_to_be_there(hurried, caplog):
    prefiller, decoder = engine(), engine()
    with socket.create_server(("127.0.0.1", 0)) as free_port:
        host, port = free_port.getsockname()

    async def run():
        async with decoding(decoder, (host, port), wait=False) as (_, asks):
            await comes(lambda: "trying again" in caplog.text)
            assert 0 == asks.num_connected
            async with prefilling(prefiller, port=port):
                await comes(lambda: asks.num_connected == 1)
                assert f"prefill engine {host}:{port} is connected, by" in caplog.text

    asyncio.run(run())


def test_a_refusal_is_told_once_for_a_host_until_its_reason_changes_or_it_is_let_in(caplog, monkeypatch):
    own = terms(engine())

    async def run():
        async with prefilling(engine()) as at:
            for model in ("a", "a", "b", "b", "m", "b"):
                await asyncio.to_thread(knock, at, replace(own, model=model))

    def knock(at, own):
        """Connect until the other side closes. If it accepts, a frame without a type makes it close."""
        with socket.create_connection(at) as sock:
            with contextlib.suppress(Refusal):
                introduce(sock, own, "")
                send(sock, {})
            with pytest.raises(Broken, match="closed"):
                listen(sock)

    asyncio.run(run())
    assert ["a", "b", "b"] == [text.split(", ")[1][0] for text in caplog.messages if "was refused" in text]
    monkeypatch.setattr(serving, "CALLERS", 2)
    side = serving.Serving(None, own, None, "")
    assert [True] * 4 == [side._is_news(host, "why") for host in ("a", "b", "c", "a")]
    assert [False, True] == [side._is_news(host, "why") for host in ("a", "b")]


def test_names_that_nobody_has_are_told_once_cut_and_not_without_end(caplog):
    asks = Asking(None, terms(engine()), [("127.0.0.1", 1)], "")
    for name in ["x" * 1000, "x" * 1000, *(f"host:{number}" for number in range(1000))]:
        asks.transfers(name)
    messages = [record.getMessage() for record in caplog.records]
    assert asking.MOST_UNKNOWN == len(messages)
    assert f"'{'x' * 80}', named by a router" in messages[0]
    assert messages[0].endswith(": 127.0.0.1:1")


def test_addresses_of_ipv6_have_brackets():
    assert ["127.0.0.1:80", "[::1]:80"] == [address(host, 80) for host in ("127.0.0.1", "::1")]


def test_an_executor_whose_kv_cannot_be_moved_is_named():
    class Spread:
        capacity = Remembering().capacity

    with pytest.raises(ValueError, match="Spread has no KV that can be transferred"):
        Terms.of(Spread(), "m")


def listen(sock):
    """Receive the other side's signs of life until it closes."""
    while True:
        assert "alive" == receive(sock)[0]["type"]


def prefill_frame(**fields):
    tokens = fields.pop("tokens", [1, 2, 3])
    if "tokens_of_output" in fields:
        fields["tokens"] = fields.pop("tokens_of_output")
    header = {"type": "prefill", "number": 0, "first": 0, "sampling": to_values(Sampling()), "priority": 0, "slo": ""}
    return header | fields, array("i", tokens).tobytes()


@pytest.mark.parametrize(
    "frame",
    [
        prefill_frame(tokens=[1, 256]),
        prefill_frame(tokens=[-1]),
        prefill_frame(sampling={}),
        prefill_frame(sampling=to_values(Sampling()) | {"temperature": "hot"}),
        prefill_frame(sampling=to_values(Sampling()) | {"temprature": 1}),
        prefill_frame(sampling=None),
        prefill_frame(slo="soon"),
        prefill_frame(weight=0),
        prefill_frame(weight="heavy"),
        prefill_frame(tokens_of_output=-1),
        prefill_frame(tokens_of_output="many"),
        prefill_frame(tokens_of_output=None),
        prefill_frame(number=-1),
        prefill_frame(number="x"),
        prefill_frame(first=4),
        (prefill_frame()[0], b"123"),
        ({"type": "taken"}, b""),
        ({"type": "cancel"}, b""),
        ({"type": "please"}, b""),
        ({}, b""),
    ],
)
def test_a_caller_that_says_what_it_must_not_is_cut_off_and_disturbs_nobody(frame):
    prefiller, decoder = engine(), engine()

    async def run():
        async with prefilling(prefiller) as (host, port), decoding(decoder, (host, port)) as (thread, asks):
            sock, _ = await asyncio.to_thread(connect, host, port, terms(decoder), "", PATIENCE_S)
            send(sock, *frame)
            with pytest.raises(Broken, match="closed"):
                await asyncio.to_thread(listen, sock)
            sock.close()
            return await serve(thread, asks, [PROMPT])

    assert [expected(PROMPT, 6)] == asyncio.run(run())


@pytest.mark.parametrize(
    ("tokens", "output", "says"),
    [
        ([], 1, "the prompt is empty"),
        ([1] * 300, 1, "the prompt has 300 tokens"),
        ([1], 0, "max_tokens is 0"),
        ([1], 2**31, "1 prompt tokens and max_tokens 2147483648"),
    ],
)
def test_a_prompt_that_can_never_be_computed_there_is_refused_by_number(tokens, output, says):
    async def run():
        async with prefilling(engine()) as (host, port):
            sock, _ = await asyncio.to_thread(connect, host, port, terms(engine()), "", PATIENCE_S)
            send(sock, *prefill_frame(tokens=tokens, tokens_of_output=output, number=7))
            with sock:
                return (await asyncio.to_thread(receive, sock))[0]

    answer = asyncio.run(run())
    assert ("failed", 7) == (answer["type"], answer["number"])
    assert says in answer["why"]


def test_a_frame_that_is_too_long_is_refused_before_it_is_read():
    sender, receiver = socket.socketpair()
    with sender, receiver:
        sender.sendall(struct.pack("<II", 10, (1 << 32) - 1))
        with pytest.raises(Broken, match="longer than"):
            receive(receiver)


def test_a_frame_goes_ahead_of_those_that_wait():
    with socket.create_server(("127.0.0.1", 0)) as server:
        link = Link(socket.create_connection(server.getsockname()))
        for number, ahead in enumerate((False, False, True, True)):
            link.send({"number": number}, ahead=ahead)
        link.start(lambda *frame: None, lambda why: None)
        with server.accept()[0] as sock:
            assert [2, 3, 0, 1] == [receive(sock)[0]["number"] for _ in range(4)]


def test_a_frame_is_read_as_it_was_sent():
    sender, receiver = socket.socketpair()
    with sender, receiver:
        send(sender, {"a": [1, "é"]}, b"body")
        send(sender, {})
        assert [({"a": [1, "é"]}, b"body"), ({}, b"")] == [receive(receiver)[:2] for _ in range(2)]
