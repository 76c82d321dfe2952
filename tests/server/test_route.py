"""A prefill server, a decode server and a router, over HTTP: the answer is that of one server."""

import asyncio
import json
import threading
from contextlib import suppress

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from stallfree.server.choosing import OUTCOMES, Outline, outline
from stallfree.server.intake import CUT, HERE, PREFILL
from stallfree.server.prefills import Prefills
from stallfree.server.route import Router, create_router
from stallfree.server.run import bind, configure
from tests.server.conftest import FAST, SLOW, Server, quiet
from tests.waiting import PATIENCE_S, until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Route:
    """A running router."""

    def __init__(self, *urls: str, prefills=()):
        self.router = Router(urls, prefills)
        self.socket = bind("127.0.0.1", 0)
        self._uvicorn = uvicorn.Server(configure(create_router(self.router)))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        await self._uvicorn.serve(sockets=[self.socket])

    def __enter__(self):
        for server in self.router.servers:
            # FastAPI builds its routes at the first request, and switches warnings off meanwhile. Two servers of one process must
            # not do this at once, so each does it here, by a path that needs no key and comes last.
            with suppress(httpx.ConnectError):
                httpx.get(f"{server.url}/live/nothing", timeout=PATIENCE_S)
        self._thread.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.socket.getsockname()[1]}", timeout=PATIENCE_S)
        until(lambda: self._uvicorn.started)
        return self

    def __exit__(self, *_):
        self.client.close()
        self._uvicorn.should_exit = True
        self._thread.join()


def name(server: Server) -> str:
    return f"127.0.0.1:{server.peer_socket.getsockname()[1]}"


@pytest.fixture(scope="module")
def pair():
    """A server that decodes, and the one that prefills for it."""
    with Server(FAST, serves_peers=True) as prefill, Server(FAST, asks=[prefill.peer_socket.getsockname()]) as decode:
        yield decode, prefill
        decode.settled()
        prefill.settled()


def events(text: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert "[DONE]" == lines[-1]
    return [json.loads(line) for line in lines[:-1]]


BODIES = [
    (COMPLETIONS, {"prompt": "x" * 300, "max_tokens": 20}),
    (COMPLETIONS, {"prompt": ["x" * 30, "yyy"], "max_tokens": 9, "n": 2, "logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "y" * 500}], "max_tokens": 7, "logprobs": True, "top_logprobs": 1}),
    (CHAT, {"messages": [{"role": "user", "content": "y"}], "max_tokens": 1}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_the_answer_is_that_of_one_server(server, pair, path, body):
    decode, prefill = pair
    with Route(decode.url, prefills=[name(prefill)]) as route:
        alone, routed = server.post(path, body).json(), route.client.post(path, json=body).json()
        assert (alone["choices"], alone["usage"]) == (routed["choices"], routed["usage"])
        streams = [client.post(path, json=body | {"stream": True}).text for client in (server.client, route.client)]
    alone, routed = ([[c.get("text"), c.get("delta")] for e in events(text) for c in e["choices"]] for text in streams)
    assert sorted(map(str, alone)) == sorted(map(str, routed))
    assert {0} == set(route.router.prefills.pending.values())


def test_prompts_are_computed_by_the_prefill_server(pair):
    decode, _ = pair
    decode.post(COMPLETIONS, {"prompt": "z" * 100, "max_tokens": 5})
    before = decode.client.get("/metrics").text
    assert 'stallfree_kv_transfers_total{outcome="recomputed"} 0.0' in before
    assert 'stallfree_step_tokens_total{phase="prefill"} 0.0' in before
    assert "stallfree_kv_transfer_bytes_total 0.0" not in before
    assert "stallfree_prefill_engines 1.0" in before


def delivered(server: Server) -> float:
    (line,) = (
        line for line in server.client.get("/metrics").text.splitlines() if 'kv_transfers_total{outcome="delivered"}' in line
    )
    return float(line.split()[1])


def test_a_router_that_names_a_prefill_engine_that_is_not_there_fails_no_request(pair, caplog):
    decode, prefill = pair
    before = delivered(decode)
    for _ in range(2):
        assert 200 == decode.post(COMPLETIONS, {"prompt": "a"}, headers={PREFILL: "10.0.0.1:22"}).status_code
    assert before + 2 == delivered(decode)
    (message,) = (record.getMessage() for record in caplog.records if "10.0.0.1:22" in record.getMessage())
    assert name(prefill) in message


def test_a_router_can_have_the_prompt_computed_where_it_is_decoded(server, pair):
    before = delivered(pair[0])
    for target in (server, pair[0]):
        assert 200 == target.post(COMPLETIONS, {"prompt": "a" * 50}, headers={PREFILL: HERE}).status_code
    assert before == delivered(pair[0])
    assert 'stallfree_kv_transfers_total{outcome="recomputed"} 0.0' in pair[0].client.get("/metrics").text


def test_a_server_that_asks_nobody_refuses_to_be_told_whom_to_ask(server):
    answer = server.post(COMPLETIONS, {"prompt": "a"}, headers={PREFILL: "10.0.0.1:22"})
    assert (400, PREFILL) == (answer.status_code, answer.json()["error"]["param"])
    assert "not of --role decode" in answer.json()["error"]["message"]


def test_a_client_cannot_choose_the_prefill_engine_through_a_router(pair):
    with Route(pair[0].url) as route:
        for header in ({PREFILL: "10.0.0.1:22"}, {CUT: "none"}):
            assert 200 == route.client.post(COMPLETIONS, json={"prompt": "a"}, headers=header).status_code


@pytest.mark.parametrize(("path", "body"), BODIES)
@pytest.mark.parametrize("cut", ["1", "16", "50%", "299", "301", "305", "1000"])
def test_at_any_cut_the_answer_is_that_of_one_server(server, pair, path, body, cut):
    alone = server.post(path, body | {"seed": 1}).json()
    there = pair[0].post(path, body | {"seed": 1}, headers={CUT: cut}).json()
    assert (alone["choices"], alone["usage"]) == (there["choices"], there["usage"])


@pytest.mark.parametrize("cut", ["", "0", "-1", "a", "1.5", "0%", "100%", "5 tokens", "9" * 10, "1e3"])
def test_a_cut_that_is_none_is_refused(pair, cut):
    answer = pair[0].post(COMPLETIONS, {"prompt": "a"}, headers={CUT: cut})
    assert (400, CUT) == (answer.status_code, answer.json()["error"]["param"])
    assert "write a number of tokens" in answer.json()["error"]["message"]


def test_a_server_that_asks_nobody_refuses_to_be_told_where_to_cut(server):
    answer = server.post(COMPLETIONS, {"prompt": "a"}, headers={CUT: "5"})
    assert (400, CUT) == (answer.status_code, answer.json()["error"]["param"])


def test_errors_go_through_as_they_are(pair):
    with Route(pair[0].url) as route:
        assert 400 == route.client.post(COMPLETIONS, json={"prompt": 5}).status_code
        assert 400 == route.client.post(COMPLETIONS, content=b"{").status_code
        assert 404 == route.client.post(COMPLETIONS, json={"prompt": "a", "model": "other"}).status_code
        assert 404 == route.client.get("/v1/else").status_code
        assert ["toy"] == [model["id"] for model in route.client.get("/v1/models").json()["data"]]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, "{}"),
        (CHAT, '{"messages": [1]}'),
        (CHAT, '{"messages": [{"role": "user", "content": "a"}], "n": "x", "stream": true}'),
        (COMPLETIONS, '{"prompt": "a", "n": 1.5}'),
        (COMPLETIONS, '{"prompt": [[]], "n": [], "echo": true}'),
        (COMPLETIONS, '{"prompt": ' + "[" * 100_000),
    ],
)
def test_a_malformed_body_is_refused_by_the_server_and_leaves_nothing_behind(pair, path, body):
    decode, prefill = pair
    with Route(decode.url, prefills=[name(prefill)]) as route:
        assert 400 == route.client.post(path, content=body).status_code
        until(lambda: (0, {0}) == (route.router.unfinished, set(route.router.prefills.pending.values())))


def test_the_api_key_is_the_servers_to_check():
    with Server(api_key="secret") as server, Route(server.url) as route:
        answers = [
            route.client.post(COMPLETIONS, json={"prompt": "a"}, headers={"Authorization": f"Bearer {key}"})
            for key in ("wrong", "secret")
        ]
        assert [401, 200] == [answer.status_code for answer in answers]
        assert "Bearer" == answers[0].headers["www-authenticate"]


def test_requests_go_to_the_server_with_the_fewest_and_never_to_one_that_is_down():
    with Server(SLOW) as first, Server(SLOW) as second, Route(first.url, second.url, "http://127.0.0.1:1") as route:
        for server in (first, second):
            server.executor.gate.clear()
        body = {"prompt": "a", "max_tokens": 3}
        threads = [threading.Thread(target=route.client.post, args=(COMPLETIONS,), kwargs={"json": body}) for _ in range(4)]
        for number, thread in enumerate(threads, 1):
            thread.start()
            until(lambda number=number: sum(server.outstanding for server in route.router.servers) == number)
        assert [2, 2, 0] == [server.outstanding for server in route.router.servers]
        for server in (first, second):
            server.executor.gate.set()
        for thread in threads:
            thread.join()
        assert [True, True, False] == [server.up for server in route.router.servers]


def test_the_next_server_answers_for_one_that_went_down():
    with Server() as stays:
        with Server() as goes:
            route = Route(goes.url, stays.url).__enter__()
        answers = [route.client.post(COMPLETIONS, json={"prompt": "a"}).status_code for _ in range(3)]
        route.__exit__()
    assert [200] * 3 == answers


def test_with_no_server_up_the_error_names_them():
    with Route("http://127.0.0.1:1/v1") as route:
        answer = route.client.post(COMPLETIONS, json={"prompt": "a"})
        assert (503, "no decode server answers: http://127.0.0.1:1 is down") == (
            answer.status_code,
            answer.json()["error"]["message"],
        )
        assert 503 == route.client.get("/health").status_code


def test_a_client_that_goes_is_aborted_at_the_server():
    with Server(SLOW) as server, Route(server.url) as route:
        with route.client.stream("POST", COMPLETIONS, json={"prompt": "a", "max_tokens": 1000, "stream": True}) as answer:
            next(answer.iter_raw())
        server.settled()
        assert 1 == server.aborted()


def test_a_server_that_breaks_off_ends_the_stream_in_an_error():
    with Server(SLOW) as server, Route(server.url) as route:
        body = {"prompt": "a", "max_tokens": 1000, "stream": True}
        with quiet(), route.client.stream("POST", COMPLETIONS, json=body) as answer:
            chunks = answer.iter_text()
            next(chunks)
            server.executor.fault = RuntimeError("boom")
            text = "".join(chunks)
    assert "boom" in text
    assert text.endswith("data: [DONE]\n\n")


def test_metrics_count_requests_by_server_and_outcome_and_say_who_is_up():
    nobody = "http://127.0.0.1:1"
    with Server() as server, Route(server.url, nobody) as route:

        def value_of(metric: str, server: str, **labels: str) -> float | None:
            families = text_string_to_metric_families(route.client.get("/metrics").text)
            values = {(s.name, *sorted(s.labels.items())): s.value for family in families for s in family.samples}
            return values.get((f"stallfree_router_{metric}", *sorted({"server": server, **labels}.items())))

        assert (1, 0) == (value_of("server_up", server.url), value_of("server_up", nobody))
        for stream in (True, False):
            assert 200 == route.client.post(COMPLETIONS, json={"prompt": "a", "stream": stream}).status_code
        assert 400 == route.client.post(COMPLETIONS, json={"prompt": 5}).status_code
        server.executor.gate.clear()
        with route.client.stream("POST", COMPLETIONS, json={"prompt": "a", "stream": True}) as answer:
            assert 200 == answer.status_code
            assert 1 == value_of("outstanding_requests", server.url)
        until(lambda: value_of("requests_total", server.url, outcome="left") == 1)
        server.executor.gate.set()
        server.settled()
        outcomes = {outcome: value_of("requests_total", server.url, outcome=outcome) for outcome in OUTCOMES}
    assert {"answered": 2, "refused": 1, "failed": 0, "broken": 0, "left": 1} == outcomes


def test_metrics_say_how_much_is_pending_where(pair):
    with Route(pair[0].url, prefills=[name(pair[1])]) as route:
        assert f'stallfree_router_pending_prompt_tokens{{prefill="{name(pair[1])}"}} 0.0' in route.client.get("/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_what_a_router_does_not_wait_for_ends_in_an_error(stream):
    with Server() as server, Route(server.url) as route:
        server.executor.gate.clear()
        body = {"prompt": "a", "max_tokens": 9, "stream": stream}
        answers, began = [], threading.Event()

        def ask():
            with route.client.stream("POST", COMPLETIONS, json=body) as answer:
                began.set()
                answer.read()
                answers.append(answer)

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: server.engine.scheduler.ledger.running and (began.is_set() or not stream))
        asyncio.run_coroutine_threadsafe(route.router.close(0), route.loop).result()
        thread.join()
        error = events(answers[0].text)[-1]["error"] if stream else answers[0].json()["error"]
        assert (200 if stream else 503, "unavailable") == (answers[0].status_code, error["code"])
        assert "the router is shutting down" == error["message"]
        server.executor.gate.set()
        server.settled()


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match="is not a server's URL"):
        Router([url])


def body_of(path: str, fields: dict[str, object]) -> Outline:
    return outline(path, json.dumps(fields).encode())


def test_the_prefill_engine_with_the_fewest_tokens_pending_is_named():
    engines = Prefills(("a:1", "b:1"))
    long = engines.give(body_of(COMPLETIONS, {"prompt": list(range(100))}))
    short = [engines.give(body_of(CHAT, {"messages": [{"content": "x" * 78}], "n": 2})) for _ in range(2)]
    assert ["a:1", "b:1", "b:1"] == [prompt.named for prompt in (long, *short)]
    assert {"a:1": 100, "b:1": 40} == engines.pending
    for prompt in (long, *short):
        prompt.receive(b"data: {}\n\ndata: {}\n\n")
    assert {"a:1": 0, "b:1": 40} == engines.pending
    short[0].receive(b"data: {}\n\n")
    short[1].computed()
    short[1].computed()
    assert {"a:1": 0, "b:1": 0} == engines.pending
    assert engines.give(None).named is None
    assert "a:1" == engines.give(outline(COMPLETIONS, b"{")).named


def test_while_every_prefill_engine_is_busy_nobody_is_named():
    engines = Prefills(("a:1", "b:2"), spill=50)
    prompts = [engines.give(body_of(COMPLETIONS, {"prompt": list(range(100))})) for _ in range(3)]
    assert ["a:1", "b:2", HERE] == [each.named for each in prompts]
    for each in prompts:
        each.computed()
    assert {"a:1": 0, "b:2": 0} == engines.pending
