"""What a tenant may use, and what it has used: requests and tokens of the last minute, and requests that have not ended.

Times are an argument, in seconds of any clock. It does not know which tenants there are, nor what the engine does.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, floor, inf
from operator import itemgetter

from stallfree.server.errors import ApiError

MINUTE_S = 60
"""Seconds for which a request counts against the limits of a minute."""

UNITS = {"running": "unfinished requests", "requests_per_minute": "requests in a minute", "tokens_per_minute": "tokens in a minute"}
"""What each limit of a tenant counts, in words."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose a request is. `weight`: of its share of the machine. `priority`: the best one that its requests may have (None: any).
    `service_class`: of requests that name none ("": the server's default). The limits, each None if there is none: requests and
    tokens in any minute, and requests `running` at once, waiting ones included.
    """

    name: str
    weight: float = 1.0
    priority: int | None = None
    service_class: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    running: int | None = None

    def priority_of(self, asked: int | None) -> int:
        """The priority of a request that has `asked` for one. Raises ApiError if that is better than the tenant's."""
        if self.priority is None:
            return asked or 0
        if asked is not None and asked < self.priority:
            message = f"priority {asked} is better than {self.priority}, the best of tenant {self.name!r}"
            raise ApiError(400, f"{message}; ask for {self.priority} or more, or leave it out", param="priority")
        return self.priority if asked is None else asked


@dataclass(slots=True)
class _Second:
    """What was used in one second. `at`: its beginning, in whole seconds."""

    at: int
    requests: int = 0
    tokens: int = 0


class Allowance:
    """What one tenant has used. It keeps a count for each second, so its memory does not grow with the number of requests. A second
    counts until a minute after its end, so no minute ever has more than the limit."""

    def __init__(self) -> None:
        self.running = 0
        self._seconds: deque[_Second] = deque()

    def take(self, tenant: Tenant, choices: int, tokens: int, now: float) -> "Charge":
        """Charge a request with so many `choices` and `tokens`, if the limits of `tenant` allow it. Otherwise raises ApiError, and
        nothing is charged: 429 with `Retry-After` while earlier requests use up a limit, 400 if this one alone exceeds it.
        """
        self._forget(now)
        demands = (
            ("running", "n", [self.running], choices),
            ("requests_per_minute", "n", [second.requests for second in self._seconds], 1),
            ("tokens_per_minute", "max_tokens", [second.tokens for second in self._seconds], tokens),
        )
        refusals = [refusal for demand in demands if (refusal := self._refusal(tenant, *demand, now)) is not None]
        if refusals:
            raise max(refusals, key=itemgetter(0))[1]  # the one that holds longest
        second = self._second(now)
        second.requests += 1
        second.tokens += tokens
        self.running += choices
        return Charge(self, second, choices, tokens)

    def add(self, tokens: int, now: float) -> None:
        """Charge tokens that nobody asked for in advance."""
        self._forget(now)
        self._second(now).tokens += tokens

    def _refusal(
        self, tenant: Tenant, name: str, field: str, counts: Sequence[int], wanted: int, now: float
    ) -> tuple[float, ApiError] | None:
        """For how many seconds the limit `name` is exceeded by `wanted` and all `counts` together, and the error that says so. None
        if it is not. `field`: of the body, that asks for so much."""
        limit: int | None = getattr(tenant, name)
        if limit is None or (excess := sum(counts) + wanted - limit) <= 0:
            return None
        unit = UNITS[name]
        if wanted > limit:
            message = f"{wanted:,} {unit} are more than the limit of tenant {tenant.name!r}, {limit:,} ({name}); ask for less"
            return inf, ApiError(400, message, param=field, code="rate_limit_exceeded")
        seconds, otherwise = (1, ", or when one of them has ended") if name == "running" else (self._wait(counts, excess, now), "")
        usage = f"tenant {tenant.name!r} is at {sum(counts):,} {unit}"
        message = f"{usage}; {wanted:,} more would exceed its limit of {limit:,} ({name}); try again in {seconds} s{otherwise}"
        return seconds, ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": str(seconds)})

    def _second(self, now: float) -> _Second:
        if not self._seconds or self._seconds[-1].at < floor(now):
            self._seconds.append(_Second(floor(now)))
        return self._seconds[-1]

    def _forget(self, now: float) -> None:
        while self._seconds and self._seconds[0].at + 1 + MINUTE_S <= now:
            self._seconds.popleft()

    def _wait(self, counts: Sequence[int], excess: int, now: float) -> int:
        """Whole seconds, at least 1, until `excess` of the `counts` of the seconds no longer counts."""
        freed = zip(self._seconds, accumulate(counts), strict=True)
        at = next(second.at for second, total in freed if total >= excess)
        return max(1, ceil(at + 1 + MINUTE_S - now))


class Charge:
    """What a request is charged until it ends. `settle` or `cancel` ends it; later calls of either do nothing."""

    def __init__(self, allowance: Allowance, second: _Second, choices: int, tokens: int):
        self._allowance, self._second, self._choices, self._tokens = allowance, second, choices, tokens
        self._is_open = True

    def settle(self, used: int, now: float) -> None:
        """The request has ended at `now`, and used so many tokens. Those that it did not use are given back. Those that it had not
        asked for count from now on."""
        if self._close():
            self._second.tokens += min(0, used - self._tokens)
            if used > self._tokens:
                self._allowance.add(used - self._tokens, now)

    def cancel(self) -> None:
        """The request was not served. It does not count."""
        if self._close():
            self._second.tokens -= self._tokens
            self._second.requests -= 1

    def _close(self) -> bool:
        was_open, self._is_open = self._is_open, False
        if was_open:
            self._allowance.running -= self._choices
        return was_open
