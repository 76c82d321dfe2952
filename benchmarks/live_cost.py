"""What does the live page cost the server, with nobody and with one page watching, and what do the metrics cost?

The engine runs 50 iterations a second, 20 ms each, with 32 or 256 decodes and a chunk of 64 prefill tokens in each. In the engine's
thread: `record` and `metrics`, microseconds an iteration; `record` with nobody watching and with a page. In the event loop's
thread: `reduce`, microseconds an iteration when a page looks; `look`, milliseconds for one answer without `reduce` (percentiles,
JSON and the app, but not the parsing of HTTP); and `scrape`, milliseconds for one answer of /metrics, without HTTP. A page asks
four times a second. Shares are of the engine's time; the limit is 1 %. In rows with `all late` every token misses its target: the
page's worst case.

    python benchmarks/live_cost.py
"""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from harness import machine, parser, show

from stallfree.core.record import Arrived, StepRecord
from stallfree.core.slo import Slo
from stallfree.engine.assemble import Options, assemble
from stallfree.metrics.stalls import StallAccount
from stallfree.server.app import create_app
from stallfree.server.live import KEPT, Live
from stallfree.server.metrics import Metrics
from stallfree.server.service import Service

ITERATION_S = 0.020
LOOKS_PER_S = 4
PROMPT = 512
LIMIT = 1.0


def records(running: int, number: int) -> list[StepRecord]:
    """`number` iterations of `running` decodes and a chunk of a prompt; all requests arrive in the first."""
    ids = [f"{i:032x}" for i in range(running)]
    arrived = [Arrived(id, 0.0, PROMPT, 10**6, 0) for id in [*ids, "chunked"]]
    return [
        StepRecord(
            step,
            step * ITERATION_S,
            step * ITERATION_S,
            (step + 1) * ITERATION_S,
            work=[(id, PROMPT + step, 1) for id in ids] + [("chunked", 0, 64)],
            emitted=ids,
            cached=[],
            arrived=arrived if step == 0 else [],
            finished=[],
            preempted=[],
            stalled=[],
            num_running=running + 1,
            num_waiting=0,
            free_blocks=1000,
            budget=512,
            reason="the policy's",
        )
        for step in range(number)
    ]


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def each(live: Live, account: StallAccount, steps: list[StepRecord]) -> float:
    """Seconds for one `record`, without the account, which metrics need anyway."""
    recording = 0.0
    for step in steps:
        account.record(step)
        recording += seconds(lambda step=step: live.record(step, account))
    return recording / len(steps)


def looked_at(slo: Slo, steps: list[StepRecord]) -> tuple[float, float, float]:
    """Seconds of a `record`, of reducing one, and of the rest of an answer, while a page looks after every few records."""
    account = StallAccount(slo)
    engine = assemble(Options(executor="simulated")).engine
    engine.clock = lambda: at
    service = Service(engine, "none", policy="sarathi", slo=slo)
    live, app = service.live, create_app(service)
    few = round(1 / ITERATION_S / LOOKS_PER_S)
    recording, reducing, answering = [], [], []
    for i in range(0, len(steps) - few, few):
        some = steps[i : i + few]
        at = some[-1].t_end
        recording.append(each(live, account, some))
        taken, live._unseen = live._unseen, deque()
        reducing.append(seconds(lambda taken=taken: [live._reduce(judged) for judged in taken]) / few)
        answering.append(seconds(lambda since=some[0].step - 1: asyncio.run(ask(app, since))))
    start = seconds(lambda: asyncio.run(asyncio.sleep(0)))
    return statistics.median(recording), statistics.median(reducing), statistics.median(answering) - start


def counted(slo: Slo, steps: list[StepRecord]) -> tuple[float, float]:
    """Seconds of a `record` of the metrics, and of a scrape."""
    metrics, account = Metrics("none", slo), StallAccount(slo)
    ledger = assemble(Options(executor="simulated")).engine.scheduler.ledger

    def record(step: StepRecord) -> None:
        account.record(step)
        metrics.record(step, account)

    recording = [seconds(lambda step=step: record(step)) for step in steps]
    scraping = [seconds(lambda: metrics.expose(ledger, 0.0)) for _ in range(20)]
    return statistics.median(recording), statistics.median(scraping)


async def ask(app: Any, since: int) -> None:
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": "/live", "raw_path": b"/live",
        "query_string": f"since={since}".encode(), "root_path": "", "headers": [], "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }  # fmt: skip
    status = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        status.append(message.get("status"))

    await app(scope, receive, send)
    if status[0] != 200:
        raise RuntimeError(f"/live answered {status[0]}")


def row(running: int, late: bool, number: int) -> dict[str, Any]:
    steps = records(running, number)
    slo = Slo.parse("tbt=10ms" if late else "tbt=100ms")
    alone, account = Live("sarathi", slo), StallAccount(slo)
    each(alone, account, steps[:KEPT])
    unwatched = each(alone, account, steps[KEPT:])
    watched, reduce, look = looked_at(slo, steps)
    counting, scrape = counted(slo, steps)
    per_second = (watched + reduce) / ITERATION_S + look * LOOKS_PER_S
    return {
        "running": running,
        "tokens": "all late" if late else "in time",
        "record, nobody, us": unwatched * 1e6,
        "share, nobody, %": 100 * unwatched / ITERATION_S,
        "record, a page, us": watched * 1e6,
        "reduce, us": reduce * 1e6,
        "look, ms": look * 1e3,
        "ms per second": per_second * 1e3,
        "share, a page, %": 100 * per_second,
        "limit, %": LIMIT,
        "metrics, us": counting * 1e6,
        "scrape, ms": scrape * 1e3,
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    number = KEPT + (500 if args.quick else 4000)
    rows = [row(running, late, number) for running in (32, 256) for late in (False, True)]
    show("The live page", rows, facts, args.json)


if __name__ == "__main__":
    main()
