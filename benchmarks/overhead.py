"""What does an iteration cost in addition to the model? Scheduling, records, text and HTTP.

First table: `schedule` + `complete` alone, for 256 and 1,000 running requests at 512 tokens of context, with nobody and with
100,000 requests waiting. The limits are 0.5 and 2 ms.

Second table: what the slo policy adds to a fixed budget's time (pricing, ordering, its margin and its refitted prices), with 255
decodes and a long prompt running and 1,000 requests waiting, of one tenant and of a hundred. Each side is the best of seven
alternating rounds, because a shared host changes its speed within seconds. The limit is 0.3 ms.

Third table: room for a prompt of 16,000 tokens in a pool of 100,000 blocks that are all in the prefix cache, so that each block
taken is one evicted: the median of the last hundred prompts of three hundred. The limit is 2 ms.

Fourth table: one model, 32 streams. `live` is a server with 32 HTTP streams: the median period of its iterations, and the part of
it between the end of one run of the executor and the start of the next (complete, detokenise, record, pass on, schedule). `alone`
is the same executor with the same requests in a bare loop of the scheduler: the median time inside the executor. `beside the
model` is (live period - alone) / live period; this includes what the SSE thread takes from the model's two cores while it runs.
The limit is 8 %. The clients are sockets that only count bytes, so that they take little from the same cores.

    python benchmarks/overhead.py
"""

import asyncio
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from harness import machine, parser, show

from stallfree.bench.server import server
from stallfree.core.kv import BlockPool
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.core.policy import Policy
from stallfree.core.record import StepRecord, read
from stallfree.core.request import Request
from stallfree.core.scheduler import Scheduler
from stallfree.engine.assemble import Options, assemble
from stallfree.executors.sampling import Sampling
from stallfree.perf.fitted import Fitted
from stallfree.policies.sarathi import Sarathi
from stallfree.policies.slo import Slo

STREAMS, PROMPT = 32, 64
POLICY_ROUNDS = 7


def answer(plan: Plan) -> StepResult:
    return StepResult(plan.step, {w.id: (1,) for w in plan.work if w.samples}, 0.0)


def scheduler_row(running: int, waiting: int) -> dict[str, Any]:
    scheduler = Scheduler(Sarathi(2048), Capacity(32, 200_000, 8192), Limits(running, 8192))
    for i in range(running):
        scheduler.submit(Request(str(i), range(i * 1000, i * 1000 + 512), 4000))
    while any(not r.output for r in scheduler.ledger.requests.values()):
        plan = scheduler.schedule(0)
        scheduler.complete(plan, answer(plan), 0)
    for i in range(waiting):
        scheduler.submit(Request(f"w{i}", range(80), 10))
    times = []
    for _ in range(200):
        began = time.perf_counter()
        plan = scheduler.schedule(0)
        planned = time.perf_counter()
        result = answer(plan)
        back = time.perf_counter()
        scheduler.complete(plan, result, 0)
        times.append(planned - began + time.perf_counter() - back)
    limit = {256: 0.5, 1000: 2.0}[running]
    return {"running": running, "waiting": waiting, "schedule+complete, ms": statistics.median(times) * 1e3, "limit, ms": limit}


def policy_ms(policy: Policy, cost: Fitted, tenants: int) -> float:
    """Median milliseconds of `schedule` + `complete` in virtual time, 255 decodes, a long prompt and 1,000 requests waiting."""
    scheduler = Scheduler(policy, Capacity(32, 200_000, 8192), Limits(256, 8192))
    for i in range(255):
        scheduler.submit(Request(str(i), range(i * 1000, i * 1000 + 512), 4000, tenant=str(i % tenants)))
    now, times = 0.0, []

    def step() -> None:
        nonlocal now
        began = time.perf_counter()
        plan = scheduler.schedule(now)
        planned = time.perf_counter()
        result = answer(plan)
        now += cost.seconds(plan.shape)
        back = time.perf_counter()
        scheduler.complete(plan, result, now)
        times.append(planned - began + time.perf_counter() - back)

    while any(not r.output for r in scheduler.ledger.requests.values()):
        step()
    scheduler.submit(Request("long", range(8000), 10, arrival=now))
    step()
    for i in range(1000):
        scheduler.submit(Request(f"w{i}", range(80), 10, arrival=now, tenant=str(i % tenants)))
    times.clear()
    for _ in range(100):
        step()
    ledger = scheduler.ledger
    if len(ledger.running) != 256 or len(ledger.queue) < 1000:
        raise RuntimeError(f"{len(ledger.running)} requests are running and {len(ledger.queue)} waiting, not 256 and 1,000")
    return statistics.median(times) * 1e3


def policy_row(tenants: int) -> dict[str, Any]:
    cost = Fitted()
    tbt = 1000 * cost.seconds([(600, 1)] * 255 + [(3000, 64)])
    rounds = [
        (policy_ms(Sarathi(255 + 64), cost, tenants), policy_ms(Slo(f"tbt={tbt:.0f}ms", Fitted()), cost, tenants))
        for _ in range(POLICY_ROUNDS)
    ]
    fixed, slo = (min(side) for side in zip(*rounds, strict=True))
    return {"tenants": tenants, "fixed budget, ms": fixed, "slo, ms": slo, "the policy, ms": slo - fixed, "limit, ms": 0.3}


def eviction_row() -> dict[str, Any]:
    pool, took = BlockPool(100_000, 16), []
    for i in range(300):
        request = Request(str(i), range(100_000 * i, 100_000 * i + 16_000), 1)
        began = time.perf_counter()
        if not pool.grow(request, 16_000):
            raise RuntimeError("blocks that nobody holds were not given")
        took.append(1000 * (time.perf_counter() - began))
        request.num_computed = request.num_planned = 16_000
        pool.commit(request)
        pool.release(request)
    middle = statistics.median(took[-100:])
    return {"blocks": 100_000, "evicted": 1_000, "ms": middle, "limit, ms": 2.0}


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(100, 40_000) for _ in range(PROMPT)] for _ in range(STREAMS)]


async def listen(url: str, prompt: list[int], tokens: int) -> None:
    address = urlparse(url)
    body = json.dumps(
        {"model": "smollm2-135m-instruct", "prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}
    )
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
    last = b""
    while piece := await reader.read(1 << 16):
        last = (last + piece)[-64:]
    if b"[DONE]" not in last:
        raise RuntimeError(f"a stream ended without [DONE]: {last[-200:]!r}")
    writer.close()


def decodes(records: list[StepRecord]) -> list[StepRecord]:
    """The iterations of 32 decodes and nothing else, without the first few."""
    return [r for r in records if len(r.work) == STREAMS and all(count == 1 for _, _, count in r.work)][5:]


def live(tokens: int, folder: Path) -> tuple[float, float]:
    """Median period of an iteration, and median time between runs of the executor, seconds."""
    file = folder / "live.jsonl"

    async def load(url: str) -> None:
        await asyncio.gather(*(listen(url, prompt, tokens) for prompt in prompts()))

    with server(["--slo", "tbt=1s", "--record", str(file)]) as url:  # with this target no stream is kept waiting
        asyncio.run(load(url))
    records = decodes(read(file.read_text().splitlines())[1])
    if len(records) < tokens // 2:
        raise RuntimeError(f"{len(records)} iterations held all {STREAMS} streams and nothing else: too few to tell")
    pairs = [(a, b) for a, b in itertools.pairwise(records) if b.step == a.step + 1]
    return statistics.median(b.t_end - a.t_end for a, b in pairs), statistics.median(b.t_start - a.t_end for a, b in pairs)


def alone(tokens: int) -> float:
    """Median seconds inside the executor for the same iterations."""
    engine = assemble(Options()).engine
    executor, scheduler = engine.executor, engine.scheduler
    for i, prompt in enumerate(prompts()):
        scheduler.submit(Request(str(i), prompt, tokens, sampling=Sampling(temperature=1.0, seed=i)))
    times = []
    while scheduler.ledger.requests:
        plan = scheduler.schedule(0)
        began = time.perf_counter()
        executor.submit(plan)
        result = executor.collect()
        if len(plan.work) == STREAMS and all(w.decode for w in plan.work):
            times.append(time.perf_counter() - began)
        scheduler.complete(plan, result, 0)
    engine.close()
    return statistics.median(times[5:])


def main() -> None:
    args = parser(__doc__).parse_args()
    facts = machine()
    tokens, repeats = (60, 1) if args.quick else (200, 3)
    rows = [scheduler_row(running, waiting) for running in (256, 1000) for waiting in (0, 100_000)]
    show("Scheduler", rows, facts, None)
    policy = [policy_row(tenants) for tenants in (1, 100)]
    show("The slo policy, 256 running and 1,000 waiting", policy, facts, None)
    eviction = eviction_row()
    show("Eviction from the prefix cache", [eviction], facts, None)
    lives, alones = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            (Path(folder) / str(i)).mkdir()
            lives.append(live(tokens, Path(folder) / str(i)))
            alones.append(alone(tokens))
    period, between = (statistics.median(column) for column in zip(*lives, strict=True))
    model = statistics.median(alones)
    row = {
        "streams": STREAMS,
        "live period, ms": period * 1e3,
        "between runs, ms": between * 1e3,
        "between runs, %": 100 * between / period,
        "alone, ms": model * 1e3,
        "beside the model, %": 100 * (period - model) / period,
        "limit, %": 8.0,
    }
    show("32 live HTTP streams", [row], facts, None)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": facts, "scheduler": rows, "policy": policy, "eviction": eviction, "live": row}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
