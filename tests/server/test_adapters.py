"""Adapters are models: requests name them, the list has them, and who has the admin key adds and removes them while others run."""

import asyncio
import json
import threading
from pathlib import Path

import pytest

from stallfree.executors.simulated import Linear
from stallfree.server.keys import Keys
from tests.adapters import made_adapter
from tests.adapting import Adapting
from tests.checkpoint.test_adapter import CONFIG
from tests.server.conftest import SLOW, Server
from tests.server.test_bad_input import CHAT, COMPLETIONS, error_of
from tests.waiting import until

ADMIN = {"Authorization": "Bearer admin-key"}
NAMES = ("dutch", "french", "greek")


class Gated(Adapting):
    """Has the gate of its loads under another name: `gate` is for iterations, as in other servers of these tests."""


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        made_adapter(tmp_path / name, CONFIG, rank=8, seed=number)
    return tmp_path


def serving(shelf: Path, *names: str, cost: Linear | None = None, **options) -> Server:
    options = {"admin": Keys.of("admin-key")} | options
    server = Server(*([cost] if cost else []), executor=Adapting, model=CONFIG, **options)
    for name in names:
        server.library.add(name, server.library.open(name, shelf / name))
    return server


def say(server: Server, model: str | None, max_tokens: int = 4, **headers: str) -> dict:
    body = {"prompt": "Hello", "max_tokens": max_tokens} | ({"model": model} if model else {})
    response = server.client.post(COMPLETIONS, json=body, headers=headers)
    assert 200 == response.status_code, response.text
    return response.json()


def test_an_answer_is_of_the_adapter_that_was_asked_for_and_has_its_name(shelf):
    with serving(shelf, *NAMES) as server:
        answers = {name: say(server, name) for name in (*NAMES, "toy")}
        assert {name: name for name in answers} == {name: answer["model"] for name, answer in answers.items()}
        assert 4 == len({answer["choices"][0]["text"] for answer in answers.values()})


def test_the_sdk_talks_to_three_adapters_at_once(shelf):
    openai = pytest.importorskip("openai")

    async def talk(url: str) -> dict[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:

            async def ask(name: str) -> tuple[str, str]:
                stream = await client.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=30, stream=True
                )
                return name, "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

            models = [model async for model in client.models.list()]
            assert set(NAMES) < {model.id for model in models}
            return dict(await asyncio.gather(*[ask(name) for name in NAMES]))

    with serving(shelf, *NAMES, cost=SLOW) as server:
        texts = asyncio.run(talk(server.url))
        assert 3 == len(set(texts.values()))
        assert all(30 == len(text) for text in texts.values())
        assert set(NAMES) in server.executor.used, "no iteration had all three"


def test_the_list_of_models_has_the_adapters_with_their_parent(shelf):
    with serving(shelf, "dutch") as server:
        models = {model["id"]: model for model in server.client.get("/v1/models").json()["data"]}
        assert ("toy", str(shelf / "dutch")) == (models["dutch"]["parent"], models["dutch"]["root"])
        assert models["toy"]["parent"] is None
        assert models["dutch"] == server.client.get("/v1/models/dutch").json()


def test_the_list_of_adapters_comes_in_parts(shelf):
    with serving(shelf, *NAMES) as server:
        first = server.client.get("/v1/adapters?limit=2").json()
        assert (["dutch", "french"], True) == ([row["id"] for row in first["data"]], first["has_more"])
        rest = server.client.get("/v1/adapters?limit=2&after=french").json()
        assert (["greek"], False) == ([row["id"] for row in rest["data"]], rest["has_more"])


def test_a_name_that_is_not_served_is_a_404_with_the_nearest(shelf):
    with serving(shelf, *NAMES) as server:
        for path, body in ((COMPLETIONS, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            error = error_of(server.client.post(path, json=body | {"model": "frenhc"}), 404)
            assert "model_not_found" == error["code"]
            assert "3 adapters (did you mean 'french'?)" in error["message"]
        assert "model_not_found" == error_of(server.client.get("/v1/models/frenhc"), 404)["code"]


def test_adapters_come_and_go_while_the_server_runs(shelf):
    with serving(shelf) as server:
        made = server.client.post("/v1/adapters", json={"name": "dutch", "path": str(shelf / "dutch")}, headers=ADMIN)
        assert (201, "away", 8) == (made.status_code, made.json()["state"], made.json()["rank"])
        say(server, "dutch")
        (row,) = server.client.get("/v1/adapters").json()["data"]
        assert ("dutch", "toy", "resident", 2, 0) == tuple(row[key] for key in ("id", "parent", "state", "blocks", "requests"))
        gone = server.client.delete("/v1/adapters/dutch", headers=ADMIN)
        assert {"id": "dutch", "object": "adapter", "deleted": True} == gone.json()
        assert 404 == server.client.post(COMPLETIONS, json={"prompt": "a", "model": "dutch"}).status_code
        until(lambda: not server.engine.scheduler.ledger.adapters.known)


def test_the_names_of_vllm_s_routes_work(shelf):
    with serving(shelf) as server:
        load = {"lora_name": "dutch", "lora_path": str(shelf / "dutch")}
        assert 200 == server.client.post("/v1/load_lora_adapter", json=load, headers=ADMIN).status_code
        first = say(server, "dutch")
        assert 409 == server.client.post("/v1/load_lora_adapter", json=load, headers=ADMIN).status_code
        again = load | {"lora_path": str(shelf / "french"), "load_inplace": True}
        response = server.client.post("/v1/load_lora_adapter", json=again, headers=ADMIN)
        assert "Success: LoRA adapter 'dutch' added successfully." == response.text
        assert first["model"] == say(server, "dutch")["model"]
        assert str(shelf / "french") == server.client.get("/v1/models/dutch").json()["root"]
        gone = server.client.post("/v1/unload_lora_adapter", json={"lora_name": "dutch"}, headers=ADMIN)
        assert "Success: LoRA adapter 'dutch' removed successfully." == gone.text


def test_an_adapter_that_is_removed_while_it_serves_finishes_its_answers(shelf):
    with serving(shelf, "dutch", cost=SLOW) as server:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(say(server, "dutch", max_tokens=60)))
        thread.start()
        until(lambda: server.engine.scheduler.ledger.adapters.requests("dutch") == 1)
        server.client.delete("/v1/adapters/dutch", headers=ADMIN)
        assert 404 == server.client.post(COMPLETIONS, json={"prompt": "a", "model": "dutch"}).status_code
        server.client.post("/v1/adapters", json={"name": "dutch", "path": str(shelf / "french")}, headers=ADMIN)
        rows = server.client.get("/v1/adapters").json()["data"]
        assert [("dutch", False, 0), ("dutch", True, 1)] == [(row["id"], row["leaving"], row["requests"]) for row in rows]
        server.client.delete("/v1/adapters/dutch", headers=ADMIN)
        thread.join()
        assert 60 == answers[0]["usage"]["completion_tokens"]
        until(lambda: not server.engine.scheduler.ledger.adapters.known)
        assert [] == server.client.get("/v1/adapters").json()["data"]


CHANGES = [
    ("POST", "/v1/adapters", {"name": "x", "path": "dutch"}),
    ("DELETE", "/v1/adapters/dutch", None),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "dutch"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "dutch"}),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_only_the_admin_key_changes_adapters(shelf, method, path, body):
    with serving(shelf, "dutch", api_key="client-key") as server:
        for headers in ({}, {"Authorization": "Bearer client-key"}, {"Authorization": "Bearer x"}):
            response = server.client.request(method, path, json=body, headers=headers)
            assert "invalid_api_key" == error_of(response, 401)["code"]
        assert ["dutch"] == list(server.library.named)
        assert 401 == server.client.get("/v1/models", headers=ADMIN).status_code  # it opens nothing else


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_without_an_admin_key_nobody_changes_adapters(shelf, method, path, body):
    with serving(shelf, "dutch", admin=None) as server:
        response = server.client.request(method, path, json=body)
        error = error_of(response, 403)
        assert "--admin-key" in error["message"]
        assert ["dutch"] == list(server.library.named)


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"name": "dutch", "path": "french"}, 409, "name", "'dutch' is in use; remove that adapter first"),
        ({"name": "toy", "path": "french"}, 409, "name", "the model's own"),
        ({"name": "a b", "path": "french"}, 400, "name", "a name is 1 to 200"),
        ({"name": "x", "path": "nowhere"}, 400, "path", "nowhere"),
        ({"name": "x", "path": "."}, 400, "path", "adapter_config.json"),
        ({"name": "x", "path": "nan"}, 400, "path", "NaN"),
        ({"name": "x"}, 400, "path", "path"),
        ({"name": "x", "path": "french", "rank": 8}, 400, "rank", "rank"),
        ({"name": "x", "path": "french\0"}, 400, "path", "french"),
    ],
)
def test_what_cannot_be_added_is_refused_by_its_field(shelf, body, status, param, message):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    file = made_adapter(shelf / "nan", CONFIG, rank=8) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))][0, 0] = np.nan
    save_file(tensors, file)
    if "path" in body:
        body = body | {"path": str(shelf / body["path"])}
    with serving(shelf, "dutch") as server:
        error = error_of(server.client.post("/v1/adapters", json=body, headers=ADMIN), status)
        assert param == error["param"]
        assert message in error["message"]
        assert ["dutch"] == list(server.library.named)


@pytest.mark.parametrize(("name", "status"), [("nobody", 404), ("toy", 400)])
def test_what_is_no_adapter_cannot_be_removed(shelf, name, status):
    with serving(shelf, "dutch") as server:
        assert status == server.client.delete(f"/v1/adapters/{name}", headers=ADMIN).status_code


def test_a_load_that_fails_is_an_error_for_its_request_alone(shelf):
    with serving(shelf, "dutch") as server:
        server.executor.fault = OSError(5, "Input/output error")
        response = server.client.post(COMPLETIONS, json={"prompt": "a", "model": "dutch"})
        assert 500 == response.status_code
        assert "adapter 'dutch' cannot be loaded" in response.json()["error"]["message"]
        say(server, "toy")
        say(server, "dutch")


def test_the_page_and_the_metrics_tell_where_adapters_are(shelf):
    with serving(shelf, *NAMES) as server:
        say(server, "dutch")
        server.executor.gate.clear()
        body = {"prompt": "Hello", "max_tokens": 4, "model": "french"}
        thread = threading.Thread(target=server.client.post, args=(COMPLETIONS,), kwargs={"json": body})
        thread.start()
        until(lambda: server.engine.adapters.under_way)
        told = server.client.get("/live").json()["adapters"]
        assert (1, 1, 1, 1) == tuple(told[key] for key in ("resident", "loading", "away", "waiting"))
        assert {"name": "french", "state": "loading", "rank": 8, "requests": 1} == told["rows"][0]
        text = server.client.get("/metrics").text
        assert 'stallfree_adapters{state="loading"} 1.0' in text
        assert "stallfree_adapter_waiting_requests 1.0" in text
        assert "stallfree_adapter_load_seconds_count 1.0" in text
        assert "stallfree_adapter_load_failures_total 0.0" in text
        server.executor.fault = OSError(5, "Input/output error")
        server.executor.gate.set()
        thread.join()
        assert "stallfree_adapter_load_failures_total 1.0" in server.client.get("/metrics").text


def test_a_server_without_adapters_says_nothing_of_them():
    with Server() as server:
        assert server.client.get("/live").json()["adapters"] is None
        assert "stallfree_adapters{" not in server.client.get("/metrics").text
        assert [] == server.client.get("/v1/adapters").json()["data"]


def test_the_load_of_an_adapter_counts_in_the_forecast(shelf):
    with serving(shelf, "dutch") as server:
        assert 404 == server.client.get("/load?model=nobody").status_code
        assert 200 == server.client.get("/load?model=dutch").status_code


def test_every_api_takes_an_adapter(shelf):
    message = [{"role": "user", "content": "Hello"}]
    bodies = {
        CHAT: {"messages": message},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 5},
        "/v1/messages": {"messages": message, "max_tokens": 5},
    }
    with serving(shelf, "dutch") as server:
        for path, body in bodies.items():
            response = server.client.post(path, json=body | {"model": "dutch"})
            assert 200 == response.status_code, response.text
            assert "dutch" == json.loads(response.text)["model"]
        assert {"dutch"} in server.executor.used


def test_replacing_an_adapter_leaves_no_moment_without_one(shelf):
    with serving(shelf, "dutch") as server:
        body = {"lora_name": "dutch", "lora_path": str(shelf / "french"), "load_inplace": True}
        ended, statuses = threading.Event(), set()

        def replace():
            for _ in range(20):
                assert 200 == server.client.post("/v1/load_lora_adapter", json=body, headers=ADMIN).status_code
            ended.set()

        thread = threading.Thread(target=replace)
        thread.start()
        while not ended.is_set():
            statuses.add(server.client.get("/v1/models/dutch").status_code)
        thread.join()
        assert {200} == statuses


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the body is empty or not a JSON object"),
        (b"{", "the body is not JSON"),
        (b'{"name": "x", "path": "y", "nam": 1}', "nam"),
    ],
)
def test_a_body_that_is_none_is_told_as_elsewhere(shelf, raw, message):
    with serving(shelf) as server:
        assert message in error_of(server.client.post("/v1/adapters", content=raw, headers=ADMIN), 400)["message"]


def test_the_admin_key_may_look_at_adapters_too(shelf):
    with serving(shelf, "dutch", api_key="client-key") as server:
        for key, status in (("admin-key", 200), ("client-key", 200), ("x", 401)):
            assert status == server.client.get("/v1/adapters", headers={"Authorization": f"Bearer {key}"}).status_code
