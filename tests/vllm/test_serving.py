"""vLLM's whole server with the policy: the OpenAI SDK, aborts, a storm, metrics, records, and data parallelism."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, OpenAI

from stallfree.engine.recording import load

START_S = 300.0
pytestmark = pytest.mark.slow


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "stallfree", "vllm", "serve", *arguments]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, Path]]:
    """A server on a pretended GPU: its URL, and its record file in `folder`."""
    port = free_port()
    record, log = folder / "run.jsonl", folder / "log"
    arguments = ["llama3-8b", "--pretend", "h100", "--slo", "tbt=50ms", "--record", str(record), "--port", str(port), *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command(*arguments), stdout=out, stderr=out, process_group=0)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.TransportError:
            time.sleep(0.2)
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
    try:
        yield url, record
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    with serving(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def client(served) -> OpenAI:
    return OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def gauge(url: str, name: str) -> float:
    values = re.findall(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert values, f"/metrics has no {name}"
    return sum(map(float, values))


def until_idle(url: str) -> None:
    end = time.monotonic() + START_S
    while gauge(url, "vllm:num_requests_running") or gauge(url, "vllm:num_requests_waiting"):
        assert time.monotonic() < end
        time.sleep(0.05)


def stream(client: OpenAI, words: int, tokens: int, **more) -> int:
    """The number of tokens that a streamed answer has."""
    count = 0
    for chunk in client.completions.create(
        model="llama3-8b",
        prompt="word " * words,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, **more},
    ):
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    return count


def test_the_sdk_streams_with_targets_of_its_own(client):
    assert stream(client, 300, 20) == 20
    assert stream(client, 300, 20, vllm_xargs={"slo": "ttft=200ms,tbt=20ms"}) == 20
    assert stream(client, 300, 5, vllm_xargs={"slo": "as soon as possible"}) == 5
    with pytest.raises(BadRequestError):
        stream(client, 300, 5, vllm_xargs={"slo": {"tbt_ms": 20}})


def test_a_storm_and_aborts_leave_nothing_behind(served, client):
    def one(number: int) -> int:
        if number % 3:
            return stream(client, 20 + 37 * (number % 40), 10 + number % 30)
        answer = client.completions.create(
            model="llama3-8b", prompt="word " * 500, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(answer))
        answer.close()
        return 0

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(one, range(120)))
    assert counts == [10 + n % 30 if n % 3 else 0 for n in range(120)]
    until_idle(served[0])
    assert gauge(served[0], "vllm:kv_cache_usage_perc") == 0


def test_metrics_have_the_policys_values(served, client):
    assert stream(client, 1500, 30) == 30
    assert 0 < gauge(served[0], "stallfree_budget_tokens") <= 8192
    assert gauge(served[0], "stallfree_margin_ratio") >= 1
    assert gauge(served[0], "stallfree_limit_seconds") > 0


def test_the_record_can_be_explained(served, client):
    assert stream(client, 700, 30) == 30
    until_idle(served[0])
    run, records = load(served[1])
    assert run.slo == "tbt=50ms@p99"
    assert sum(len(record.emitted) for record in records) >= 30
    shown = subprocess.run(
        [sys.executable, "-m", "stallfree", "explain", str(served[1])], capture_output=True, text=True, check=True
    )
    assert "tbt" in shown.stdout.lower()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--slo", "tbt=100"], "tbt=100 has no unit"),
        (["--slo", "tbt=1us"], "cannot be met: .* ask for at least about tbt="),
        (["--record", "/no/such/folder/run.jsonl"], "there is no folder /no/such/folder"),
        (["--max-num-batched-tokens", "16", "--max-num-seqs", "64"], "must be greater than or equal to max_num_seqs"),
    ],
)
def test_what_cannot_be_served_ends_the_start(arguments, says, tmp_path):
    port = str(free_port())
    ended = subprocess.run(
        command("llama3-8b", "--pretend", "h100", "--port", port, *arguments), capture_output=True, text=True, timeout=START_S
    )
    assert ended.returncode
    assert re.search(says, ended.stdout + ended.stderr)


def test_each_data_parallel_rank_has_its_own_scheduler_records_and_metrics(tmp_path):
    with serving(tmp_path, "--data-parallel-size", "2") as (url, record):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(lambda number: stream(client, 200 + 50 * (number % 8), 20), range(32)))
        assert counts == [20] * 32
        until_idle(url)
        metrics = httpx.get(f"{url}/metrics").text
    ranks = [load(path) for path in (record, record.with_name(f"{record.name}.1"))]
    emitted = [sum(len(step.emitted) for step in steps) for _, steps in ranks]
    assert min(emitted) > 0
    assert sum(emitted) == sum(counts)
    assert set(re.findall(r'^stallfree_budget_tokens{.*engine="(\d)".*} ', metrics, re.MULTILINE)) == {"0", "1"}
