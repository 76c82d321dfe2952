"""The parts of a server: an engine in its own thread, the observers of its iterations, and its KV transfers with other engines.

It does not know HTTP: the app over it is in `app.py`. After each iteration one `StallAccount` judges
its record, and every observer gets the record and the account.
"""

import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stallfree.core.classes import Classes
from stallfree.core.record import Refusal, StepRecord
from stallfree.core.slo import Slo
from stallfree.engine.adapters import Library
from stallfree.engine.engine import Engine
from stallfree.engine.thread import EngineThread
from stallfree.grammar.compiling import Grammars
from stallfree.metrics.stalls import StallAccount
from stallfree.server.live import Live
from stallfree.server.metrics import Metrics
from stallfree.server.models import Models
from stallfree.server.reading import BodyLimits, Reader
from stallfree.server.tenants import Tenants
from stallfree.server.traces import Traces
from stallfree.server.watchdog import Watchdog
from stallfree.transfer.asking import Asking
from stallfree.transfer.serving import Serving
from stallfree.transfer.terms import Terms

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")

REASONS = {
    "late": "its first token would have come too late",
    "limit": "a limit of its tenant was exceeded",
    "queue": "the queue was full, or the server was stopping",
}
"""Why requests are refused, by the word in the metrics."""

Observer = Callable[[StepRecord, StallAccount], None]
"""Called in the engine's thread after each iteration, with the record and the account of stalls that has judged it."""


class Service:
    """Serves `engine` under `name`, and owns it. Requests may also name it by one of the `aliases`; answers never do. `policy`: its
    name. `slo`: the targets that judge tokens, those of the first of the `classes` (None: it is the only class, without a name).
    `tenants`: whose requests are whose. `max_queue`: waiting requests. `serve_late`: whether requests are served whose first token
    would come too late, unless they say otherwise.

    `exporter` sends a trace of every request. `sanitize_control_tokens`: whether control tokens that clients write are read as
    text, unless a request says otherwise. `tool_format`: how the model writes tool calls; None: as its template says. `library`:
    the adapters of the engine (None: none). `start` starts the engine and `close` closes it; until then `observers` may be added.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        policy: str,
        slo: Slo | None = None,
        classes: Classes | None = None,
        tenants: Tenants | None = None,
        max_queue: int = 1024,
        serve_late: bool = False,
        exporter: "SpanExporter | None" = None,
        sanitize_control_tokens: bool = False,
        aliases: Sequence[str] = (),
        tool_format: str | None = None,
        library: Library | None = None,
    ):
        self.engine = engine
        self.name = name
        self.names = (name, *aliases)
        self.models = Models(self.names, library or Library(engine.adapters, None))
        self.classes = classes or Classes({"": slo or Slo()})
        self.tenants = tenants or Tenants()
        self.thread = EngineThread(engine, max_queue)
        self.models.library.call = self.thread.call
        self.serve_late = serve_late
        self.watchdog = Watchdog(engine)
        limits = BodyLimits(engine.scheduler.ledger.max_len, max_queue, sanitize_control_tokens, tool_format)
        self.reader = Reader(engine.text, limits, self.models.check)
        self.grammars = Grammars(engine.text)
        self.metrics = Metrics(name, slo)
        credits = getattr(engine.scheduler.policy, "credits", None)
        self.live = Live(policy, slo, credits and credits.ahead)
        self.traces = None if exporter is None else Traces(name, engine.clock, exporter)
        self.asking: Asking | None = None
        self.serving: Serving | None = None
        self._account = StallAccount(slo)
        self._refusals: deque[Refusal] = deque()
        self.observers: list[Observer] = [self.metrics.record, self.live.record]
        if self.traces is not None:
            self.observers.append(self.traces.record)
        engine.record = self._observe

    @property
    def sampling(self) -> dict[str, float]:
        """Sampling defaults of a request, by name: those that a model's authors may recommend."""
        return {name: getattr(self.engine.sampling, name) for name in RECOMMENDED}

    def refused(self, tenant: str, reason: str) -> None:
        """A request of `tenant` was refused. `reason`: one of `REASONS`. The next record tells of it."""
        now = self.engine.clock()
        self.metrics.refuse(tenant, reason)
        self.live.refuse(tenant, now)
        self._refusals.append(Refusal(now, tenant, REASONS[reason]))

    def ask(self, addresses: Sequence[tuple[str, int]], terms: Terms, key: str) -> None:
        """Let the engines at `addresses` (host, port) compute prompts, in turn. Raises Refusal if one of them answers but cannot
        work with this engine.
        """
        self.asking = Asking(self.thread, terms, addresses, key)
        self.asking.check()

    def serve(self, sock: socket.socket, terms: Terms, key: str) -> None:
        """Compute prompts for the engines that connect to `sock`."""
        self.serving = Serving(self.thread, terms, sock, key)

    def start_helpers(self) -> None:
        """Start the processes that read large bodies and try grammars. Without this call, the first of these requests waits for
        them."""
        self.reader.start()
        self.grammars.start()

    def start(self) -> None:
        """Start the engine, its watchdog and the transfers. Call it in the event loop that serves."""
        self.thread.start()
        self.watchdog.start()
        for peers in (self.asking, self.serving):
            if peers is not None:
                peers.start()

    async def close(self) -> None:
        """End the unfinished requests, the transfers, the engine and the reader."""
        for peers in (self.asking, self.serving):
            if peers is not None:
                peers.close()
        await self.thread.close(0)
        self.watchdog.stop()
        self.reader.close()
        self.grammars.close()

    def _observe(self, step: StepRecord) -> None:
        while self._refusals:
            step.refused.append(self._refusals.popleft())
        self._account.record(step)
        for observer in self.observers:
            observer(step, self._account)
