"""A server put together, in the one way that all who serve use: an engine in a thread of its own, those who watch its iterations,
and the other engines that it exchanges prompts with. The app over it is `app.py`'s.

Each iteration is judged once, by one account of stalls; every observer gets the record and that account.
"""

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stallfree.core.record import StepRecord
from stallfree.core.slo import Slo
from stallfree.engine.engine import Engine
from stallfree.engine.thread import EngineThread
from stallfree.metrics.stalls import StallAccount
from stallfree.server.live import Live
from stallfree.server.metrics import Metrics
from stallfree.server.reading import Reader
from stallfree.server.reading import Terms as ReadingTerms
from stallfree.server.traces import Traces
from stallfree.transfer.asking import Asking
from stallfree.transfer.serving import Serving
from stallfree.transfer.terms import Terms

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

Observer = Callable[[StepRecord, StallAccount], None]
"""Called in the engine's thread after each iteration, with its record and the account that has just judged it."""


class Service:
    """`engine` served under `name`. `policy` is a name; `slo`: what tokens are judged by; at most `max_queue` requests wait.

    `exporter` sends a trace of every request. `sanitize_control_tokens`: whether control tokens that clients write are text where a
    request does not say. It owns the engine, which starts with `start` and is closed by `close`; until then `observers` may join.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        policy: str,
        slo: Slo | None = None,
        max_queue: int = 1024,
        exporter: "SpanExporter | None" = None,
        sanitize_control_tokens: bool = False,
    ):
        self.engine = engine
        self.name = name
        self.thread = EngineThread(engine, max_queue)
        self.reader = Reader(engine.text, ReadingTerms(name, engine.scheduler.ledger.max_len, max_queue, sanitize_control_tokens))
        self.metrics = Metrics(name, slo)
        self.live = Live(policy, slo)
        self.traces = None if exporter is None else Traces(name, engine.clock, exporter)
        self.asking: Asking | None = None
        self.serving: Serving | None = None
        self._account = StallAccount(slo)
        self.observers: list[Observer] = [self.metrics.record, self.live.record]
        if self.traces is not None:
            self.observers.append(self.traces.record)
        engine.record = self._observe

    @property
    def sampling(self) -> dict[str, float]:
        """What a request gets that leaves its sampling open, as far as a model's makers may recommend it."""
        return {name: getattr(self.engine.sampling, name) for name in RECOMMENDED}

    def ask(self, addresses: Sequence[tuple[str, int]], terms: Terms, key: str) -> None:
        """Have prompts computed by the engines at `addresses` (host, port), in turns. Raises Refusal for one that is there and
        cannot work with this engine.
        """
        self.asking = Asking(self.thread, terms, addresses, key)
        self.asking.check()

    def serve(self, sock: socket.socket, terms: Terms, key: str) -> None:
        """Compute prompts for the engines that connect to `sock`."""
        self.serving = Serving(self.thread, terms, sock, key)

    def start(self) -> None:
        """Call it in the event loop that serves."""
        self.thread.start()
        for peers in (self.asking, self.serving):
            if peers is not None:
                peers.start()

    async def close(self) -> None:
        """End the requests that are unfinished, and all that was started."""
        for peers in (self.asking, self.serving):
            if peers is not None:
                peers.close()
        await self.thread.close(0)
        self.reader.close()

    def _observe(self, step: StepRecord) -> None:
        self._account.record(step)
        for observer in self.observers:
            observer(step, self._account)
