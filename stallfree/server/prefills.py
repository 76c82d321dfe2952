"""Which prefill engine gets a prompt, and how much of it: of three ways, the one with the earliest first token by what the router
knows. That is how many prompt tokens wait at the engine, how fast it was lately, and what the decode server forecasts. It does not
know how long KV is on its way, except as a part of the engine's time.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import NamedTuple, Self

import aiohttp

from stallfree.server.choosing import Outline, Server, forecast
from stallfree.server.intake import HERE
from stallfree.transfer.cut import Cut

LEAST = 128
"""Tokens. A smaller part of a prompt is not worth its fixed costs, on either side."""
MEMORY = 0.8
"""The weight of a prompt in an engine's pace, relative to the next one: about five count."""
FRESH_S = 10.0
"""Seconds after which a pace is forgotten. Then the next whole prompt shows it anew, so that an engine that was slow once is not
avoided for ever."""
PLACES = ("prefill", "both", "decode")
"""Where a prompt is computed: by a prefill engine, in part by one and in part by a decode server, or by a decode server alone."""


class Pace:
    """Prompt tokens per second of one prefill engine, from sending a whole prompt to its first token, with those that waited
    before it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._tokens = self._seconds = 0.0
        self._learned = -inf

    def learn(self, tokens: int, seconds: float) -> None:
        """The engine took `seconds` for so many `tokens`."""
        kept = 0.0 if self.rate is None else MEMORY
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds
        self._learned = self._clock()

    @property
    def rate(self) -> float | None:
        """Tokens per second, above 0; None if it is not known, or not any more."""
        if self._clock() - self._learned > FRESH_S or not self._tokens or not self._seconds:
            return None
        return self._tokens / self._seconds


class Here(NamedTuple):
    """What a decode server forecasts for prompts that it computes: a new one waits `wait_s` seconds, and each of its tokens takes
    `token_s` seconds."""

    wait_s: float
    token_s: float


async def ask(session: aiohttp.ClientSession, server: Server, tokens: int, model: str, headers: Mapping[str, str]) -> Here | None:
    """The forecast of `server` for a prompt of so many uncached `tokens`; None if it has none in time. `headers`: see
    `choosing.forecast`."""
    sizes = (1, tokens)
    one, whole = await asyncio.gather(*[forecast(session, server, size, model, headers) for size in sizes])
    if one is None or whole is None or whole == inf or tokens < 2:
        return None
    return Here(one, max(0.0, whole - one) / (tokens - 1))


def tokens_there(prompt: int, cached: int, pending: int, rate: float, here: Here) -> int:
    """How many of the tokens of a prompt a prefill engine shall compute: none, all, or as many as it has done when the decode
    server would begin. Whichever has the earliest first token. The first `cached` ones are at the decode server. The prefill engine
    has `pending` ones to compute and does `rate` a second.
    """
    part = int(here.wait_s * rate) - pending  # then what waits now is done on both sides
    seconds = {0: here.wait_s + (prompt - cached) * here.token_s, prompt: (pending + prompt) / rate}
    if cached + LEAST <= part <= prompt - LEAST:
        seconds[part] = here.wait_s + (prompt - part) * here.token_s
    return min(seconds, key=seconds.__getitem__)


class Prefills:
    """The prefill engines `names` (host:port). While each has more than `spill` prompt tokens to compute, none gets any more.
    `pending`: the prompt tokens that each still has to compute, as far as this router knows. `given`: prompts so far, by place.
    """

    def __init__(self, names: Iterable[str], spill: float = inf, clock: Callable[[], float] = time.monotonic):
        self.pending = dict.fromkeys(names, 0)
        self.spill = spill
        self.clock = clock
        self.given = dict.fromkeys(PLACES, 0)
        self.paces = {name: Pace(clock) for name in self.pending}

    @property
    def least(self) -> str | None:
        """The engine with the fewest tokens pending; None if there is none."""
        return min(self.pending, key=self.pending.__getitem__, default=None)

    @property
    def asks(self) -> bool:
        """Whether a decode server's forecast would be used for the next prompt."""
        name = self.least
        return name is not None and self.pending[name] <= self.spill and self.paces[name].rate is not None

    def give(self, prompt: Outline | None, cached: int = 0, here: Here | None = None) -> "Pending":
        """Let an engine compute `prompt`, or a part of it if the decode server's forecast `here` is known, or nothing. The first
        `cached` tokens are at the decode server.
        """
        name = self.least
        if name is None or prompt is None:
            return Pending(self, None, 0)
        rate, there = self.paces[name].rate, prompt.tokens
        if self.pending[name] > self.spill:
            there = 0
        elif rate is not None and here is not None:
            there = tokens_there(prompt.tokens, cached, self.pending[name], rate, here)
        if prompt.tokens and not there:
            self.given["decode"] += 1
            return Pending(self, HERE, 0)
        self.given["both" if there < prompt.tokens else "prefill"] += 1
        return Pending(self, name, there, prompt)


class Pending:
    """The `tokens` of a prompt that the prefill engine `named` computes; None: a request without a prompt. They are pending until
    the first token passes, or the request ends. `cut`: where the prompt is cut, if it is. It is a share, because a router only
    guesses how many tokens a text has.
    """

    def __init__(self, prefills: Prefills, named: str | None, tokens: int, prompt: Outline = Outline()):  # noqa: B008  # a tuple
        self.named = named
        self.cut = Cut(percent=100 * tokens / prompt.tokens) if tokens < prompt.tokens else None
        self._prefills, self._tokens, self._openings = prefills, tokens, prompt.openings
        self._is_pending = named in prefills.pending
        if named in prefills.pending:
            self._ahead, self._began = prefills.pending[named], prefills.clock()
            prefills.pending[named] += tokens

    def receive(self, events: bytes) -> None:
        """Count `events` of the stream. The first ones may be openings, without a token."""
        if self._is_pending:
            self._openings -= events.count(b"data: ")
            if self._openings < 0:
                if self.cut is None and self.named is not None:
                    self._prefills.paces[self.named].learn(self._ahead + self._tokens, self._prefills.clock() - self._began)
                self.computed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.computed()

    def computed(self) -> None:
        if self._is_pending and self.named is not None:
            self._prefills.pending[self.named] -= self._tokens
            self._is_pending = False
