"""How two engines meet. Each proves that it knows the key, without sending it. The prefill side compares the models, block sizes
and KV layouts; a difference is refused with both values. It does not know what is sent afterwards.
"""

import hmac
import secrets
import socket
from dataclasses import asdict, dataclass
from typing import NamedTuple

from stallfree.executors.base import Executor, LinksKV, MovesKV, MovesLayers
from stallfree.transfer.forms import Form
from stallfree.transfer.frames import MOST_BODY, Header, receive, send
from stallfree.transfer.ring import Ring, attach

PROTOCOL = 1
WAY_OUT = (
    "give both the same model, --executor, --sp, --weights, --kv and --transfer-kv, and, if openvino runs it, the same release of "
    "openvino"
)


class Refusal(ValueError):
    """Two engines cannot work together; the message says why."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The facts that both engines must have in common: the `model` and its number formats, `block_size` (tokens), `block_bytes`,
    and the `layout` of these bytes. `transfer_kv`: the form of KV in transfer (`forms`), or "same". Two may differ: `num_layers`,
    the layers of a block, if the engine moves them one by one, else 0; and `place`, where its KV is, if lines can begin there, else
    "".
    """

    model: str
    block_size: int
    block_bytes: int
    layout: str
    transfer_kv: str = "same"
    num_layers: int = 0
    place: str = ""

    @classmethod
    def of(cls, executor: Executor, model: str, transfer_kv: str = "same") -> "Terms":
        """The terms of an engine that runs `model`. Raises ValueError for an executor whose KV cannot be transferred so."""
        if not isinstance(executor, MovesKV):
            raise ValueError(f"{type(executor).__name__} has no KV that can be transferred; take another executor, or --role both")
        if executor.block_bytes > MOST_BODY:
            raise ValueError(f"a KV block of {executor.block_bytes:,} bytes is too large for a KV transfer; at most {MOST_BODY:,}")
        Form.of(transfer_kv, executor)
        num_layers = executor.num_layers if isinstance(executor, MovesLayers) else 0
        place = executor.place if isinstance(executor, LinksKV) and transfer_kv == "same" else ""
        return cls(model, executor.capacity.block_size, executor.block_bytes, executor.layout, transfer_kv, num_layers, place)

    def against(self, other: object) -> str:
        """How these terms, a prefill engine's, differ from a decode engine's `other` terms, and the way out, in words for both;
        empty if they are the same.
        """
        values = {"transfer_kv": "same"} | (other if isinstance(other, dict) else {})  # older releases do not name the form
        names = {"model": "model", "block_size": "block size", "block_bytes": "bytes of a block", "layout": "KV layout"}
        names["transfer_kv"] = "KV in transfer"
        pairs = [(names[f], str(getattr(self, f)), str(values.get(f))[:400]) for f in names]
        differ = [(name, prefill, decode) for name, prefill, decode in pairs if prefill != decode]
        reasons = [f"{name}: {prefill} at the prefill engine, {decode} at the decode engine" for name, prefill, decode in differ]
        return "; ".join([*reasons, WAY_OUT]) if reasons else ""

    def layers_with(self, other: Header) -> int:
        """The layers of a block, if this engine and one of these `other` terms both move them one by one; else 0. Older releases do
        not name them."""
        return self.num_layers if other.get("num_layers") == self.num_layers else 0

    def links_with(self, other: Header) -> bool:
        """Whether a line is possible between this engine and one of these `other` terms on the same machine."""
        place = str(other.get("place", ""))
        return bool(self.place) and self.place != place and self.place.split()[0] == place.partition(" ")[0]


class Met(NamedTuple):
    """What two engines agreed on: the `memory` that both share, if they are on one machine; the layers of a block that they move
    one by one (0: only whole blocks); and whether a line between their devices is possible."""

    memory: memoryview | None
    num_layers: int
    line: bool


def address(host: str, port: int) -> str:
    """host:port, with an IPv6 address in brackets."""
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def welcome(sock: socket.socket, terms: Terms, key: str) -> Met:
    """The prefill side of a meeting. Raises OSError, or Refusal after it has sent the reason."""
    own = secrets.token_hex(16)
    send(sock, {"stallfree": PROTOCOL, "nonce": own})
    hello = receive(sock, 0)[0]
    nonces = f"{own} {hello.get('nonce')}"
    why = ""
    if not _knows(hello, "decode", nonces, key):
        why = "the peer key is wrong or missing; give both sides the same --peer-key"
    elif hello.get("stallfree") != PROTOCOL:
        why = f"KV transfer protocol {PROTOCOL} at the prefill engine, {str(hello.get('stallfree'))[:20]} at the decode engine"
    else:
        why = terms.against(hello.get("terms"))
    if why:
        send(sock, {"refused": why})
        raise Refusal(why)
    memory = attach(hello.get("ring"))
    met = Met(memory, terms.layers_with(hello["terms"]), memory is not None and terms.links_with(hello["terms"]))
    answer = {"proof": _proof("prefill", nonces, key), "ring": memory is not None, "line": met.line}
    send(sock, answer | {"transfer_kv": terms.transfer_kv})
    return met


def introduce(sock: socket.socket, terms: Terms, key: str) -> Met:
    """The decode side of a meeting. Raises OSError or Refusal."""
    hello = receive(sock, 0)[0]
    if hello.get("stallfree") != PROTOCOL:
        raise Refusal(f"the server at that address is not a prefill engine of KV transfer protocol {PROTOCOL}")
    own = secrets.token_hex(16)
    nonces = f"{hello.get('nonce')} {own}"
    ring = Ring()
    try:
        offer = {"stallfree": PROTOCOL, "nonce": own, "proof": _proof("decode", nonces, key)}
        send(sock, offer | {"terms": asdict(terms), "ring": ring.offer})
        answer = receive(sock, 0)[0]
    finally:
        ring.unlink()
    if "refused" in answer:
        raise Refusal(str(answer["refused"])[:2000])
    if not _knows(answer, "prefill", nonces, key):
        raise Refusal("the prefill engine does not know the peer key; give both sides the same --peer-key")
    if (theirs := str(answer.get("transfer_kv", "same"))[:80]) != terms.transfer_kv:  # an older release accepts what it ignores
        raise Refusal(f"KV in transfer: {theirs} at the prefill engine, {terms.transfer_kv} at the decode engine; {WAY_OUT}")
    return Met(
        ring.memory if answer.get("ring") is True else None, terms.num_layers, answer.get("line") is True and bool(terms.place)
    )


def connect(host: str, port: int, terms: Terms, key: str, timeout_s: float) -> tuple[socket.socket, Met]:
    """Connect to the prefill engine at `host`:`port`, and meet it. Returns the socket, and what both agreed on. Raises OSError if
    no prefill engine answers there, and Refusal.
    """
    sock = socket.create_connection((host, port), timeout_s)
    try:
        sock.settimeout(None)
        return sock, introduce(sock, terms, key)
    except BaseException:
        sock.close()
        raise


def _proof(side: str, nonces: str, key: str) -> str:
    return hmac.new(key.encode(), f"{side} {nonces}".encode(), "sha256").hexdigest()


def _knows(header: Header, side: str, nonces: str, key: str) -> bool:
    return hmac.compare_digest(str(header.get("proof")).encode(), _proof(side, nonces, key).encode())
