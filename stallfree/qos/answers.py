"""How long answers will be, as far as earlier ones tell: those of the same tenant, or else of all. It knows only lengths."""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from itertools import accumulate

from stallfree.core.request import Request

FIRST = 256.0
"""Tokens of an answer before any was seen."""
WINDOW = 128
"""Answers that are remembered of each tenant, and of all together."""
FEWEST = 8
"""With fewer answers than this, a tenant's answers are taken to be as those of all."""
HIGH = 0.9
"""The share of answers that a cautious guess covers."""
MOST_TENANTS = 1024
"""Tenants that are remembered, those seen last."""


class Lengths:
    """The last `WINDOW` lengths."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._sums: list[int] = []

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, length: int) -> None:
        if len(self._recent) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(length)
        insort(self._sorted, length)
        self._sums = [*accumulate(reversed(self._sorted))]

    def mean_left(self, written: int) -> float:
        """The mean of the tokens that follow, over the answers that were longer than `written`."""
        longer = len(self._sorted) - bisect_right(self._sorted, written)
        return self._sums[longer - 1] / longer - written if longer else 0.0

    def most_left(self, written: int) -> float:
        """The tokens that follow in `HIGH` of the answers that were longer than `written`, at most."""
        first = bisect_right(self._sorted, written)
        longer = len(self._sorted) - first
        return self._sorted[first + int(HIGH * (longer - 1))] - written if longer else 0.0


class Answers:
    """Guesses how many more tokens an answer will have. An answer longer than any seen is taken to go on for a quarter of its
    length."""

    def __init__(self) -> None:
        self._all = Lengths()
        self._tenants: OrderedDict[str, Lengths] = OrderedDict()

    def learn(self, request: Request) -> None:
        """A request has ended. If its answer was cut off, it tells nothing."""
        if request.finish_reason not in ("stop", "length"):
            return
        length, tenant = len(request.output), request.tenant
        self._all.add(length)
        self._tenants.setdefault(tenant, Lengths()).add(length)
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > MOST_TENANTS:
            self._tenants.popitem(last=False)

    def left(self, request: Request) -> float:
        """Tokens that an answer will still have on average, at least 1."""
        return self._bounded(request, self._known(request).mean_left(len(request.output)))

    def most_left(self, request: Request) -> float:
        """Tokens that an answer will hardly exceed from now on, at least 1."""
        return self._bounded(request, self._known(request).most_left(len(request.output)))

    def _known(self, request: Request) -> Lengths:
        own = self._tenants.get(request.tenant)
        return self._all if own is None or len(own) < FEWEST else own

    def _bounded(self, request: Request, left: float) -> float:
        written = len(request.output)
        if not left:
            left = max(written / 4, 0.0 if len(self._all) else FIRST - written)
        return max(1.0, min(left, float(request.max_tokens - written)))
