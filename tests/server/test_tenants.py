"""Tenants: the file that lists them, whose a request is, what they may use, and what a new file changes."""

import json
import logging
import signal
import socket
import subprocess
import sys
from functools import partial
from hashlib import sha256
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from stallfree.core.classes import Classes
from stallfree.server.allowance import Allowance, Tenant
from stallfree.server.errors import ApiError
from stallfree.server.keys import Keys
from stallfree.server.tenants import FAIRNESS, LONGEST_NAME, Tenants
from tests.server.conftest import Server
from tests.server.test_bad_input import CHAT, COMPLETIONS, error_of
from tests.waiting import PATIENCE_S, until

CLASSES = Classes.parse("chat: ttft=1s; batch: ttlt=10min")
SECRET = "sk-9f3c"
BODY = {"prompt": "abc", "max_tokens": 2}


def digest(key: str) -> str:
    return f"sha256={sha256(key.encode()).hexdigest()}"


def table(name: str, keys: str = "", rest: str = "") -> str:
    """A tenant in the file. Its key is its name, unless `keys` says otherwise."""
    return f"[tenants.{name}]\nkeys = [{keys or json.dumps(digest(name))}]\n{rest}\n"


def written(tmp_path, text: str | bytes):
    file = tmp_path / "tenants.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    file.chmod(0o600)
    return file


def header(key: str) -> dict[str, str]:
    return {"x-api-key": key}


def scope(key: str) -> dict[str, object]:
    return {"headers": [(b"x-api-key", key.encode())]}


def test_a_file_has_all_that_a_tenant_can_have(tmp_path):
    rest = "weight = 0.5\npriority = -3\nclass = 'batch'\nrequests_per_minute = 60\ntokens_per_minute = 1000\nrunning = 4"
    tenants = Tenants(written(tmp_path, table("web", rest=rest)), classes=CLASSES)
    assert Tenant("web", 0.5, -3, "batch", 60, 1000, 4) == tenants.of("web", None, Headers())


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    assert Tenant("web", 1.0, 0) == Tenants(written(tmp_path, table("web"))).of("web", None, Headers())


def test_each_key_of_a_tenant_opens_the_server(tmp_path):
    file = written(tmp_path, table("web", f'"{digest("one")}", "{digest("two").upper().replace("SHA", "sha")}"'))
    tenants = Tenants(file, Keys.of("three"))
    assert ["web", "web", "default"] == [tenants.check(scope(key)) for key in ("one", "two", "three")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no tenants; write a table"),
        ("tenants = 3", "has no tenants"),
        ("[tenants]", "has no tenants"),
        ("[tenants.web", "is not TOML: .*end of document"),
        (b"[tenants.\xff]", "is not UTF-8 text at byte 9"),
        (table("web") + table("web"), "is not TOML: .*twice"),
        ("[tenant.web]", r"unknown table 'tenant' \(did you mean 'tenants'\?\)"),
        ("[tenants]\nweb = 3", "tenant 'web' is no table"),
        ('[tenants."a b"]', "the name 'a b' must be 1 to 64 letters"),
        (f"[tenants.{'x' * 65}]", "must be 1 to 64 letters"),
        ("[tenants.web]", "tenant 'web' has no keys"),
        ("[tenants.web]\nkeys = []", "tenant 'web' has no keys"),
        (f"[tenants.web]\nkeys = '{SECRET}'", "tenant 'web' has no keys"),
        (table("web", f"'{SECRET}'"), "'web': keys has at place 1 something else than sha256= and 64 hex digits"),
        (table("web", f"'{digest('a')}', 'sha256={SECRET}'"), "'web': keys has at place 2 something else"),
        (table("web", f"'{digest('a')[:-1]}g'"), "'web': keys has at place 1 something else"),
        (table("web", "3"), "'web': keys has at place 1 something else"),
        (table("web", f"'{digest('a')}', '{digest('a')}'"), "'web': keys has at place 2 a key of 'web'"),
        (table("web") + table("app", f"'{digest('web')}'"), "'app': keys has at place 1 a key of 'web'"),
        (table("web", rest="wieght = 2"), r"'web': unknown key 'wieght' \(did you mean 'weight'\?\); known are keys, weight"),
        (table("web", rest="weight = 0"), "'web': weight is 0; it must be a number above 0"),
        (table("web", rest="weight = -1.5"), "'web': weight is -1.5;"),
        (table("web", rest="weight = true"), "'web': weight is True;"),
        (table("web", rest="weight = inf"), "'web': weight is inf;"),
        (table("web", rest="weight = nan"), "'web': weight is nan;"),
        (table("web", rest="weight = '2'"), "'web': weight is '2';"),
        (table("web", rest="priority = 1.0"), "'web': priority is 1.0; it must be a whole number"),
        (table("web", rest="priority = false"), "'web': priority is False;"),
        (table("web", rest="running = 0"), "'web': running is 0; it must be a whole number from 1 on"),
        (table("web", rest="requests_per_minute = 1.5"), "'web': requests_per_minute is 1.5;"),
        (table("web", rest="tokens_per_minute = true"), "'web': tokens_per_minute is True;"),
        (table("web", rest="class = 3"), "'web': class is 3; it must be the name of a class in --slo"),
        (table("web", rest="class = 'bach'"), r"'web': class: unknown class 'bach' \(did you mean 'batch'\?\); known: chat, batch"),
        (table("default"), "'default': --api-key or --api-key-file has a key of this name"),
        (table("web", f"'{digest('mine')}'"), "'web': a key is also that of 'default' in --api-key"),
    ],
)
def test_a_bad_file_is_refused_by_its_tenant_without_its_secrets(tmp_path, text, says):
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match=says) as refused:
        Tenants(file, Keys.of("mine"), CLASSES)
    assert f"--tenants {file}" in str(refused.value)
    assert SECRET not in str(refused.value)
    assert digest("a")[:-1] not in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--tenants .*nowhere cannot be read: No such file"):
        Tenants(tmp_path / "nowhere")


def test_a_class_needs_classes(tmp_path):
    with pytest.raises(ValueError, match="'web': class: unknown class 'batch'; this server has none; write --slo"):
        Tenants(written(tmp_path, table("web", rest="class = 'batch'")))


class Observed:
    """A server, and the tenant, weight, priority and class of its requests, in turn."""

    def __init__(self, server: Server):
        self.server, self.shares = server, []
        submit = server.engine.scheduler.submit

        def observe(request):
            self.shares.append((request.tenant, request.weight, request.priority, request.service_class))
            submit(request)

        server.engine.scheduler.submit = observe


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    text = table("web", rest="weight = 3") + table("batch", rest="weight = 1\npriority = 10\nclass = 'batch'")
    tenants = Tenants(written(tmp_path_factory.mktemp("tenants"), text), Keys.of("third"), CLASSES)
    with Server(tenants=tenants, classes=CLASSES) as server:
        yield Observed(server)
        server.settled()


@pytest.mark.parametrize(
    ("key", "fields", "expected"),
    [
        ("web", {}, ("web", 3.0, 0, "chat")),
        ("web", {"user": "another", "safety_identifier": "one more"}, ("web", 3.0, 0, "chat")),
        ("web", {"priority": 7}, ("web", 3.0, 7, "chat")),
        ("batch", {}, ("batch", 1.0, 10, "batch")),
        ("batch", {"priority": 11, "service_tier": "chat"}, ("batch", 1.0, 11, "chat")),
        ("batch", {"service_tier": "auto"}, ("batch", 1.0, 10, "batch")),
        ("third", {"priority": -5}, ("default", 1.0, -5, "chat")),
    ],
)
def test_a_key_says_whose_a_request_is(observed, key, fields, expected):
    observed.shares.clear()
    headers = header(key) | {FAIRNESS: "somebody"}
    assert 200 == observed.server.post(COMPLETIONS, BODY | fields, headers=headers).status_code
    assert [expected] == observed.shares


@pytest.mark.parametrize(("key", "priority"), [("web", -1), ("batch", 9)])
def test_a_priority_better_than_the_tenants_is_refused(observed, key, priority):
    observed.shares.clear()
    error = error_of(observed.server.post(COMPLETIONS, BODY | {"priority": priority}, headers=header(key)), 400)
    assert "priority" == error["param"]
    assert f"the best of tenant {key!r}" in error["message"]
    assert [] == observed.shares


LONG = BODY | {"prompt": "abcdefghijklmnop" * 8}


def cached(server: Server, key: str | None, **fields) -> int:
    """Tokens of the prompt that the server found in its prefix cache."""
    answer = server.post(COMPLETIONS, LONG | fields, headers=header(key) if key else {})
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_no_key_finds_what_another_has_asked(tmp_path):
    file = written(tmp_path, table("web", f'"{digest("one")}", "{digest("two")}"') + table("batch"))
    with Server(tenants=Tenants(file, Keys.of("third"))) as server:
        assert [0, 112, 0, 0] == [cached(server, key) for key in ("one", "two", "batch", "third")]
        assert [0, 112, 112] == [cached(server, "batch", cache_salt=salt) for salt in ("s", "s", None)]


def test_keys_share_prefixes_where_that_is_wanted(tmp_path):
    tenants = Tenants(written(tmp_path, table("web") + table("batch")), share_prefixes=True)
    with Server(tenants=tenants) as server:
        assert [0, 112] == [cached(server, key) for key in ("web", "batch")]
        assert 0 == cached(server, "batch", cache_salt="web")


def test_without_keys_prefixes_are_shared_whatever_a_client_calls_itself():
    with Server() as server:
        assert [0, 112] == [cached(server, None, user=name) for name in ("ann", "bob")]


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/responses", {"input": "ab" * 64}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "ab" * 64}], "max_tokens": 2}),
    ],
)
def test_each_api_takes_a_salt(route, fields):
    with Server() as server:
        salts = []
        submit = server.engine.scheduler.submit
        server.engine.scheduler.submit = lambda request: (salts.append(request.salt), submit(request))
        assert 200 == server.post(route, fields | {"cache_salt": "s"}).status_code
        assert ["s"] == salts


def test_a_wrong_key_opens_nothing(observed):
    assert "invalid_api_key" == error_of(observed.server.post(COMPLETIONS, BODY, headers=header(SECRET)), 401)["code"]


@pytest.mark.parametrize(
    ("user", "headers", "expected"),
    [
        (None, {}, ""),
        ("ann", {}, "ann"),
        ("ann", {FAIRNESS: "team"}, "ann"),
        (None, {FAIRNESS: "team"}, "team"),
        ("", {FAIRNESS: "team"}, "team"),
        ("a\x00\n\u202eb", {}, "ab"),
        ("\x07", {}, ""),
        ("größe " * 100, {}, ("größe " * 100)[:LONGEST_NAME].strip()),
    ],
)
def test_without_a_key_the_client_says_whose_a_request_is(user, headers, expected):
    assert Tenant(expected) == Tenants().of(None, user, Headers(headers))


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {"user": "ann"}),
        (CHAT, {"safety_identifier": "ann"}),
        ("/v1/responses", {"safety_identifier": "ann"}),
        ("/v1/messages", {"metadata": {"user_id": "ann"}}),
    ],
)
def test_each_api_has_its_own_name_for_the_user(route, fields):
    with Server() as server:
        observed = Observed(server)
        hello = {"input": "hello"} if route == "/v1/responses" else {"messages": [{"role": "user", "content": "hello"}]}
        limit = {"max_output_tokens": 1} if route == "/v1/responses" else {"max_tokens": 1}
        assert 200 == server.post(route, hello | limit | fields).status_code
        server.settled()
    assert ["ann"] == [tenant for tenant, *_ in observed.shares]


LIMITED = Tenant("web", requests_per_minute=3, tokens_per_minute=100, running=2)


def refusal(allowance: Allowance, tenant: Tenant, choices: int, tokens: int, now: float) -> tuple[int, str, str | None]:
    """The status, the message and Retry-After of a request that is refused."""
    with pytest.raises(ApiError) as refused:
        allowance.take(tenant, choices, tokens, now)
    error = refused.value
    assert "rate_limit_exceeded" == error.code
    return error.status, error.message, (error.headers or {}).get("Retry-After")


def test_a_limit_of_requests_holds_for_a_minute():
    allowance, tenant = Allowance(), Tenant("web", requests_per_minute=2)
    for now in (10.5, 20.0):
        allowance.take(tenant, 1, 5, now)
    message = (
        "tenant 'web' is at 2 requests in a minute; 1 more would exceed its limit of 2 (requests_per_minute); try again in 40 s"
    )
    assert (429, message, "40") == refusal(allowance, tenant, 1, 5, 31.0)
    assert "1" == refusal(allowance, tenant, 1, 5, 70.9)[2]
    allowance.take(tenant, 1, 5, 71.0)
    assert "10" == refusal(allowance, tenant, 1, 5, 71.0)[2]


def test_a_limit_of_tokens_waits_for_as_many_as_are_wanted():
    allowance, tenant = Allowance(), Tenant("web", tokens_per_minute=100)
    for now, tokens in ((0.0, 30), (10.0, 40), (20.0, 30)):
        allowance.take(tenant, 1, tokens, now)
    assert ["31", "41", "51"] == [refusal(allowance, tenant, 1, wanted, 30.0)[2] for wanted in (30, 31, 71)]


def test_tokens_that_were_not_used_are_given_back_and_others_count_from_the_end():
    allowance, tenant = Allowance(), Tenant("web", tokens_per_minute=100)
    allowance.take(tenant, 1, 90, 0.0).settle(40, 5.0)
    charge = allowance.take(tenant, 1, 60, 6.0)
    charge.settle(80, 50.0)
    charge.settle(80, 50.0)  # a second time changes nothing
    assert "17" == refusal(allowance, tenant, 1, 1, 51.0 - 7.0)[2]
    allowance.take(tenant, 1, 80, 67.0)
    assert "44" == refusal(allowance, tenant, 1, 1, 67.0)[2]


def test_a_request_that_was_not_served_does_not_count():
    allowance = Allowance()
    for _ in range(10):
        allowance.take(LIMITED, 2, 100, 0.0).cancel()
    allowance.take(LIMITED, 2, 100, 0.0)


def test_a_limit_of_running_requests_ends_with_one_of_them():
    allowance, tenant = Allowance(), Tenant("web", running=3)
    first = allowance.take(tenant, 2, 5, 0.0)
    allowance.take(tenant, 1, 5, 0.0)
    status, message, again = refusal(allowance, tenant, 1, 5, 1000.0)
    assert (429, "1") == (status, again)
    assert "3 unfinished requests; 1 more would exceed its limit of 3 (running)" in message
    first.settle(5, 1000.0)
    allowance.take(tenant, 2, 5, 1000.0)


@pytest.mark.parametrize(("choices", "tokens", "limit"), [(3, 10, "running"), (1, 101, "tokens_per_minute")])
def test_what_exceeds_a_limit_at_any_time_is_a_mistake_of_the_request(choices, tokens, limit):
    status, message, again = refusal(Allowance(), LIMITED, choices, tokens, 0.0)
    assert (400, None) == (status, again)
    assert f"({limit}); ask for less" in message


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), max_size=60))
def test_no_minute_has_more_than_the_limits_and_the_wait_that_is_said_is_enough(arrivals):
    allowance, tenant, now, taken = Allowance(), Tenant("web", requests_per_minute=4, tokens_per_minute=100), 1000.0, []
    for gap, tokens in arrivals:
        now += gap
        try:
            allowance.take(tenant, 1, tokens, now)
        except ApiError as error:
            now += int(error.headers["Retry-After"])
            allowance.take(tenant, 1, tokens, now)
        taken.append((now, tokens))
        assert len(allowance._seconds) <= 62
    for end, _ in taken:
        minute = [tokens for at, tokens in taken if end - 60 < at <= end]
        assert len(minute) <= 4
        assert sum(minute) <= 100
    assert all(before <= after for (before, _), (after, _) in pairwise(taken))


def test_a_client_over_its_limit_is_told_which_and_when_again(tmp_path):
    file = written(tmp_path, table("web", rest="requests_per_minute = 1") + table("app"))
    with Server(tenants=Tenants(file)) as server:
        assert 200 == server.post(COMPLETIONS, BODY, headers=header("web")).status_code
        refused = server.post(COMPLETIONS, BODY, headers=header("web"))
        error = error_of(refused, 429)
        assert ("rate_limit_error", "rate_limit_exceeded") == (error["type"], error["code"])
        assert "limit of 1 (requests_per_minute); try again in" in error["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        anthropic = server.post(
            "/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}, headers=header("web")
        )
        assert (429, "rate_limit_error") == (anthropic.status_code, anthropic.json()["error"]["type"])
        assert 200 == server.post(COMPLETIONS, BODY, headers=header("app")).status_code
        server.settled()


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        (COMPLETIONS, {"prompt": "a", "max_tokens": 10}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "n": 3}, "n"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 10}, "max_completion_tokens"),
        ("/v1/responses", {"input": "a", "max_output_tokens": 10}, "max_output_tokens"),
    ],
)
def test_what_exceeds_a_limit_at_any_time_is_refused_by_its_field(tmp_path, route, fields, param):
    file = written(tmp_path, table("web", rest="tokens_per_minute = 10\nrunning = 2"))
    with Server(tenants=Tenants(file)) as server:
        assert param == error_of(server.post(route, fields, headers=header("web")), 400)["param"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_gives_back_what_a_request_did_not_use(tmp_path, stream):
    file = written(tmp_path, table("web", rest="tokens_per_minute = 200"))
    body = {"prompt": "abc", "max_tokens": 100, "stop": [chr(97 + i) for i in range(15)], "stream": stream}
    with Server(tenants=Tenants(file)) as server:
        for _ in range(4):
            assert 200 == server.post(COMPLETIONS, body, headers=header("web")).status_code
        message = error_of(server.post(COMPLETIONS, body | {"max_tokens": 198}, headers=header("web")), 400)["message"]
        assert "201 tokens in a minute are more than the limit of tenant 'web', 200 (tokens_per_minute)" in message
        server.settled()


def test_a_request_that_the_server_refuses_does_not_count(tmp_path):
    file = written(tmp_path, table("web", rest="requests_per_minute = 1\nrunning = 1"))
    with Server(tenants=Tenants(file)) as server:
        for fields in ({"max_tokens": 5000}, {"logit_bias": {"x": 1}}, {"priority": -1}, {"best_of": 2}):
            error_of(server.post(COMPLETIONS, BODY | fields, headers=header("web")), 400)
        assert 200 == server.post(COMPLETIONS, BODY, headers=header("web")).status_code
        server.settled()


@pytest.mark.parametrize("stream", [False, True])
def test_a_running_request_counts_until_its_client_has_gone(tmp_path, stream):
    file = written(tmp_path, table("web", rest="running = 1"))
    body = json.dumps(BODY | {"max_tokens": 500, "stream": stream}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nx-api-key: web\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with Server(tenants=Tenants(file)) as server:
        server.executor.gate.clear()
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as sock:
            sock.sendall(head + body)
            until(lambda: server.engine_thread.unfinished == 1)
            error = error_of(server.post(COMPLETIONS, BODY, headers=header("web")), 429)
            assert "limit of 1 (running); try again in 1 s, or when one of them has ended" in error["message"]
        until(lambda: server.engine_thread.unfinished == 0)
        server.executor.gate.set()
        until(lambda: server.post(COMPLETIONS, BODY, headers=header("web")).status_code == 200)
        server.settled()


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "stallfree.server.tenants")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "stallfree.server.tenants"]


def test_a_new_file_changes_keys_and_limits_and_keeps_what_was_used(tmp_path, lines):
    file = written(tmp_path, table("web", rest="requests_per_minute = 2") + table("app"))
    tenants = Tenants(file)
    tenants.take(tenants.of("web", None, Headers()), 1, 5, 0.0)
    file.write_text(table("web", rest="requests_per_minute = 1\nweight = 4") + table("new"))
    tenants.reload()
    web = tenants.of("web", None, Headers())
    assert (4, 1) == (web.weight, web.requests_per_minute)
    with pytest.raises(ApiError, match="limit of 1"):
        tenants.take(web, 1, 5, 1.0)
    assert "new" == tenants.check(scope("new"))
    with pytest.raises(ApiError, match="wrong"):
        tenants.check(scope("app"))
    assert [f"--tenants {file} is in force; tenants: 2"] == lines()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "has no tenants"),
        (table("web", rest="weight = 0"), "weight is 0"),
        (table("default"), "has a key of this name"),
    ],
)
def test_a_broken_file_leaves_the_old_tenants_in_force_and_a_line_in_the_log(tmp_path, lines, text, says):
    file = written(tmp_path, table("web", rest="weight = 2"))
    tenants = Tenants(file, Keys.of("mine"))
    file.unlink() if text is None else file.write_text(text)
    tenants.reload()
    assert ("web", 2) == (tenants.check(scope("web")), tenants.of("web", None, Headers()).weight)
    (line,) = lines()
    assert line.startswith(f"the tenants stay as they are: --tenants {file}")
    assert says in line


SERVE = ("serve", "--executor", "simulated", "--policy", "sarathi", "--port", "0", "--json")


class Process:
    """`stallfree serve` in a process of its own, and what it logs."""

    def __init__(self, *arguments: str):
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "stallfree", *SERVE, *arguments]
        # Where the tests run under nohup, their children would ignore SIGHUP.
        usual = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=usual)
        self.card = json.loads(self.process.stdout.readline())

    def __enter__(self):
        until(lambda: self._answers())
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def _answers(self) -> bool:
        return 200 == httpx.get(self.card["url"] + "/health", timeout=PATIENCE_S).status_code

    def status(self, key: str) -> int:
        return httpx.post(self.card["url"] + COMPLETIONS, json=BODY, headers=header(key), timeout=PATIENCE_S).status_code

    def hang_up(self) -> str:
        """Send SIGHUP. Returns the next line of the log."""
        self.process.send_signal(signal.SIGHUP)
        return self.process.stderr.readline()


def test_a_hangup_reads_the_file_again_and_the_server_goes_on(tmp_path):
    file = written(tmp_path, table("web", rest="class = 'batch'"))
    with Process("--tenants", str(file), "--slo", "chat: ttft=1s; batch: ttlt=10min") as server:
        assert {"chat": "ttft=1s@p90", "batch": "ttlt=600s@p99"} == server.card["classes"]
        assert [200, 401] == [server.status("web"), server.status("app")]
        file.write_text(table("app"))
        assert "is in force; tenants: 1" in server.hang_up()
        assert [401, 200] == [server.status("web"), server.status("app")]
        file.unlink()
        assert "the tenants stay as they are" in server.hang_up()
        assert 200 == server.status("app")


def test_without_tenants_a_hangup_ends_the_server():
    with Process() as server:
        server.process.send_signal(signal.SIGHUP)
        assert -signal.SIGHUP == server.process.wait(PATIENCE_S)


@pytest.mark.parametrize(
    ("text", "slo", "says"),
    [
        (table("web", rest="weight = 0"), "tbt=100ms", "tenant 'web': weight is 0"),
        (table("web", rest="class = 'batch'"), "tbt=100ms", "unknown class 'batch'; this server has none"),
        (table("web"), "chat: ttft=1s; chat: ttft=2s", "class 'chat' is there twice"),
        (table("web"), "chat:", "class 'chat' has no targets"),
    ],
)
def test_a_server_with_bad_tenants_or_classes_does_not_start(tmp_path, text, slo, says):
    command = [sys.executable, "-m", "stallfree", *SERVE, "--tenants", str(written(tmp_path, text)), "--slo", slo]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (True, "") == (done.returncode in (1, 2), done.stdout)
    assert says in done.stderr
