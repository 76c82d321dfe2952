"""A workload: arrivals and lengths in words, drawn from a seed. The same seed draws the same requests on any machine.

Arrivals, lengths and owners are drawn apart from each other, so at another rate the same requests come in the same order, only
closer. Comparisons of rates then differ in the rate and not in luck.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import Self

import numpy as np

from stallfree.workload import arrivals as processes
from stallfree.workload.arrivals import Arrivals
from stallfree.workload.lengths import Lengths, Pair
from stallfree.workload.mix import Mix
from stallfree.workload.trace import Trace

MOST_REQUESTS = 1_000_000
"""Most requests in one list. More count as a mistake: all are drawn, and a file is opened for each, before the first is sent."""
MOST_ADAPTERS = 1_000_000
"""Most adapters in a workload. Their shares are kept in one array of 8 MB."""
GOLDEN = 0.618034
"""Each next seed begins this share of a trace later, past its end from its begin on. Multiples of the golden ratio are spread
evenly, however many seeds there are."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives `at` (s from the start of the run), with its sizes in tokens, and the numbers of its prompt's prefix
    blocks (see `Prompt`), if the trace has them. `tenant`, `service_class` and `priority`: whose it is, and what it is promised.
    `adapter`: the number of the one that it asks for; "" for none.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    tenant: str = ""
    service_class: str = ""
    priority: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Popular:
    """`number` adapters, of which the k-th most popular is asked for by a share that falls as 1 / k^`zipf`. With 0, all alike."""

    number: int
    zipf: float = 1.0

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"{self.number} adapters are none; give 1 or more, or leave --adapters out")
        if self.number > MOST_ADAPTERS:
            raise ValueError(f"{self.number:,} adapters are more than the limit of {MOST_ADAPTERS:,}; give fewer --adapters")
        if not 0 <= self.zipf <= 10:
            raise ValueError(f"an exponent of {self.zipf:g} for the popularity of adapters is invalid; give 0 to 10")

    def draws(self, rng: np.random.Generator) -> Iterator[str]:
        """An endless series of adapters; the most popular is "0"."""
        edges = np.cumsum(np.arange(1, self.number + 1, dtype=float) ** -self.zipf)
        while True:
            yield from map(str, np.searchsorted(edges, edges[-1] * rng.random(1024), side="right").tolist())


@dataclass(frozen=True, slots=True)
class Workload:
    """`lengths`, and the `arrivals` to draw; None: the times of the trace that is the base of `lengths`, in its order. `mix`: whose
    the requests are; None: as the trace says, or nobody's. `adapters`: which the requests ask for; None: for none.
    """

    lengths: Lengths
    arrivals: Arrivals | None
    mix: Mix | None = None
    adapters: Popular | None = None

    def __post_init__(self) -> None:
        if self.mix is not None and (trace := next((part for part in self.lengths.traces if part.owned), None)) is not None:
            raise ValueError(f"{trace.name} says itself whose its requests are; leave out the mix, or its columns")
        if self.arrivals is None and not (isinstance(self.lengths.base, Trace) and self.lengths.base.times):
            raise ValueError("arrivals as in a trace need lengths from a .csv with a column arrived_at, or from a .jsonl")

    @classmethod
    def parse(
        cls,
        arrivals: str,
        lengths: str,
        max_total: int | None = None,
        mix: str | None = None,
        adapters: Popular | None = None,
    ) -> Self:
        """`arrivals`: "trace", or as in `arrivals.parse`. `lengths`, `max_total`, and the errors: as in `Lengths.parse`. `mix`: as
        in `Mix.parse`."""
        times = None if arrivals == "trace" else processes.parse(arrivals)
        return cls(Lengths.parse(lengths, max_total), times, None if mix is None else Mix.parse(mix), adapters)

    @property
    def classes(self) -> set[str]:
        """The service classes that requests may name."""
        own = set() if self.mix is None else {part.service_class for part in self.mix.parts}
        return (own | {name for trace in self.lengths.traces for name in trace.classes}) - {""}

    def draw(self, rate: float | None, seed: int, *, requests: int | None = None, duration_s: float | None = None) -> list[Arrival]:
        """As `stream`, all in one list. Raises ValueError as it does, and for more than `MOST_REQUESTS`."""
        arrivals = self.stream(rate, seed, requests=requests, duration_s=duration_s)
        number = requests if duration_s is None or rate is None else rate * duration_s
        if self.arrivals is not None and number is not None and number > MOST_REQUESTS:
            raise ValueError(
                f"about {number:,.0f} requests are more than the limit of {MOST_REQUESTS:,} in one run; ask for fewer --requests, "
                "or for a shorter --duration"
            )
        return list(arrivals)

    def stream(
        self, rate: float | None, seed: int, *, requests: int | None = None, duration_s: float | None = None
    ) -> Iterator[Arrival]:
        """`requests` arrivals, or those of the first `duration_s` seconds; without either, a whole trace. They are drawn one by
        one, so that many need no memory. Of a trace, `requests` begin at another place for each `seed`, and with 0 at its begin.

        `rate`: mean arrivals per second, of the distribution; a run's own differs by chance. A trace's times are stretched to it,
        or kept if it is None. Raises ValueError at once for invalid arguments, and at the end if none or too few arrived.
        """
        if rate is not None and not 0 < rate < float("inf"):
            raise ValueError(f"a rate of {rate:g} requests per second is invalid; give one above 0")
        if seed < 0:
            raise ValueError(f"the seed {seed} is negative; give 0 or more")
        if requests is not None and requests < 1:
            raise ValueError(f"{requests} requests are not a workload; ask for at least 1")
        if duration_s is not None and not 0 < duration_s < float("inf"):
            raise ValueError(f"a duration of {duration_s:g} s is invalid; give seconds above 0")
        if self.arrivals is not None and (requests is None) == (duration_s is None):
            raise ValueError("drawn arrivals have no end; give either a number of requests or a duration")
        timing, sizes, owners, popularity = np.random.default_rng(seed).spawn(4)
        lengths = self.lengths
        if self.arrivals is None and isinstance(lengths.base, Trace) and requests is not None:
            number = int(seed * GOLDEN % 1 * len(lengths.base.lengths))
            lengths = replace(lengths, base=lengths.base.begun_at(number))
        rows = lengths.draws(sizes, in_order=self.arrivals is None)
        times = self._times(lengths.base, rate, timing)
        arrivals = (Arrival(at, *row) for at, row in zip(times, rows, strict=False))
        if self.mix is not None:
            arrivals = (
                replace(arrival, tenant=part.tenant, service_class=part.service_class, priority=part.priority)
                for arrival, part in zip(arrivals, self.mix.draws(owners), strict=False)
            )
        if self.adapters is not None:
            named = zip(arrivals, self.adapters.draws(popularity), strict=False)
            arrivals = (replace(arrival, adapter=adapter) for arrival, adapter in named)
        return self._first(arrivals, requests, duration_s)

    @staticmethod
    def _first(arrivals: Iterator[Arrival], requests: int | None, duration_s: float | None) -> Iterator[Arrival]:
        if duration_s is not None:
            arrivals = takewhile(lambda arrival: arrival.at < duration_s, arrivals)
        number = 0
        for arrival in islice(arrivals, requests):
            number += 1
            yield arrival
        if not number:
            raise ValueError(f"nothing arrives in the first {duration_s:g} seconds; give a longer duration or a higher rate")
        if requests is not None and duration_s is None and number < requests:
            raise ValueError(f"the trace has {number} requests that fit, fewer than {requests}; ask for that many or fewer")

    def _times(self, base: Pair | Trace, rate: float | None, rng: np.random.Generator) -> Iterator[float]:
        """`base`: the lengths' base, begun where the seed says."""
        if self.arrivals is None and isinstance(base, Trace) and isinstance(self.lengths.base, Trace):
            stretch = 1.0 if rate is None else self.lengths.base.rate / rate
            return (t * stretch for t in base.times or ())
        if rate is None or self.arrivals is None:
            raise ValueError("drawn arrivals need a rate; give requests per second")
        return self.arrivals.times(rate, rng)
