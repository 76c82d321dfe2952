"""The live page's routes: what they serve, with which headers, and to whom."""

import threading
import time

import pytest

from stallfree.core.slo import Slo
from stallfree.server.files import FOLDER
from tests.server.conftest import SLOW, Server

FILES = {
    "/": "text/html",
    "/live/page.js": "text/javascript",
    "/live/charts.js": "text/javascript",
    "/live/conversation.js": "text/javascript",
    "/live/turn.js": "text/javascript",
    "/live/stream.js": "text/javascript",
    "/live/settings.js": "text/javascript",
    "/live/announce.js": "text/javascript",
    "/live/adapters.js": "text/javascript",
    "/live/tenants.js": "text/javascript",
    "/live/page.css": "text/css",
    "/live/icon.svg": "image/svg+xml",
    "/live/vendor/uPlot.iife.min.js": "text/javascript",
    "/live/vendor/uPlot.min.css": "text/css",
    "/live/vendor/LICENSE": "text/plain",
}


@pytest.mark.parametrize(("path", "type_"), FILES.items())
def test_every_file_has_its_type_and_may_load_nothing_from_elsewhere(server, path, type_):
    response = server.client.get(path)
    assert (200, f"{type_}; charset=utf-8") == (response.status_code, response.headers["content-type"])
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert "nosniff" == response.headers["x-content-type-options"]


def test_there_is_no_other_file():
    assert {path.rpartition("live/")[2] for path in FILES} - {"/"} | {"index.html"} == {
        file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize(
    "path", ["nothing.js", "vendor", "../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd", "vendor/../../app.py", ""]
)
def test_what_is_no_file_of_the_page_is_not_found(server, path):
    assert 404 == server.client.get(f"/live/{path}").status_code


def test_a_file_that_the_browser_has_is_not_sent_again(server):
    first = server.client.get("/live/page.js")
    assert "no-cache" == first.headers["cache-control"]
    again = server.client.get("/live/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (304, b"") == (again.status_code, again.content)
    assert 200 == server.client.get("/live/page.js", headers={"If-None-Match": '"another"'}).status_code


def test_the_page_names_no_other_host():
    for file in FOLDER.glob("*.*"):
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", ""), file.name


def test_what_is_live_says_what_the_server_is_and_what_has_run():
    with Server(slo=Slo.parse("tbt=100ms")) as server:
        server.post("/v1/completions", {"prompt": "abcd", "max_tokens": 5})
        server.settled()
        response = server.client.get("/live")
        view = response.json()
        assert "no-store" == response.headers["cache-control"]
        assert ("toy", "sarathi", "tbt=100ms@p99", 0.1) == (
            view["model"], view["policy"], view["slo"], view["targets"]["tbt"]["seconds"],
        )  # fmt: skip
        assert [(0, 4), (1, 0), (1, 0), (1, 0), (1, 0)] == [tuple(row[3:5]) for row in view["rows"]]
        assert (0, 0, 1000, 1000) == (view["running"], view["waiting"], view["free_blocks"], view["num_blocks"])
        assert (1, 4) == (view["ttft"]["count"], view["tbt"]["count"])
        last = view["rows"][-1]
        assert last[1] < last[2] < view["now"]
        assert [] == server.client.get("/live", params={"since": last[0]}).json()["rows"]


def test_a_wrong_since_is_named(server):
    response = server.client.get("/live?since=yesterday")
    assert (400, "since") == (response.status_code, response.json()["error"]["param"])


def test_with_a_key_the_page_is_open_but_what_it_shows_is_not():
    with Server(api_key="sesame") as server:
        for path in FILES:
            assert 200 == server.client.get(path).status_code
        for path in ("/live", "/live?key=sesame", "/live?since=3"):
            response = server.client.get(path)
            assert (401, "invalid_api_key") == (response.status_code, response.json()["error"]["code"])
            assert "sesame" not in response.text
        assert 200 == server.client.get("/live", headers={"Authorization": "Bearer sesame"}).status_code


def test_several_pages_see_the_same_run():
    seen: list[list[int]] = []

    def watch(server: Server) -> None:
        since, steps = -1, []
        while len(steps) < 20:
            rows = server.client.get("/live", params={"since": since}).json()["rows"]
            steps += [row[0] for row in rows]
            since = steps[-1] if steps else -1
            time.sleep(0.01)
        seen.append(steps[:20])

    with Server(SLOW) as server:
        threads = [threading.Thread(target=watch, args=(server,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        server.post("/v1/completions", {"prompt": "a", "max_tokens": 25})
        for thread in threads:
            thread.join()
        server.settled()
        assert [list(range(20))] * 3 == seen
