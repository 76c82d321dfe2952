"""Replicas on a Ray cluster of this machine answer as one server does; their number follows from their use."""

import json
import socket
from hashlib import sha256
from types import SimpleNamespace

import httpx
import pytest

from stallfree.cli.deploy import bounds
from stallfree.core.classes import Classes
from stallfree.engine.assemble import Options
from stallfree.server.keys import Keys
from stallfree.server.tenants import Tenants
from tests.waiting import PATIENCE_S

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")

from stallfree.server.ray_serve import Utilisation, application, wanted  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_replica_answers_as_the_server_does(cluster, tmp_path):
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    (file := tmp_path / "tenants.toml").write_text(
        f'[tenants.jo]\nkeys = ["sha256={sha256(b"jo").hexdigest()}"]\nclass = "batch"\n'
    )
    words = "chat: ttft=1s; batch: ttlt=10min"
    options = Options(executor="simulated", policy="slo", slo=words)
    serve.run(application(options, ["tiny"], 1, 2, 16, Tenants(file, Keys.of("secret"), Classes.parse(words))))
    try:
        key = {"Authorization": "Bearer secret"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=key, timeout=PATIENCE_S) as client:
            assert 401 == client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code
            assert ["tiny"] == [model["id"] for model in client.get("/v1/models").json()["data"]]
            body = {"prompt": "Once", "max_tokens": 5, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                *events, last = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
            assert "[DONE]" == last
            assert 5 == sum(len(json.loads(event)["choices"][0]["text"]) for event in events)
            assert 400 == client.post("/v1/completions", json={"prompt": 3.5}).status_code
            classes = [client.post("/v1/completions", json=body | {"service_tier": name}).status_code for name in ("chat", "slow")]
            assert [200, 400] == classes
            assert 200 == client.get("/load", headers={"Authorization": "Bearer jo"}).status_code
    finally:
        serve.shutdown()


@pytest.mark.parametrize(
    ("used", "now", "expected"),
    [
        ([0.7], 1, 1),
        ([0.71], 1, 1),
        ([0.95], 1, 2),
        ([0.9, 0.9], 2, 3),
        ([0.1, 0.2], 2, 1),
        ([3.0], 1, 5),
        ([0.0], 1, 1),
        ([], 2, 2),
    ],
)
def test_there_are_as_many_replicas_as_are_used_as_wanted(used, now, expected):
    metrics = {"utilisation": {str(i): share for i, share in enumerate(used)}}
    assert expected == wanted(SimpleNamespace(aggregated_metrics=metrics, current_num_replicas=now))[0]


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1-4", (1, 4))])
def test_replicas_are_a_number_or_from_one_to_another(text, expected):
    assert expected == bounds(text)


@pytest.mark.parametrize("text", ["0", "4-1", "a", "1-", "-2", ""])
def test_what_is_no_number_of_replicas_is_refused(text):
    with pytest.raises(ValueError, match="--replicas"):
        bounds(text)


def test_a_replica_is_used_by_the_share_of_the_limit_that_its_iterations_took():
    now = [0.0]
    used = Utilisation(lambda: now[0])
    for seconds, limit in ((0.05, 0.1), (0.2, 0.1), (0.1, None)):
        used.record(SimpleNamespace(t_start=1.0, t_end=1.0 + seconds, limit_s=limit), None)
    now[0] = 1.0
    assert used.read(0.0, 2.0) == pytest.approx(0.025 + 0.2 + 0.1)
    now[0] = 2.0
    assert (0.0, 1.5) == (used.read(0.0, 2.0), used.read(3.0, 2.0))


@pytest.mark.parametrize(("room_s", "expected"), [(0.0, 1.0), (0.1, 0.25), (None, 0.25)])
def test_a_replica_without_room_for_prefill_is_full(room_s, expected):
    assert expected == Utilisation(lambda: 0.0).read(0.5, 2.0, room_s)
