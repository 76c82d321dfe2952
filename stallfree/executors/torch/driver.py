"""Runs plans on several ranks: processes of this machine, or Ray's actors. Each gets every plan as a short message; the last stage
answers, the others say how long they waited. With P pipeline stages P plans are out at once, so the stages overlap.
Blocks of KV are gathered from the ranks' parts, and handed out to them.

A rank that dies, or does not answer in time, loses its KV, and with it the whole model's: all ranks are started anew, and the
caller is told by `Lost`. It does not know what becomes of the requests.
"""

import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from math import inf
from typing import Any, NoReturn, Protocol

import numpy as np
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, and not in the list of exports

from stallfree.checkpoint import Checkpoint, ModelConfig
from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.executors.base import Lost
from stallfree.executors.checks import sift
from stallfree.executors.torch import wire, worker
from stallfree.executors.torch.batch import check
from stallfree.executors.torch.runner import BLOCK, TYPES, Options, check_split, layout, stages

START_S = 600.0
"""Seconds in which all ranks must have loaded the model."""
ANSWER_S = 120.0
"""Seconds in which an iteration must have ended."""


class Workers(Protocol):
    """Processes that run `worker.work`, wherever they are."""

    host: str
    """The address at which they find the driver."""

    def start(self, tp: int, pp: int, device: str, port: int, token: str) -> None:
        """Start `tp` x `pp` of them, the `tp` of a stage near each other, each with a `device`, which connect to `port`. Raises
        RuntimeError if there is no room for them.
        """

    def alive(self) -> bool:
        """Whether none has ended."""

    def stop(self) -> None:
        """End all of them, now."""


class Local:
    """Processes of this machine."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, tp: int, pp: int, device: str, port: int, token: str) -> None:
        command = [sys.executable, "-m", "stallfree.executors.torch", self.host, str(port)]
        environment = os.environ | {worker.TOKEN: token}
        self._processes = [
            # In process groups of their own: Ctrl-C is for the server, which ends them.
            subprocess.Popen([*command, str(rank), str(rank)], env=environment, stdin=subprocess.DEVNULL, process_group=0)
            for rank in range(tp * pp)
        ]

    def alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._processes = []


class Bubbles:
    """What `stages` of a pipeline wait while there is work in it: what they say they waited, less what they waited while there was
    none. Each measures with its own clock, and messages take their time, so what one iteration has too little is the next one's.
    """

    def __init__(self, stages: int):
        self._stages = stages
        self._out = 0
        self._empty_since = inf
        self._balance = 0.0

    def submitted(self, now: float) -> None:
        if self._out == 0:
            self._balance -= self._stages * max(0.0, now - self._empty_since)
        self._out += 1

    def collected(self, waited_s: float, now: float) -> float:
        """The bubbles of the oldest iteration, before which all stages together waited so long, in seconds."""
        self._out -= 1
        self._empty_since = now
        self._balance += waited_s
        found = max(0.0, self._balance) if self._stages > 1 else 0.0
        self._balance = min(0.0, self._balance)
        return found


class Parts:
    """Which part of the whole model's KV each of `tp` x `pp` ranks has: its stage's layers, its heads; where there are fewer KV
    heads than ranks, neighbours have the same. `owners`: ranks that have it all together, each of them something of its own.
    """

    def __init__(self, config: ModelConfig, itemsize: int, tp: int, pp: int):
        pieces = min(config.num_kv_heads, tp)
        each = config.num_kv_heads // pieces * config.head_dim * itemsize
        places = [rank * pieces // tp for rank in range(tp)]
        self._shape = 2 * config.num_layers, -1, pieces * each
        self._parts = [
            (slice(2 * layers.start, 2 * layers.stop), slice(None), slice(place * each, place * each + each))
            for layers in stages(config.num_layers, pp)
            for place in places
        ]
        self.owners = [rank for rank in range(tp * pp) if rank % tp == 0 or places[rank % tp] != places[rank % tp - 1]]
        self.block_bytes = 2 * config.num_layers * BLOCK * pieces * each

    def of(self, memory: memoryview, rank: int) -> np.ndarray:
        """What of blocks in `memory` is this rank's: [keys and values of its layers, tokens, bytes of its heads], a view."""
        return np.frombuffer(memory, np.uint8).reshape(self._shape)[self._parts[rank]]


class ParallelExecutor:
    """The model of `checkpoint` on `tp` x `pp` ranks, placed by `workers`. KV takes `kv_bytes` on each rank; None, on GPUs: what is
    left there. An iteration that takes longer than `answer_s` is lost.

    Raises ValueError for what does not divide or is not there, MemoryError for what does not fit, RuntimeError for ranks that do
    not come up, each with what the rank said.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        kv_bytes: int | None,
        *,
        tp: int,
        pp: int,
        workers: Workers,
        answer_s: float = ANSWER_S,
    ):
        check_split(checkpoint.config, tp, options.weights)
        stages(checkpoint.config.num_layers, pp)
        options.check(checkpoint.config, tp * pp if isinstance(workers, Local) else 1)
        self._setup: dict[str, Any] = {
            "model": str(checkpoint.path.resolve()),
            "options": asdict(options),
            "tp": tp,
            "pp": pp,
            "kv_bytes": kv_bytes,
            "timeout_s": START_S,
        }
        self._tp, self._pp, self._answer_s = tp, pp, answer_s
        self._vocab_size = checkpoint.config.vocab_size
        self._workers = workers
        self._parts = Parts(checkpoint.config, TYPES[options.kv].itemsize, tp, pp)
        self.layout, self.block_bytes = layout(checkpoint.config, options.kv), self._parts.block_bytes
        self._socks: list[socket.socket] = []
        self._said: list[deque[dict[str, Any]]] = []
        self._refused: deque[dict[str, str]] = deque()
        """For each plan that is out: why requests were left out of it."""
        self._kv: dict[int, bytes] = {}
        self._bubbles = Bubbles(pp)
        self._store: TCPStore | None = None
        self.capacity = Capacity(BLOCK, self._start(), options.length(checkpoint.config), depth=pp)

    def submit(self, plan: Plan) -> None:
        """Work that cannot be run is left out. Raises ValueError, with no harm done, if none can."""
        work, refused, _ = sift(plan.work, lambda work: check(work, self.capacity, self._vocab_size))
        self._refused.append(refused)
        message = wire.of_plan(replace(plan, work=tuple(work)))
        self._bubbles.submitted(time.perf_counter())
        try:
            for sock in self._socks:
                wire.send(sock, message)
        except OSError as error:
            self._lost(f"a rank is gone ({error})")

    def collect(self) -> StepResult:
        try:
            answers = self._next()
        except OSError as error:
            self._lost(str(error))
        bubble_s = self._bubbles.collected(sum(answer["waited_s"] for answer in answers), time.perf_counter())
        result = wire.to_result(answers[-1], bubble_s)
        return replace(result, failed={**result.failed, **self._refused.popleft()})

    def read_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        """Raises ConnectionError if a rank is gone; that all KV is, the next plan tells by `Lost`."""
        self._kv = {}
        with self._whole():
            for rank in self._parts.owners:
                wire.send(self._socks[rank], {"read": list(blocks)})
            while len(self._kv) < len(self._parts.owners):
                self._hear()
            for rank, kv in self._kv.items():
                part = self._parts.of(memory, rank)
                part[:] = np.frombuffer(kv, np.uint8).reshape(part.shape)

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        """Raises as `read_blocks` does."""
        with self._whole():
            for rank, sock in enumerate(self._socks):
                wire.send(sock, {"write": list(blocks), "kv": self._parts.of(memory, rank).tobytes()})

    def close(self) -> None:
        for sock in self._socks:
            sock.close()
        self._socks, self._store = [], None
        self._workers.stop()

    def _start(self) -> int:
        """Start all ranks; the blocks of KV that each has."""
        token, host = secrets.token_hex(16), self._workers.host
        self._said = [deque() for _ in range(self._pp)]
        self._refused.clear()
        self._bubbles = Bubbles(self._pp)
        # Where the ranks find each other. It listens here from now on, so that nobody else can take the port.
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._setup |= {"host": host, "port": self._store.port}
        with socket.create_server((host, 0)) as server:
            try:
                self._workers.start(self._tp, self._pp, self._setup["options"]["device"], server.getsockname()[1], token)
                self._socks = self._accept(server, token)
                return self._set_up()
            except ConnectionError as error:
                self.close()
                raise RuntimeError(f"the ranks did not come up: {error}") from None
            except BaseException:
                self.close()
                raise

    def _accept(self, server: socket.socket, token: str) -> list[socket.socket]:
        end, found, number = time.monotonic() + START_S, dict[int, socket.socket](), self._tp * self._pp
        host, port = server.getsockname()[:2]
        server.settimeout(1)
        while len(found) < number:
            try:
                sock, _ = server.accept()
            except TimeoutError:
                if time.monotonic() < end and self._workers.alive():
                    continue
                missing = ", ".join(str(rank) for rank in range(number) if rank not in found)
                raise RuntimeError(f"rank {missing} did not connect to {host}:{port}, or ended before it did") from None
            sock.settimeout(10)
            try:
                hello = wire.receive(sock)
            except OSError:
                hello = {}
            if not secrets.compare_digest(str(hello.get("token")).encode(), token.encode()):
                sock.close()
                continue
            sock.settimeout(None)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            found[int(hello["rank"])] = sock
        return [found[rank] for rank in range(number)]

    def _set_up(self) -> int:
        for rank, sock in enumerate(self._socks):
            wire.send(sock, self._setup | {"rank": rank})
        num_blocks = min(answer["num_blocks"] for answer in self._answers())
        for sock in self._socks:
            wire.send(sock, {"num_blocks": num_blocks})
        self._answers()
        return int(num_blocks)

    def _answers(self) -> list[dict[str, Any]]:
        """What each rank says next. Raises what a rank says is wrong; a rank with nothing to say waits for one that failed."""
        end, found = time.monotonic() + START_S, dict[int, dict[str, Any]]()
        while len(found) < len(self._socks):
            waiting = [sock for rank, sock in enumerate(self._socks) if rank not in found]
            ready, _, _ = select.select(waiting, [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise ConnectionError(f"rank {self._socks.index(waiting[0])} did not answer within {START_S:g} s")
            for sock in ready:
                rank = self._socks.index(sock)
                try:
                    answer = found[rank] = wire.receive(sock)
                except ConnectionError:
                    raise ConnectionError(f"rank {rank} ended; what it printed says why") from None
                if "error" in answer:
                    kinds: dict[str, Callable[[str], Exception]] = {"ValueError": ValueError, "MemoryError": MemoryError}
                    raise kinds.get(answer["kind"], RuntimeError)(f"rank {rank}: {answer['error']}")
        return [found[rank] for rank in range(len(found))]

    def _next(self) -> list[dict[str, Any]]:
        """What each stage says of the oldest plan; the last one, its result. Raises ConnectionError if a rank is gone, says what is
        wrong, or if nothing comes in time.
        """
        while not all(self._said):
            self._hear()
        return [messages.popleft() for messages in self._said]

    def _hear(self) -> None:
        """Take what ranks say next, of plans or of KV. Raises ConnectionError as `_next` does."""
        ready, _, _ = select.select(self._socks, [], [], self._answer_s)
        if not ready:
            raise ConnectionError(f"no rank answered within {self._answer_s:g} s")
        for sock in ready:
            rank = self._socks.index(sock)
            try:
                message = wire.receive(sock)
            except ConnectionError as error:
                raise ConnectionError(f"rank {rank} is gone: {error}") from None
            if "kv" in message:
                self._kv[rank] = message["kv"]
            elif "step" in message:
                self._said[rank // self._tp].append(message)
            else:
                raise ConnectionError(f"rank {rank}: {message['error']}")

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Ranks that were told in part, or of which one is gone, are told nothing more: the next plan finds them gone."""
        try:
            yield
        except OSError as error:
            for sock in self._socks:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            raise ConnectionError(f"KV could not be moved: {error}") from None

    def _lost(self, why: str) -> NoReturn:
        """Start anew, and say so."""
        self.close()
        self._start()
        raise Lost(f"{why}; all ranks were started again, and the KV that they held is lost")
