"""How much of a prompt a router lets a prefill engine compute: the way with the earliest first token, if it knows enough."""

import asyncio
from math import inf

import pytest

from stallfree.server import choosing, prefills
from stallfree.server.choosing import Outline
from stallfree.server.choosing import Server as Target
from stallfree.server.intake import HERE
from stallfree.server.prefills import Here, Pace, Prefills, ask, tokens_there
from stallfree.transfer.cut import Cut
from tests.server.conftest import FAST, Server
from tests.server.test_choosing import Session, says
from tests.server.test_route import COMPLETIONS, Route, name
from tests.waiting import PATIENCE_S


def seconds(there: int, prompt: int, cached: int, pending: int, rate: float, here: Here) -> float:
    """When the first token comes: the prefill engine computes `there` tokens, and the server the rest, after its own queue."""
    done = (pending + there) / rate if there else 0.0
    return done if there == prompt else max(done, here.wait_s) + (prompt - max(there, cached)) * here.token_s


@pytest.mark.parametrize("prompt", [200, 1000, 5000])
@pytest.mark.parametrize("cached", [0, 100])
@pytest.mark.parametrize("pending", [0, 400, 4000])
@pytest.mark.parametrize("wait_s", [0.0, 0.3, 1.0, 9.0])
@pytest.mark.parametrize("token_s", [0.0001, 0.001, 0.01])
def test_no_other_cut_would_be_sooner_than_the_one_that_is_chosen(prompt, cached, pending, wait_s, token_s):
    case = prompt, cached, pending, 1000.0, Here(wait_s, token_s)
    chosen = tokens_there(*case)
    sizes = [0, prompt, *range(cached + prefills.LEAST, prompt - prefills.LEAST + 1)]
    assert chosen in sizes
    best = min(seconds(there, *case) for there in sizes)
    assert best <= seconds(chosen, *case) <= best + 0.001 * token_s + 0.001


def test_a_prompt_is_cut_where_both_have_done_what_waits():
    assert 250 == tokens_there(500, 0, 0, 1000.0, Here(0.25, 0.0005))
    assert 200 == tokens_there(500, 0, 50, 1000.0, Here(0.25, 0.0005))
    assert 0 == tokens_there(500, 0, 400, 1000.0, Here(0.25, 0.0005))
    assert 500 == tokens_there(500, 0, 0, 1000.0, Here(0.25, 0.05))


def test_a_pace_is_that_of_the_last_prompts_and_is_forgotten():
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.rate is None
    pace.learn(1000, 1.0)
    assert 1000 == pace.rate
    for _ in range(20):
        pace.learn(4000, 1.0)
    assert pytest.approx(4000, rel=0.02) == pace.rate
    now[0] = prefills.FRESH_S + 1
    assert pace.rate is None
    pace.learn(50, 1.0)
    assert 50 == pace.rate


def test_a_pace_is_learned_from_whole_prompts_whose_first_token_is_seen():
    now = [0.0]
    engines = Prefills(["a:1"], clock=lambda: now[0])
    pace = engines.paces["a:1"]
    assert not engines.asks
    whole = engines.give(Outline(1000))
    after = engines.give(Outline(500))
    now[0] = 2.0
    after.computed()  # not a stream
    assert pace.rate is None
    whole.receive(b"data: {}\n\n")
    assert 500 == pace.rate
    assert engines.asks
    part = engines.give(Outline(1000), 0, Here(1.0, 0.0001))
    assert (Cut(percent=50.0), {"a:1": 500}) == (part.cut, engines.pending)
    now[0] = 3.0
    part.receive(b"data: {}\n\n")
    assert (500, {"a:1": 0}) == (pace.rate, engines.pending)


@pytest.mark.parametrize(
    ("here", "named", "cut"), [(None, "a:1", None), (Here(0.0, 0.001), HERE, None), (Here(9.0, 1.0), "a:1", None)]
)
def test_without_a_cut_a_prompt_goes_as_a_whole_or_not_at_all(here, named, cut):
    engines = Prefills(["a:1"])
    engines.paces["a:1"].learn(500, 1.0)
    pending = engines.give(Outline(1000), 0, here)
    assert (named, cut) == (pending.named, pending.cut)
    assert {"a:1": 0 if named == HERE else 1000} == engines.pending
    assert {"prefill": int(named != HERE), "both": 0, "decode": int(named == HERE)} == engines.given
    with pending:
        pass
    assert {"a:1": 0} == engines.pending


def test_a_server_is_asked_how_long_a_prompt_waits_and_what_a_token_takes():
    def asked(answer, tokens=1000):
        return asyncio.run(ask(Session(a=answer), Target("http://a:1"), tokens, "", {}))

    here = asked(says(0.5, 0.002))
    assert (pytest.approx(0.502), pytest.approx(0.002)) == here
    assert (pytest.approx(0.5), 0.0) == asked(lambda tokens: {"predicted_ttft_s": 0.5})
    assert [None] * 3 == [asked(answer) for answer in (lambda tokens: {}, lambda tokens: OSError(), lambda tokens: None)]
    assert asked(lambda tokens: {"error": {"code": "model_not_found"}}) is None
    assert asked(says(0.5, 0.002), 1) is None


class Says:
    """A forecast of 0.25 s, and half a millisecond for each token."""

    backlog = room = 0.0

    def seconds(self, request, cached=0, wait_s=0.0):
        return 0.25 + 0.0005 * (len(request.prompt) - 1)

    def expect(self, request, given):
        pass

    def leave(self, id):
        pass


@pytest.mark.parametrize(("knows", "there", "place"), [(True, 1000, "both"), (False, 2000, "prefill")])
def test_a_router_cuts_a_prompt(knows, there, place, monkeypatch):
    """For texts it guesses a quarter of the tokens that they have here. It names a share, so that the cut is right nevertheless."""
    monkeypatch.setattr(choosing, "ASK_S", PATIENCE_S)
    monkeypatch.setattr(prefills, "FRESH_S", inf)
    with Server(FAST, serves_peers=True) as prefill, Server(FAST, asks=[prefill.peer_socket.getsockname()]) as decode:
        if knows:
            decode.engine_thread.forecast = Says()
        with Route(decode.url, prefills=[name(prefill)]) as route:
            route.router.prefills.paces[name(prefill)].learn(500_000, 500.0)
            assert 200 == route.client.post(COMPLETIONS, json={"prompt": "x" * 2000, "max_tokens": 5}).status_code
            assert f'stallfree_router_prompts_total{{place="{place}"}} 1.0' in route.client.get("/metrics").text
        decode.settled()
        prefill.settled()
        metrics = [server.client.get("/metrics").text for server in (prefill, decode)]
    for text, tokens in zip(metrics, (there, 2000 - there), strict=True):
        assert f'stallfree_step_tokens_total{{phase="prefill"}} {float(tokens)}' in text
