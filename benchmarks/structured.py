"""What does structured output cost, and can a bad schema stop anybody else?

Live HTTP, the embedded model, the default target, a client on the same machine. A default target grows while the machine is slower
than it was at the start, so in (b) the server is told to keep the target that it had then.

(a) 16 plain streams, and beside them 16 more: plain ones, then such with a JSON schema, in turn. The time of an iteration, from the
    server's records. Wanted: at most 1.03 times.
(b) 16 plain streams, while 200 requests with bombs come at once: deep recursion, huge enums, regular expressions that backtrack or
    repeat without end. Wanted: no gap of a plain stream above the target, /health within 50 ms at P99, and every bomb answered with
    400, or served, within 2 s.
(c) The first token of a lone request with a schema that is known, beside one without. Wanted: at most 5 ms later.

    python benchmarks/structured.py [--url URL --model NAME]     # with --url: (b) and (c) on another server
"""

import asyncio
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import numpy as np
from harness import machine, parser, show
from host_stalls import gaps, health

from stallfree.bench.server import server
from stallfree.core.record import StepRecord
from stallfree.engine.recording import load

CHAT = "/v1/chat/completions"
STREAMS, BOMBS = 16, 200
TIMES = 1.03
FIRST_TOKEN_MS, HEALTH_MS, ANSWER_S = 5.0, 50.0, 2.0
SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "minItems": 200,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 40},
                    "count": {"type": "integer"},
                    "new": {"type": "boolean"},
                },
                "required": ["name", "count", "new"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def forest(breadth: int, salt: int) -> dict[str, Any]:
    node = {"$ref": "#/$defs/n"}
    members = {f"{letter}{salt}": node for letter in "abcdefghijklmnopqrstuvwxyz"[:breadth]}
    return {"$defs": {"n": {"type": "object", "properties": members, "additionalProperties": node}}, **node}


def bomb(number: int) -> dict[str, Any]:
    """A bomb of one of eight kinds. No two are equal, so none is remembered."""
    kind, size = number % 8, number // 8
    return [
        {"guided_json": nested(60 + size)},
        {"guided_json": forest(20, size)},
        {"guided_json": {"enum": [f"value-{size}-{i}" for i in range(7000)]}},
        {"guided_json": {"type": "object", "properties": {f"p{size}_{i}": {"type": "string"} for i in range(2500)}}},
        {"guided_regex": f"((((a{{1,{90 + size}}}){{1,100}}){{1,100}}){{1,100}})"},
        {"guided_regex": f"(.*a.{{{20 + size}}})|(.*b.{{25}})|(.*[xyz].{{30}})"},
        {"guided_json": {"type": "string", "pattern": f"^(a+)+{size}$"}},
        {"guided_grammar": f'start: e\ne: e e | e e e | "{size}" | "a" | "(" e ")" | "b"'},
    ][kind]


def body(**fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "A list of things that one finds in a kitchen, with their number."}
    return {"messages": [message], "max_tokens": 1000, "stream": True, **fields}


async def stream(session: aiohttp.ClientSession, times: list[float], fields: dict[str, Any], repeat: bool) -> None:
    """Appends to `times` when each event with text came; nan between two streams."""
    while True:
        async with session.post(CHAT, json=body(**fields)) as response:
            times.append(float("nan"))
            async for line in response.content:
                if b'"content": "' in line and b'"content": ""' not in line:
                    times.append(time.perf_counter())
        if not repeat:
            return


async def first_token(session: aiohttp.ClientSession, fields: dict[str, Any]) -> float:
    """Seconds from a request to its first text."""
    times: list[float] = []
    began = time.perf_counter()
    await stream(session, times, fields | {"max_tokens": 3, "temperature": 0}, repeat=False)
    return next(at for at in times if at == at) - began


def open_session(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0))


async def load_with(url: str, fields: dict[str, Any], seconds: float) -> tuple[float, float]:
    """Serve 16 plain streams and 16 with `fields`. Returns when the measured part began and ended."""
    async with open_session(url) as session:
        plain = {"ignore_eos": True}
        kinds = [plain] * STREAMS + [fields or plain] * STREAMS
        tasks = [asyncio.create_task(stream(session, [], kind, repeat=True)) for kind in kinds]
        await asyncio.sleep(3)
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        ended = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1)
    return began, ended


def iteration_times(records: list[StepRecord], began: float, ended: float) -> list[float]:
    """Times (s) of the iterations of 32 decodes and nothing else between two moments."""
    return [
        r.t_end - r.t_start
        for r in records
        if began <= r.t_start and r.t_end <= ended and len(r.work) == 2 * STREAMS and all(count == 1 for _, _, count in r.work)
    ]


def iterations(seconds: float, turns: int) -> list[dict[str, Any]]:
    schema = {"structured_outputs": {"json": SCHEMA}}
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "run.jsonl"
        with server(["--record", str(record)]) as url:
            parts = [
                (name, asyncio.run(load_with(url, fields, seconds)))
                for _ in range(turns)
                for name, fields in (("plain", {}), ("schema", schema))
            ]
        _, records = load(record)
    medians: dict[str, list[float]] = {"plain": [], "schema": []}
    for name, (began, ended) in parts:
        medians[name].append(median(iteration_times(records, began, ended)))
    ratio = median(b / a for a, b in zip(medians["plain"], medians["schema"], strict=True))
    return [
        {
            "32 decodes": "16 of them with a schema",
            "plain, ms": 1e3 * median(medians["plain"]),
            "with schema, ms": 1e3 * median(medians["schema"]),
            "times": ratio,
            "wanted": TIMES,
            "kept": "yes" if ratio <= TIMES else "NO",
        }
    ]


def bombs(model: str | None) -> list[bytes]:
    """The bodies of the requests with bombs. They are made before the streams begin: it takes up to half a second, in which this
    client would read no stream."""
    named = {} if model is None else {"model": model}
    return [json.dumps(body(**bomb(number), max_tokens=16, **named)).encode() for number in range(BOMBS)]


async def throw(session: aiohttp.ClientSession, data: bytes) -> tuple[str, float]:
    """Send a bomb. Returns its status, and the seconds to its answer (the first byte if it is served)."""
    began = time.perf_counter()
    async with session.post(CHAT, data=data, headers={"Content-Type": "application/json"}) as response:
        await response.content.readany()
        took = time.perf_counter() - began
        await response.read()
        return str(response.status), took


async def beside_bombs(url: str, target: float | None, model: str | None) -> list[dict[str, Any]]:
    plain: dict[str, Any] = {"ignore_eos": True} | ({} if model is None else {"model": model})
    times: list[list[float]] = [[] for _ in range(STREAMS)]
    took: list[float] = []
    bodies = bombs(model)
    async with open_session(url) as session, open_session(url) as other:
        tasks = [asyncio.create_task(stream(session, own, plain, repeat=True)) for own in times]
        tasks.append(asyncio.create_task(health(session, took)))
        await asyncio.sleep(5)
        rows = []
        for name, thrown in (("nothing", []), (f"{BOMBS} bombs at once", bodies)):
            for own in times:
                own.clear()
            took.clear()
            began = time.perf_counter()
            answers = await asyncio.gather(*(throw(other, data) for data in thrown))
            await asyncio.sleep(max(0.0, 10 - (time.perf_counter() - began)))
            between = np.concatenate([gaps(own) for own in times])
            statuses = Counter(status for status, _ in answers)
            slowest = max((seconds for _, seconds in answers), default=0.0)
            longest, health_p99 = float(between.max()), 1e3 * float(np.percentile(took, 99))
            kept = health_p99 <= HEALTH_MS and slowest <= ANSWER_S and set(statuses) <= {"200", "400"}
            rows.append(
                {
                    "beside 16 streams": name,
                    "gap p99, ms": 1e3 * float(np.percentile(between, 99)),
                    "longest gap, ms": 1e3 * longest,
                    "target, ms": None if target is None else 1e3 * target,
                    "/health p99, ms": health_p99,
                    "answers": ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())) or "-",
                    "slowest answer, s": slowest,
                    "kept": "yes" if kept and (target is None or longest <= target) else "NO",
                }
            )
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return rows


async def first_tokens(url: str, number: int, model: str | None) -> list[dict[str, Any]]:
    named = {} if model is None else {"model": model}
    schema = named | {"structured_outputs": {"json": SCHEMA}}
    async with open_session(url) as session:
        for fields in (named, schema, named, schema):
            await first_token(session, fields)
        pairs = [(await first_token(session, named), await first_token(session, schema)) for _ in range(number)]
    later = 1e3 * median(b - a for a, b in pairs)
    return [
        {
            "first token": "a lone request",
            "plain, ms": 1e3 * median(a for a, _ in pairs),
            "with a known schema, ms": 1e3 * median(b for _, b in pairs),
            "later, ms": later,
            "wanted": FIRST_TOKEN_MS,
            "kept": "yes" if later <= FIRST_TOKEN_MS else "NO",
        }
    ]


async def target_of(url: str) -> float:
    async with open_session(url) as session, session.get("/live?since=999999999") as response:
        return float((await response.json())["targets"]["tbt"]["seconds"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--url", help="another server, for (b) and (c)")
    arguments.add_argument("--model", help="the name of its model")
    args = arguments.parse_args()
    facts = machine()
    tables: list[tuple[str, list[dict[str, Any]]]] = []
    if args.url is None:
        tables.append(("(a) An iteration", iterations(5.0 if args.quick else 20.0, 1 if args.quick else 3)))
        with server([]) as url:
            target = asyncio.run(target_of(url))
            tables.append(("(c) The first token", asyncio.run(first_tokens(url, 5 if args.quick else 41, None))))
        with server(["--slo", f"tbt={1e3 * target:g}ms"]) as url:
            tables.append(("(b) Bombs", asyncio.run(beside_bombs(url, target, None))))
    else:
        tables.append(("(b) Bombs", asyncio.run(beside_bombs(args.url, None, args.model))))
        tables.append(("(c) The first token", asyncio.run(first_tokens(args.url, 5 if args.quick else 41, args.model))))
    for title, rows in tables:
        show(title, rows, facts, None)
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, **dict(tables)}, indent=1))


if __name__ == "__main__":
    main()
