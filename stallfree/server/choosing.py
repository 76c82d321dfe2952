"""Which server gets a request: the one that forecasts the earliest first token. Each is asked only about the tokens that are not in
its prefix cache. Servers without a forecast are chosen by how few requests they have.

No server says what is in its cache. The router remembers which server last got the beginning of a prompt, as hashes of pieces of
its text. It has no tokenizer and keeps no text.
"""

import asyncio
import json
import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from heapq import merge
from math import inf, isfinite
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp

from stallfree.server.tenants import FAIRNESS

ASK_S = 0.05
"""Seconds that a server has to say its load. Without an answer by then it counts as one that forecasts nothing."""
CHARACTERS = 4
"""Characters per token, a rough guess. Its error is the same for all servers."""
PIECE = 512
"""Characters of the pieces by which prompts are compared: some 128 tokens, a few KV blocks."""
MOST_PIECES = 1 << 16
"""Pieces that are remembered, those used last: 33 million characters of prompts in about 10 MB."""
MOST_NAME = 200
"""Characters of a model's name that a server is asked about."""
KEYS = ("authorization", "x-api-key")
"""Request headers with a key. A server keeps the cached prefixes of each key apart."""
TELLING = (*KEYS, FAIRNESS)
"""Request headers that say whose a request is. A server needs them for its forecast."""
OPENING = ("tools", "system", "instructions")
"""Fields of a body whose text comes before its prompt."""
PROMPTS = ("prompt", "messages", "input")

OUTCOMES = ("answered", "refused", "failed", "broken", "left")
"""How a request ends at a server. `answered`: in full. `refused`: with a status from 400 to 499. `failed`: without an answer, or
with a status from 500. `broken`: in the middle. `left`: its client went away, or the router shut down."""


class Server:
    """A decode server. `up`: whether it answers. `sent`: requests of this router so far; `outstanding`: those that have not ended.
    `outcomes`: how the others ended."""

    def __init__(self, url: str):
        """Raises ValueError if `url` is not an address of http or https."""
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--decode {url!r} is not a server's URL; write http://127.0.0.1:8001, with commas between several")
        self.url = url.strip().rstrip("/").removesuffix("/v1")
        self.up = True
        self.sent = 0
        self.outstanding = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)


class Outline(NamedTuple):
    """What the router reads of a body. `tokens`: about how many its prompts have. `openings`: the events of its stream before the
    first token. `pieces`: for each piece of the prompts' text, a hash of it, of all before it, and of whose it is. `characters`: of
    that text. `model`: its name, "" for none."""

    tokens: int = 0
    openings: int = 0
    pieces: Sequence[bytes] = ()
    characters: int = 1
    model: str = ""


def outline(path: str, body: bytes, headers: Mapping[str, str] = MappingProxyType({})) -> Outline:
    """The outline of a body for `path`; an empty one if the body is malformed, so that a server refuses it. A key in the `headers`
    keeps its pieces apart from those of others."""
    with suppress(ValueError, TypeError, AttributeError, LookupError, RecursionError):
        fields: dict[str, Any] = json.loads(body)
        tokens, openings = _size(path, fields)
        text = json.dumps([fields.get(name) for name in (*OPENING, *PROMPTS)]).encode()
        model = str(fields.get("model") or "")
        whose = [headers.get(name) for name in KEYS]
        piece = _digest(json.dumps([fields.get("cache_salt"), model, whose]).encode(), b"")
        pieces = []
        for start in range(0, len(text) - PIECE + 1, PIECE):
            piece = _digest(text[start : start + PIECE], piece)
            pieces.append(piece)
        return Outline(tokens, openings, pieces, len(text), model)
    return Outline()


class Prefixes:
    """Which server last got a prompt that begins with certain pieces. It remembers `MOST_PIECES`. It does not know when a server
    drops KV, and then a forecast is too early."""

    def __init__(self) -> None:
        self._servers: OrderedDict[bytes, Server] = OrderedDict()

    def __len__(self) -> int:
        return len(self._servers)

    def find(self, pieces: Sequence[bytes]) -> dict[Server, int]:
        """How many of the first `pieces` each server got, as far as no other got them later."""
        counts: dict[Server, int] = {}
        for number, piece in enumerate(pieces, 1):
            if (server := self._servers.get(piece)) is None:
                break
            counts[server] = number
        return counts

    def remember(self, pieces: Sequence[bytes], server: Server) -> None:
        """`server` gets a prompt of these pieces."""
        for piece in reversed(pieces):  # the first piece is the newest, so that a prompt is forgotten from its end
            self._servers[piece] = server
            self._servers.move_to_end(piece)
        while len(self._servers) > MOST_PIECES:
            self._servers.popitem(last=False)


def least_outstanding(servers: Sequence[Server]) -> list[Server]:
    """The servers that are up, those with the fewest outstanding requests first."""
    return sorted((server for server in servers if server.up), key=_outstanding)


async def earliest(
    session: aiohttp.ClientSession, servers: Sequence[Server], prompt: Outline, prefixes: Prefixes, headers: Mapping[str, str]
) -> list[Server]:
    """The servers that are up, those with the earliest first token for `prompt` first. `headers`: of the request. A lone server is
    not asked.

    A server that has been sent another request since it was asked does not know that one yet. Each of these counts as one more
    prompt like this one. If the model is an adapter, a server whose adapter is not in its memory forecasts that it comes later.
    """
    up = least_outstanding(servers)
    if len(up) < 2:
        return up
    cached = prefixes.find(prompt.pieces)
    sent = {server: server.sent for server in up}
    tokens = {server: uncached(prompt, cached.get(server, 0)) for server in up}
    answers = await asyncio.gather(*[forecast(session, server, tokens[server], prompt.model, headers) for server in up])
    seconds = {
        server: expected * (1 + server.sent - sent[server])
        for server, expected in zip(up, answers, strict=True)
        if expected is not None
    }
    forecasting = sorted(seconds, key=lambda server: (seconds[server], server.outstanding))
    others = least_outstanding([server for server in up if server not in seconds])
    # Of the best server of each kind, the one with fewer requests is next: these are all that the two kinds have in common.
    return list(merge(forecasting, others, key=_outstanding))


async def forecast(
    session: aiohttp.ClientSession, server: Server, tokens: int, model: str, headers: Mapping[str, str]
) -> float | None:
    """Seconds until a prompt for `model` of so many uncached tokens, all computed at `server`, would have its first token; inf if
    the server does not have the model, None if it does not say in time. `headers`: of the request.
    """
    telling = {name: headers[name] for name in TELLING if name in headers}
    timeout = aiohttp.ClientTimeout(total=ASK_S)
    with suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError, OverflowError, LookupError, TypeError):
        query = {"prompt_tokens": str(tokens)} | ({"model": model[:MOST_NAME]} if model else {})
        async with session.get(f"{server.url}/load", params=query, headers=telling, timeout=timeout) as answer:
            if answer.status == 404 and (await answer.json())["error"]["code"] == "model_not_found":
                return inf
            load = await answer.json() if answer.status == 200 else None
        seconds = load.get("predicted_ttft_s") if isinstance(load, dict) else None  # vLLM's /load has other keys
        if isinstance(seconds, int | float) and isfinite(seconds):
            return float(seconds)
    return None


def uncached(prompt: Outline, pieces: int) -> int:
    """About how many tokens of `prompt` are not among its first `pieces`; at least 1."""
    return max(1, round(prompt.tokens * (1 - pieces * PIECE / prompt.characters)))


def _size(path: str, fields: dict[str, Any]) -> tuple[int, int]:
    """About how many tokens a body's prompts have, and how many events of its stream come before the first token."""
    n = operator.index(fields.get("n") or 1)
    if path == "/v1/chat/completions":
        return sum(len(json.dumps(message.get("content"))) for message in fields["messages"]) // CHARACTERS, n
    if path in ("/v1/responses", "/v1/messages"):  # two events tell of the answer before its first token
        return len(json.dumps([fields.get("input"), fields.get("system"), fields.get("messages")])) // CHARACTERS, 2
    field = fields.get("prompt") or ""
    prompts = [field] if isinstance(field, str) or isinstance(field[0], int) else field
    tokens = sum(len(prompt) // CHARACTERS if isinstance(prompt, str) else len(prompt) for prompt in prompts)
    return tokens, len(prompts) * n if fields.get("echo") else 0


def _digest(piece: bytes, before: bytes) -> bytes:
    return blake2b(piece, key=before, digest_size=16).digest()


def _outstanding(server: Server) -> int:
    return server.outstanding
