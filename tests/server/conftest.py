"""A live server in this process, on a free port, over a simulated model whose tokens are bytes."""

import asyncio
import contextlib
import logging
import ssl
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from stallfree import policies
from stallfree.checkpoint import ModelConfig
from stallfree.core.classes import Classes
from stallfree.core.plan import Capacity, StepResult
from stallfree.core.slo import Slo
from stallfree.engine.adapters import Library
from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.engine import Engine
from stallfree.engine.text import Text
from stallfree.executors.sampling import Sampling, TokenLogprob
from stallfree.executors.simulated import Linear, SimulatedExecutor
from stallfree.server.app import create_app
from stallfree.server.keys import Keys
from stallfree.server.run import bind, configure
from stallfree.server.service import Service
from stallfree.server.tenants import Tenants
from stallfree.server.tls import Tls
from stallfree.transfer.terms import Terms
from tests.waiting import PATIENCE_S, until

LETTERS = "abcdefghijklmnopqrstuvwxyz "
FAST = Linear(iteration_s=0.0005, token_s=0.000001, context_s=0.0)
SLOW = Linear(iteration_s=0.02, token_s=0.0, context_s=0.0)


class Executor(SimulatedExecutor):
    """The simulated executor, with log-probabilities for requests that ask, and a `fault` to raise in the next iteration. While its
    `gate` is shut no iteration ends, so that what runs goes on running however slow the machine is.
    """

    fault: Exception | None = None

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()

    def collect(self) -> StepResult:
        self.gate.wait()
        plan = self._plans[0]
        result = super().collect()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        details = {}
        for work in plan.work:
            if work.samples and work.sampling.logprobs is not None:
                details[work.id] = [
                    TokenLogprob(-0.5, tuple((token + i, -0.5 - i) for i in range(work.sampling.logprobs)))
                    for token in result.tokens[work.id]
                ]
        return StepResult(plan.step, result.tokens, result.seconds, details=details)


class Server:
    """A running server with its `url` and its parts. `model`: of its adapters. It `asks` the prefill engines at these addresses, or
    `serves_peers`."""

    def __init__(
        self,
        cost: Linear = FAST,
        *,
        blocks: int = 1000,
        max_model_len: int = 2048,
        max_queue: int = 256,
        slo: Slo | None = None,
        classes: Classes | None = None,
        tenants: Tenants | None = None,
        text: Text | None = None,
        exporter=None,
        asks: Sequence[tuple[str, int]] = (),
        serves_peers: bool = False,
        sampling: Sampling | None = None,
        sanitize_control_tokens: bool = False,
        api_key: str | None = None,
        aliases: Sequence[str] = (),
        executor: type[SimulatedExecutor] = Executor,
        engine: Engine | None = None,
        tls: Tls | None = None,
        verify: ssl.SSLContext | bool = True,
        model: ModelConfig | None = None,
        **options,
    ):
        if engine is None:
            text = text or bytes_as_text()
            own = executor(Capacity(16, blocks, max_model_len), text.encode(LETTERS, special=False), cost)
            engine = Engine(own, text, policies.load("sarathi"), sampling=sampling)
        self.engine, self.executor = engine, engine.executor
        self.service = Service(
            self.engine,
            "toy",
            policy="sarathi",
            slo=slo if classes is None else classes.default,
            classes=classes,
            tenants=tenants,
            max_queue=max_queue,
            exporter=exporter,
            sanitize_control_tokens=sanitize_control_tokens,
            aliases=aliases,
            library=Library(self.engine.adapters, model),
        )
        self.library = self.service.models.library
        self.metrics, self.live, self.traces = self.service.metrics, self.service.live, self.service.traces
        self.engine_thread = self.service.thread
        terms = Terms.of(self.executor, "toy")
        self.peer_socket = bind("127.0.0.1", 0) if serves_peers else None
        if asks:
            self.service.ask(asks, terms, "")
        if self.peer_socket is not None:
            self.service.serve(self.peer_socket, terms, "")
        self.asking = self.service.asking
        self.app: FastAPI = create_app(self.service, **{"keys": tenants or Keys.of(api_key)} | options)
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.port}"
        self._verify = verify
        self._uvicorn = uvicorn.Server(configure(self.app, tls))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._uvicorn.serve(sockets=[self.socket])))

    def __enter__(self):
        self._thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S, verify=self._verify)
        until(lambda: self._uvicorn.started and (self.asking is None or all(peer.link for peer in self.asking.peers)))
        return self

    def __exit__(self, *_):
        self.client.close()
        if isinstance(self.executor, Executor):
            self.executor.gate.set()
        self._uvicorn.should_exit = True
        self._thread.join()
        if self.traces is not None:
            self.traces.close()

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def aborted(self) -> float:
        """How many requests have been aborted, by the server's own count, which the next iteration brings up to date."""
        assert 200 == self.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code
        self.settled()
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith('stallfree_requests_total{reason="abort"}'))

    def settled(self) -> None:
        """Wait until no request is left, then compare the accounts: every KV block must be free."""
        scheduler = self.engine.scheduler
        until(
            lambda: not (self.engine_thread._streams or self.engine.busy),
            lambda: f"{len(scheduler.ledger.requests)} requests are left",
        )
        scheduler.ledger.check()
        assert {} == scheduler.ledger.requests
        assert scheduler.ledger.capacity.num_blocks == scheduler.ledger.pool.num_free


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For tests that cause log lines with tracebacks."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """For tests that leave the server unchanged."""
    with Server() as running:
        yield running
        running.settled()
