"""What the client measures on this project's server, and on servers that die, fall silent or refuse."""

import asyncio
import json
import time

import pytest

from stallfree.bench.client import Client
from stallfree.bench.dialect import Dialect
from stallfree.bench.load import Load, load
from stallfree.metrics.report import report
from stallfree.workload.workload import Arrival, Workload
from tests.bench.conftest import PAUSE_S, Fake, Hasty, chunk, running
from tests.server.conftest import SLOW, Server
from tests.waiting import PATIENCE_S

FIVE = [Arrival(0.01 * i, 20, 6) for i in range(5)]


def loaded(fake: Fake, arrivals=FIVE, tick=lambda run: None, **options) -> Load:
    async def run():
        async with running(fake, **options) as client:
            return await load(client, await Dialect.probe(client), arrivals, tick)

    return asyncio.run(run())


def failing(failure, **options) -> Load:
    fake = Fake()
    fake.failure = failure
    return loaded(fake, **options)


@pytest.mark.parametrize("key", [None, "secret"])
def test_this_projects_server_gives_every_token_that_was_asked_for_in_order(key):
    arrivals = Workload.parse("poisson", "median=30,p90=90/median=20,p90=60").draw(100, 1, requests=40)

    async def run(url):
        async with Client(url, api_key=key) as client:
            return await load(client, await Dialect.probe(client), arrivals, lambda run: None)

    with Server(api_key=key) as server:
        result = asyncio.run(run(f"{server.url}/v1/"))
        server.settled()
    lines = sorted(result.lines, key=lambda line: int(line.id))
    assert [] == result.problems
    assert [a.output_tokens for a in arrivals] == [len(line.tokens) for line in lines]
    assert [a.prompt_tokens for a in arrivals] == [line.prompt_tokens for line in lines]
    assert all(line.arrival < line.tokens[0] and line.tokens == sorted(line.tokens) for line in lines)
    assert (40, 0, 40) == (report(lines).completed, result.short, result.ended)


def test_requests_say_whose_they_are_and_what_they_were_promised():
    fake = Fake()
    result = loaded(fake, [Arrival(0.0, 20, 6, (), "acme", "batch", 1), Arrival(0.01, 20, 6)])
    mine, nobodys = sorted(fake.bodies[-2:], key=lambda body: "user" not in body)
    assert ("acme", "batch", {"class": "batch"}, 1) == tuple(mine[name] for name in ("user", "service_tier", "slo", "priority"))
    assert nobodys.keys().isdisjoint({"user", "service_tier", "slo", "priority"})
    lines = sorted(result.lines, key=lambda line: line.arrival)
    assert [("acme", "batch", 1), ("", "", 0)] == [(line.tenant, line.service_class, line.priority) for line in lines]


def test_a_wrong_key_is_said_before_the_run():
    async def probe(url):
        async with Client(url, api_key="wrong") as client:
            await Dialect.probe(client)

    with Server(api_key="secret") as server, pytest.raises(ValueError, match="HTTP 401.*API key"):
        asyncio.run(probe(server.url))


def test_requests_are_sent_when_due_though_none_has_ended():
    fake, most = Fake(), []
    fake.failure = "mute"

    def tick(run: Load) -> None:
        most.append(len(run.lines) - run.ended)
        if len(run.lines) == 5:
            fake.over.set()

    assert 5 == report(loaded(fake, tick=tick).lines).completed
    assert 5 == max(most)


def test_requests_that_are_never_answered_time_out():
    async def run():
        fake = Fake()
        fake.failure = "mute"
        async with running(fake, timeout_s=0.2) as client:
            return await load(client, Dialect(None, (0, 100), (0, 1), {}), FIVE, lambda run: None)

    assert {"timeout": 5} == report(asyncio.run(run()).lines).errors


def test_a_stream_that_dies_is_cut_short_and_keeps_its_tokens():
    result = failing("die")
    assert {"cut short": 5} == report(result.lines).errors
    assert [2] * 5 == [len(line.tokens) for line in result.lines]
    assert "no request was completed" in result.problems[0]


def test_refusals_are_counted_by_status_with_the_servers_words():
    result = failing(429)
    assert {"HTTP 429": 5} == report(result.lines).errors
    assert {"HTTP 429": "HTTP 429: too much"} == result.messages


@pytest.mark.parametrize(
    ("events", "kind"),
    [
        ([chunk(), 'data: {"error": {"message": "on fire"}}\n\n'], "server error"),
        ([chunk()], "cut short"),
        (["data: nonsense\n\n"], "malformed"),
    ],
)
def test_streams_that_are_no_completions_are_errors(events, kind):
    fake = Fake()
    fake.events = events
    assert {kind: 5} == report(loaded(fake).lines).errors


def test_requests_that_find_no_server_fail_the_run():
    async def run():
        async with Client("http://127.0.0.1:9") as client:
            return await load(client, Dialect(None, (0, 100), (0, 1), {}), FIVE, lambda run: None)

    result = asyncio.run(run())
    assert {"connection": 5} == report(result.lines).errors
    assert "5 requests found no server: connection: Connection refused" == result.problems[0]


def test_outputs_that_end_early_are_counted():
    assert (5, []) == (failing("stop").short, failing("stop").problems)


def test_a_server_that_takes_text_only_is_measured_too():
    fake = Fake()
    fake.refuse = lambda body: "no ids" if isinstance(body["prompt"], list) else None
    result = loaded(fake)
    assert [(20, 6)] * 5 == [(line.prompt_tokens, len(line.tokens)) for line in result.lines]


ROLE, END, DONE = chunk(""), chunk("", "length"), "data: [DONE]\n\n"


def counted(number: int) -> dict[str, int]:
    return {"prompt_tokens": 20, "completion_tokens": number}


def usage(number: int) -> str:
    return f"data: {json.dumps({'choices': [], 'usage': counted(number)})}\n\n"


def reasoning(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'reasoning_content': text}, 'finish_reason': None}]})}\n\n"


STYLES = {
    "takes continuous usage and ignores it": (
        "at the end",
        lambda n: [ROLE, None, *[chunk()] * n, END, usage(n), DONE],
    ),
    "tells usage as it goes, from 0 on": (
        "in every event",
        lambda n: [
            chunk("", usage=counted(0)),
            None,
            *(chunk(usage=counted(i + 1)) for i in range(n)),
            chunk("", "length", usage=counted(n)),
        ],
    ),
    "tells usage with the reason": ("at the end", lambda n: [ROLE, None, *[chunk()] * n, chunk("", "length", usage=counted(n))]),
    "tells no usage": ("no usage", lambda n: [ROLE, None, *[chunk()] * n, END, DONE]),
    "tells a usage of null": (
        "no usage",
        lambda n: [chunk("", usage=None), None, *[chunk(usage=None)] * n, END, DONE],
    ),
    "packs two tokens in an event": (
        "at the end",
        lambda n: [ROLE, None, *[chunk("ab")] * (n // 2), END, usage(n)],
    ),
    "keeps the connection alive": (
        "at the end",
        lambda n: [": ping\n\n", ROLE, None, *[": ping\n\n", chunk()] * n, "data:\n\n", END, usage(n), DONE],
    ),
    "does not say that it is done": ("no usage", lambda n: [None, *[chunk()] * n, END]),
    "thinks first": (
        "at the end",
        lambda n: [ROLE, None, *[reasoning("hm")] * (n - 1), chunk("a"), END, usage(n), DONE],
    ),
}


@pytest.mark.parametrize(("words", "style"), STYLES.values(), ids=STYLES)
def test_whatever_a_servers_events_are_like_tokens_and_the_first_ones_time_are_right(words, style):
    fake = Fake()
    fake.style = style
    result = loaded(fake)
    assert words in result.server
    assert ([], 0, 0) == (result.problems, result.short, result.long)
    assert [6] * 5 == [len(line.tokens) for line in result.lines]
    assert report(result.lines).ttft_s.p50 > 0.9 * PAUSE_S
    assert all(line.tokens == sorted(line.tokens) for line in result.lines)


def test_a_server_of_which_no_usage_says_that_its_events_are_no_tokens_makes_no_valid_run():
    fake = Fake()
    fake.style = lambda n: [*[chunk()] * (n + 1), chunk("", "length"), DONE]
    result = loaded(fake)
    assert 5 == result.long
    assert "5 requests got more tokens than they asked for" in result.problems[0]
    assert not result.as_dict(report(result.lines))["valid"]


def hasty(ends) -> tuple[Hasty, Load]:
    server = Hasty(ends)

    async def run():
        async with server.client() as client:
            dialect = await Dialect.probe(client) if ends == "kept" else Dialect(None, (0, 100), (0, 1), {})
            return await load(client, dialect, FIVE, lambda run: None)

    return server, asyncio.run(run())


def test_a_kept_connection_that_ends_before_the_first_byte_costs_no_request():
    server, result = hasty("kept")
    assert ({}, [6] * 5) == (report(result.lines).errors, [len(line.tokens) for line in result.lines])
    assert server.requests > server.connections


def test_a_request_is_sent_anew_once_and_no_more():
    server, result = hasty("before")
    assert ({"connection": 5}, 10) == (report(result.lines).errors, server.requests)


def test_a_request_is_not_sent_anew_after_the_first_byte():
    server, result = hasty("within")
    assert ({"cut short": 5}, 5) == (report(result.lines).errors, server.requests)


def test_a_client_behind_its_schedule_fails_the_run():
    result = loaded(Fake(), tick=lambda run: time.sleep(0.06))
    assert 5 == report(result.lines).completed
    assert ["fell behind its own schedule"] == [p[11:39] for p in result.problems]
    assert not result.as_dict(report(result.lines))["valid"]


def test_an_interrupted_run_gives_what_there_is():
    async def run(url):
        async with Client(url) as client:
            dialect = await Dialect.probe(client)
            sent = asyncio.Event()
            arrivals = [*FIVE, Arrival(10 * PATIENCE_S, 5, 5)]
            task = asyncio.create_task(load(client, dialect, arrivals, lambda run: len(run.lines) == 5 and sent.set()))
            await sent.wait()
            task.cancel()
            return await task

    with Server(SLOW) as server:
        result = asyncio.run(run(server.url))
        server.settled()
    assert "interrupted after 5 of 6 requests" in result.problems[0]
    assert 5 == report(result.lines).completed + report(result.lines).unfinished
