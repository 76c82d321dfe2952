"""Which server a router chooses: by forecasts of the first token, by who has the beginning of a prompt, and after a refusal."""

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace
from urllib.parse import urlsplit

import aiohttp
import pytest

from stallfree.qos.forecast import Late
from stallfree.server import choosing
from stallfree.server.choosing import PIECE, Outline, Prefixes, earliest, outline
from stallfree.server.choosing import Server as Target
from stallfree.server.tenants import FAIRNESS
from tests.server.conftest import SLOW, Server
from tests.server.test_bad_input import CHAT, COMPLETIONS
from tests.server.test_route import Route
from tests.waiting import until


class Session:
    """Answers GET /load of each server (by its host) with what `answers` makes of the number of tokens. An exception is raised.
    `asked`: host and tokens of each question; `headers`: of the last one."""

    def __init__(self, **answers):
        self.answers, self.asked, self.headers = answers, [], {}

    @asynccontextmanager
    async def get(self, url, *, params, headers, timeout):
        assert timeout.total == choosing.ASK_S
        assert "/load" == urlsplit(url).path
        host, tokens = urlsplit(url).hostname, int(params["prompt_tokens"])
        self.model = params.get("model")
        self.asked.append((host, tokens))
        self.headers = headers
        answer = self.answers[host](tokens)
        if isinstance(answer, Exception):
            raise answer

        async def read():
            return {"detail": "Not Found"} if answer is None else answer

        yield SimpleNamespace(status=200 if answer is not None and "error" not in answer else 404, json=read)


def says(seconds: float, per_token: float = 0.0):
    return lambda tokens: {"predicted_ttft_s": seconds + per_token * tokens}


def order(session: Session, servers: list[Target], prompt: Outline | None = None, prefixes=None, headers=None) -> str:
    """The hosts in the order in which they are to be tried, each of one letter."""
    prompt, prefixes = prompt or Outline(100), prefixes or Prefixes()
    chosen = asyncio.run(earliest(session, servers, prompt, prefixes, headers or {}))
    return "".join(urlsplit(server.url).hostname for server in chosen)


def targets(hosts: str) -> list[Target]:
    return [Target(f"http://{host}:8000") for host in hosts]


def completion(prompt, **fields) -> Outline:
    return outline(COMPLETIONS, json.dumps({"prompt": prompt, **fields}).encode())


def test_a_server_that_does_not_have_the_adapter_comes_last():
    lacks = {"error": {"code": "model_not_found", "message": "it is not served here"}}
    session = Session(a=lambda tokens: lacks, b=says(2.0), c=says(1.0))
    assert "cba" == order(session, targets("abc"), Outline(100, model="french"))
    assert "french" == session.model


def test_prompts_for_two_adapters_have_no_prefix_in_common():
    french, dutch = (completion("a" * 3000, model=model) for model in ("french", "dutch"))
    assert french.pieces
    assert not set(french.pieces) & set(dutch.pieces)


def test_the_server_with_the_earliest_first_token_is_first():
    session = Session(a=says(3.0), b=says(1.0), c=says(2.0))
    assert "bca" == order(session, targets("abc"))
    assert [("a", 100), ("b", 100), ("c", 100)] == session.asked


def test_of_equal_forecasts_the_one_with_fewer_requests_is_first():
    servers = targets("ab")
    servers[0].outstanding = 1
    assert "ba" == order(Session(a=says(1.0), b=says(1.0)), servers)


def test_a_server_that_is_down_is_not_asked():
    session, servers = Session(a=says(1.0), b=says(2.0), c=says(3.0)), targets("abc")
    servers[0].up = False
    assert "bc" == order(session, servers)
    assert ["b", "c"] == [host for host, _ in session.asked]


def test_a_lone_server_is_not_asked():
    session = Session(a=says(1.0))
    assert "a" == order(session, targets("a"))
    assert [] == session.asked


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {"server_load": 3},  # vLLM's route of this name
        {"predicted_ttft_s": None},
        {"predicted_ttft_s": "1"},
        {"predicted_ttft_s": float("nan")},
        {"predicted_ttft_s": 10**400},
        [1.0],
        TimeoutError(),
        aiohttp.ClientConnectionError(),
        json.JSONDecodeError("", "", 0),
    ],
)
def test_without_forecasts_the_server_with_the_fewest_requests_is_first(answer):
    servers = targets("abc")
    servers[0].outstanding, servers[1].outstanding = 2, 1
    assert "cba" == order(Session(a=lambda _: answer, b=lambda _: answer, c=lambda _: answer), servers)


@pytest.mark.parametrize(("outstanding", "expected"), [(0, "cab"), (3, "acb")])
def test_the_number_of_requests_decides_between_servers_with_forecasts_and_without(outstanding, expected):
    servers = targets("abc")
    servers[0].outstanding, servers[1].outstanding, servers[2].outstanding = 1, 5, outstanding
    assert expected == order(Session(a=says(1.0), b=says(2.0), c=lambda _: None), servers)


def test_a_request_sent_since_the_question_counts_as_one_more():
    servers = targets("ab")

    def meanwhile(tokens):
        servers[0].sent += 1
        return {"predicted_ttft_s": 1.0}

    assert "ba" == order(Session(a=meanwhile, b=says(1.5)), servers)


def test_a_server_is_asked_about_the_tokens_that_it_has_not_had():
    servers, prefixes, prompt = targets("ab"), Prefixes(), completion("x" * 4 * PIECE)
    prefixes.remember(prompt.pieces[:2], servers[1])
    session = Session(a=says(0.0, 0.01), b=says(0.0, 0.01))
    assert "ba" == order(session, servers, prompt, prefixes)
    (_, whole), (_, rest) = session.asked
    assert whole == PIECE
    assert rest == pytest.approx(whole / 2, rel=0.05)


def test_a_cached_prefix_counts_as_much_as_it_saves():
    servers, prefixes, prompt = targets("ab"), Prefixes(), completion("x" * 4 * PIECE)
    prefixes.remember(prompt.pieces, servers[0])
    saved = 0.01 * PIECE
    assert "ab" == order(Session(a=says(0.8 * saved, 0.01), b=says(0.0, 0.01)), servers, prompt, prefixes)
    assert "ba" == order(Session(a=says(1.2 * saved, 0.01), b=says(0.0, 0.01)), servers, prompt, prefixes)


def test_only_the_headers_that_say_whose_a_request_is_go_with_the_question():
    own = {"authorization": "Bearer k", "x-api-key": "k", FAIRNESS: "jo"}
    session = Session(a=says(1.0), b=says(1.0))
    order(session, targets("ab"), headers=own | {"cookie": "c", "content-length": "9"})
    assert own == session.headers


def test_a_conversation_begins_as_it_did_before():
    first = [{"role": "user", "content": "x" * 2 * PIECE}]
    later = [*first, {"role": "assistant", "content": "y" * PIECE}, {"role": "user", "content": "z"}]
    before, after = (outline(CHAT, json.dumps({"messages": messages}).encode()) for messages in (first, later))
    assert 2 == len(before.pieces)
    assert before.pieces == after.pieces[:2]
    assert 3 == len(after.pieces)


def test_prompts_of_another_salt_or_with_other_tools_share_nothing():
    messages = [{"role": "user", "content": "x" * 2 * PIECE}]
    bodies = [{}, {"cache_salt": "s"}, {"tools": [{"type": "function"}]}]
    outlines = [outline(CHAT, json.dumps({"messages": messages} | body).encode()) for body in bodies]
    assert 3 == len({each.pieces[0] for each in outlines})


def test_prompts_of_another_key_share_nothing():
    keys = [{}, {"authorization": "Bearer a"}, {"authorization": "Bearer b"}, {"x-api-key": "a"}]
    body = json.dumps({"prompt": "x" * 2 * PIECE}).encode()
    assert 4 == len({outline("/v1/completions", body, headers).pieces[0] for headers in keys})


def test_an_outline_has_no_text():
    assert all(isinstance(piece, bytes) and len(piece) == 16 for piece in completion("secret" * PIECE).pieces)


def test_the_last_server_that_got_a_piece_has_it():
    first, second = targets("ab")
    prefixes, pieces = Prefixes(), [b"1", b"2", b"3", b"4"]
    prefixes.remember(pieces[:3], first)
    prefixes.remember(pieces[:1], second)
    assert {second: 1, first: 3} == prefixes.find(pieces)
    assert {} == prefixes.find([b"other", *pieces])


def test_of_what_is_too_much_to_remember_the_end_is_forgotten(monkeypatch):
    monkeypatch.setattr(choosing, "MOST_PIECES", 10)
    server, prefixes = targets("a")[0], Prefixes()
    pieces = [b"%d" % number for number in range(30)]
    prefixes.remember(pieces, server)
    assert 10 == len(prefixes)
    assert {server: 10} == prefixes.find(pieces)


class Forecast:
    """Stands in for an engine's forecast: every first token comes after `seconds`. With `late`, requests are refused."""

    room = backlog = 0.0

    def __init__(self, seconds: float, late: Late | None = None):
        self._seconds, self._late = seconds, late

    def seconds(self, request, cached=0, wait_s=0.0):
        return self._seconds

    def late(self, request, cached=0, wait_s=0.0):
        return self._late

    def enter(self, request, cached=0, wait_s=0.0):
        pass

    def leave(self, id):
        pass


@pytest.fixture
def patient(monkeypatch):
    """A router that waits for forecasts, however slow the machine is."""
    monkeypatch.setattr(choosing, "ASK_S", 300.0)


@pytest.fixture
def pair(patient):
    with Server(SLOW) as first, Server(SLOW) as second, Route(first.url, second.url) as route:
        yield first, second, route
        first.settled()
        second.settled()


def sent(route: Route) -> list[int]:
    return [server.sent for server in route.router.servers]


@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 2.0), [3, 0]), ((2.0, 1.0), [0, 3])])
def test_requests_go_where_their_first_token_is_earliest(pair, seconds, expected):
    *servers, route = pair
    for server, time in zip(servers, seconds, strict=True):
        server.engine_thread.forecast = Forecast(time)
    for _ in range(3):
        assert 200 == route.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code
    assert expected == sent(route)


def test_a_server_that_refuses_leaves_the_request_to_the_next(pair):
    first, second, route = pair
    first.engine_thread.forecast = Forecast(1.0, Late(9.0, 1.0, 8.0))
    second.engine_thread.forecast = Forecast(2.0)
    assert 200 == route.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code
    assert [1, 1] == sent(route)
    assert [1, 0] == [server.outcomes["refused"] for server in route.router.servers]


@pytest.mark.parametrize("waits", [(8.0, 3.0), (3.0, 8.0)])
def test_if_two_refuse_the_client_learns_the_shorter_wait(patient, waits):
    with Server() as first, Server() as second, Server() as third, Route(first.url, second.url, third.url) as route:
        for number, (server, wait) in enumerate(zip((first, second, third), (*waits, 1.0), strict=True)):
            server.engine_thread.forecast = Forecast(float(number), Late(1.0 + wait, 1.0, wait))
        answer = route.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
        assert (429, "3") == (answer.status_code, answer.headers["retry-after"])
        assert [1, 1, 0] == sent(route)


def test_a_lone_servers_refusal_goes_through():
    with Server(SLOW, max_queue=1) as server, Route(server.url) as route:
        server.executor.gate.clear()
        server.engine_thread.forecast = Forecast(1.0, Late(3.0, 1.0, 2.0))
        answer = route.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1})
        assert (429, "2") == (answer.status_code, answer.headers["retry-after"])


def test_a_client_that_shares_a_prompt_goes_where_it_is_cached(pair):
    first, second, route = pair
    for server in (first, second):
        server.engine_thread.forecast = Forecast(1.0)
        server.engine_thread.forecast.seconds = lambda request, cached=0, wait_s=0.0: 0.001 * len(request.prompt)
    second.executor.gate.clear()
    first.executor.gate.clear()
    body = {"prompt": "x" * 3 * PIECE, "max_tokens": 1}
    threads = [threading.Thread(target=route.client.post, args=(COMPLETIONS,), kwargs={"json": body}) for _ in range(3)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        until(lambda number=number: sum(sent(route)) == number)
    assert [3, 0] == sent(route)
    for server in (first, second):
        server.executor.gate.set()
    for thread in threads:
        thread.join()


def test_no_log_line_has_a_prompt(pair, caplog):
    caplog.set_level("DEBUG")
    body = {"prompt": "hush" * (PIECE // 2), "max_tokens": 1, "cache_salt": "hush"}
    assert 200 == pair[2].client.post(COMPLETIONS, json=body).status_code
    assert not any("hush" in record.getMessage() for record in caplog.records)
