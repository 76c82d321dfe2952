"""Tenants' shares of the machine, in seconds of service: who may be served before whom.

A fair queue (VTC, arXiv 2401.00588; DLPM, arXiv 2501.14312) whose service is seconds of a cost model over the tenant's weight, so
cached tokens are free and long contexts cost what they cost. The bound that follows is proved in docs/decisions/. It knows neither
priorities nor deadlines.
"""

from collections import OrderedDict
from collections.abc import Mapping, Set

from stallfree.core.request import Request

WINDOW_S = 0.5
"""Seconds of service, over its weight, by which a tenant may be ahead of the one served least and still have credit. Within it,
urgency and cached prefixes decide."""

CLAIM_S = 4.0
"""Seconds of service, over its weight, that a tenant can claim which was served less than others because it asked for less. A
tenant without any request loses its claim."""

MOST_TENANTS = 1024
"""Tenants without a request that are remembered, those seen last."""


class Credits:
    """Seconds of service of each tenant, over its weight. `version`: another one after each change.

    A request is billed at its admission with what it will probably take, because a bill that comes later lets a tenant be served
    twice; the bill grows if it takes more, and is corrected when it ends.
    """

    def __init__(self, window_s: float = WINDOW_S):
        self.window_s = window_s
        self._served: OrderedDict[str, float] = OrderedDict()
        self._bills: dict[Request, float] = {}
        self._backlogged: frozenset[str] = frozenset()
        self._able: frozenset[str] = frozenset()
        self._least = 0.0
        self.version = 0

    @property
    def contended(self) -> bool:
        """Whether several tenants wait."""
        return len(self._backlogged) > 1

    @property
    def billed(self) -> Mapping[Request, float]:
        """The requests with an open bill, and its seconds."""
        return self._bills

    def wait(self, tenants: Set[str], parked: Set[str] = frozenset()) -> None:
        """These `tenants` have requests that want to be served. One that had no request at all begins at the least of the others:
        its idle time gives it no claim. `parked` tenants have requests that cannot be served yet. They keep their claim, and the
        others are not compared with them."""
        served, able, tenants = self._served, tenants, tenants | parked
        if tenants == self._backlogged and able == self._able:
            return
        known = [served[tenant] for tenant in able if tenant in self._backlogged]
        self._least = min(known, default=self._least)
        begin = [tenant for tenant in tenants if tenant not in self._backlogged]
        active = {r.tenant for r in self._bills} if begin else ()
        for tenant in begin:
            claim = CLAIM_S if tenant in active else 0.0
            served[tenant] = max(served.get(tenant, 0.0), self._least - claim)
            served.move_to_end(tenant)
        self._backlogged, self._able = frozenset(tenants), frozenset(able)
        self._find_least()
        while len(served) > MOST_TENANTS + len(tenants):
            served.popitem(last=False)

    def ahead(self, tenant: str) -> float:
        """Seconds over its weight by which a tenant was served more than the least of those that wait."""
        return self._served.get(tenant, self._least) - self._least

    def has(self, tenant: str) -> bool:
        """Whether a tenant has credit."""
        return self.ahead(tenant) <= self.window_s

    def bill(self, request: Request, seconds: float) -> None:
        """Charge a request, which is being served, with at least `seconds` in all."""
        self._charge(request, max(seconds, self._bills.get(request, 0.0)))

    def correct(self, request: Request, seconds: float) -> None:
        """A request is not being served any more, and took `seconds` so far."""
        self._charge(request, seconds)

    def close(self, request: Request) -> None:
        """A request has ended."""
        del self._bills[request]

    def _charge(self, request: Request, seconds: float) -> None:
        more = seconds - self._bills.get(request, 0.0)
        if not more:
            return
        self._bills[request] = seconds
        self._served[request.tenant] = self._served.get(request.tenant, self._least) + more / request.weight
        self._find_least()

    def _find_least(self) -> None:
        self.version += 1
        self._least = min([self._served[tenant] for tenant in self._able], default=self._least)
