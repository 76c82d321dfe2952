"""Runs plans on several ranks: processes of this machine, or Ray's actors. Each rank gets every plan as a short message. The last
stage answers with the result; the others report how long they waited. With P pipeline stages, P plans are in flight at once, so the
stages overlap. KV blocks are put together from the ranks' parts, and split into these.

If a rank dies or does not answer in time, its KV is lost, and so the model's. Then all ranks are started again, and `Lost` is
raised. It does not know what happens to the requests.

Each rank has a second connection for adapters: it reads an adapter in a thread of its own, while plans pass on the first.
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
from itertools import count
from math import inf
from typing import Any, NoReturn, Protocol

import numpy as np
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # documented, but not in the list of exports

from stallfree.checkpoint import Checkpoint, CheckpointError, ModelConfig
from stallfree.checkpoint.adapter import Adapter
from stallfree.core.plan import Capacity, Plan, StepResult
from stallfree.executors.base import Lost
from stallfree.executors.checks import sift
from stallfree.executors.sampling import begin_constraints
from stallfree.executors.torch import wire, worker
from stallfree.executors.torch.adapters import BLOCK, Packing
from stallfree.executors.torch.batch import check
from stallfree.executors.torch.runner import TYPES, Options, check_split, kv_numbers, layout, stages

START_S = 600.0
"""Seconds within which all ranks must load the model."""
ANSWER_S = 120.0
"""Seconds within which an iteration must end."""


class Workers(Protocol):
    """Processes that run `worker.work`, on any machine."""

    host: str
    """The address of the driver for these processes."""

    def start(self, each: int, pp: int, device: str, port: int, token: str) -> None:
        """Start `each` x `pp` processes, those of a stage near each other, each with a `device`. They connect to `port` and show
        `token`. Raises RuntimeError if there is no room for them.
        """

    def alive(self) -> bool:
        """Whether all processes still run."""

    def stop(self) -> None:
        """End all processes now."""


class Local:
    """Processes of this machine."""

    host = "127.0.0.1"

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, each: int, pp: int, device: str, port: int, token: str) -> None:
        command = [sys.executable, "-m", "stallfree.executors.torch", self.host, str(port)]
        environment = os.environ | {worker.TOKEN: token}
        self._processes = [
            # In their own process groups, so that Ctrl-C reaches only the server, which ends them.
            subprocess.Popen([*command, str(rank), str(rank)], env=environment, stdin=subprocess.DEVNULL, process_group=0)
            for rank in range(each * pp)
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
    """The seconds that the `stages` of a pipeline wait while it has work: the waits that they report, less the time without work.
    Each stage has its own clock, and messages take time, so a negative rest is carried over to the next iteration.
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
        """The bubbles of the oldest iteration in seconds. `waited_s`: the sum of the stages' waits before it."""
        self._out -= 1
        self._empty_since = now
        self._balance += waited_s
        bubble_s = max(0.0, self._balance) if self._stages > 1 else 0.0
        self._balance = min(0.0, self._balance)
        return bubble_s


class Parts:
    """The part of the whole model's KV on each of `tp` x `sp` x `pp` ranks: its stage's layers, its group's tokens and its heads.
    If there are fewer KV heads than ranks, neighbours have the same. `owners`: ranks that together have all KV, each a different
    part.
    """

    def __init__(self, config: ModelConfig, itemsize: int, tp: int, sp: int, pp: int):
        pieces = min(config.num_kv_heads, tp)
        each = config.num_kv_heads // pieces * config.head_dim * itemsize
        places = [rank * pieces // tp for rank in range(tp)]
        self._shape = 2 * config.num_layers, -1, pieces * each
        self._parts = [
            (slice(2 * layers.start, 2 * layers.stop), slice(group, None, sp), slice(place * each, place * each + each))
            for layers in stages(config.num_layers, pp)
            for group in range(sp)
            for place in places
        ]
        self.owners = [rank for rank in range(tp * sp * pp) if rank % tp == 0 or places[rank % tp] != places[rank % tp - 1]]
        self.block_bytes = 2 * config.num_layers * sp * BLOCK * pieces * each

    def of(self, memory: memoryview, rank: int) -> np.ndarray:
        """This rank's part of the blocks in `memory`, a view: [keys and values of its layers, tokens, bytes of its heads]."""
        return np.frombuffer(memory, np.uint8).reshape(self._shape)[self._parts[rank]]


class ParallelExecutor:
    """The model of `checkpoint` on `tp` x `sp` x `pp` ranks, placed by `workers`. With `sp` groups, a KV block has `sp` times as
    many tokens, of which each group has its part. KV takes `kv_bytes` on each rank (None, only on GPUs: the rest of their memory).
    An iteration that takes longer than `answer_s` seconds is lost.

    Raises ValueError for sizes that do not divide or devices that are missing, MemoryError if something does not fit, RuntimeError
    for ranks that do not start; each with the rank's own message.
    """

    verifies = True
    elastic = False
    """Whether the groups form anew for every iteration; see `elastic.Cluster`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: Options,
        kv_bytes: int | None,
        *,
        tp: int,
        sp: int = 1,
        pp: int,
        workers: Workers,
        answer_s: float = ANSWER_S,
    ):
        check_split(checkpoint.config, tp, options.weights)
        stages(checkpoint.config.num_layers, pp)
        if sp < 1:
            raise ValueError(f"SP {sp}: tokens are spread over at least 1 group")
        options.check(checkpoint.config, tp * sp * pp if isinstance(workers, Local) else 1)
        self._setup: dict[str, Any] = {
            "model": str(checkpoint.path.resolve()),
            "options": asdict(options),
            "tp": tp,
            "sp": sp,
            "pp": pp,
            "world": tp * sp * pp,
            "kv_bytes": kv_bytes,
            "elastic": self.elastic,
            "timeout_s": START_S,
        }
        self.tp, self.sp = tp, sp
        self._each, self._pp, self._answer_s = tp * sp, pp, answer_s
        self._vocab_size = checkpoint.config.vocab_size
        self._workers = workers
        self._parts = Parts(checkpoint.config, TYPES[options.kv].itemsize, tp, sp, pp)
        self.layout, self.block_bytes = layout(checkpoint.config, options.kv, sp), self._parts.block_bytes
        self.numbers = kv_numbers(checkpoint.config, options.kv)
        self._packing = Packing(checkpoint.config, options.activations, TYPES[options.kv].itemsize, tp=tp)
        self._socks: list[socket.socket] = []
        self._sides: list[socket.socket] = []
        """The ranks' second connections."""
        self._adapters: dict[str, str] = {}
        """What the ranks call an adapter, by key. A key may be dropped and loaded again; then the ranks know both for a while."""
        self._loads = count()
        self._plans = 0
        self._messages: list[deque[dict[str, Any]]] = []
        self._refused: deque[dict[str, str]] = deque()
        """For each plan in flight: why requests were left out of it, by id."""
        self._kv: dict[int, bytes] = {}
        self._bubbles = Bubbles(pp)
        self._store: TCPStore | None = None
        self.capacity = Capacity(sp * BLOCK, self._start(), options.length(checkpoint.config), depth=pp)

    def submit(self, plan: Plan) -> None:
        """Run the plan, except work that cannot run. Raises ValueError, and changes nothing, if no work can run."""
        work, refused, _ = sift(plan.work, lambda work: check(work, self.capacity, self._vocab_size, self._adapters))
        self._refused.append(refused)
        begin_constraints(work)
        named = (w._replace(adapter=self._adapters[w.adapter]) if w.adapter else w for w in work)
        message = wire.of_plan(replace(plan, work=tuple(named)))
        self._plans += 1
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
        """Raises ConnectionError if a rank is gone. The next plan then raises `Lost`, because all KV is gone, too."""
        self._kv = {}
        with self._moving_kv():
            for rank in self._parts.owners:
                wire.send(self._socks[rank], {"read": list(blocks)})
            while len(self._kv) < len(self._parts.owners):
                self._receive()
            for rank, kv in self._kv.items():
                part = self._parts.of(memory, rank)
                part[:] = np.frombuffer(kv, np.uint8).reshape(part.shape)

    def write_blocks(self, blocks: Sequence[int], memory: memoryview) -> None:
        """Raises as `read_blocks` does."""
        with self._moving_kv():
            for rank, sock in enumerate(self._socks):
                wire.send(sock, {"write": list(blocks), "kv": self._parts.of(memory, rank).tobytes()})

    def adapter_blocks(self, adapter: Adapter) -> int:
        return self._packing.blocks(adapter)

    def load_adapter(self, key: str, adapter: Adapter, blocks: Sequence[int]) -> None:
        """Each rank reads its own part from the adapter's folder. Raises ConnectionError if a rank is gone."""
        name, sides = str(next(self._loads)), self._sides
        message = {"load": name, "folder": str(adapter.path.resolve()), "rank": adapter.rank, "blocks": list(blocks)}
        message["after"] = self._plans  # such a plan may still write for the earlier owner of the blocks
        try:
            for side in sides:
                wire.send(side, message)
            errors = [wire.receive(side) for side in sides]
            failed = next(((rank, answer) for rank, answer in enumerate(errors) if answer), None)
            if failed is not None:
                for side in sides:
                    wire.send(side, {"drop": name})
        except OSError as error:
            raise ConnectionError(f"a rank was lost while it loaded an adapter: {error}") from None
        if failed is not None:
            kind = CheckpointError if failed[1]["kind"] == CheckpointError.__name__ else OSError
            raise kind(f"rank {failed[0]}: {failed[1]['error']}")
        self._adapters[key] = name

    def drop_adapter(self, key: str) -> None:
        name = self._adapters.pop(key, None)
        for sock in self._socks if name is not None else ():
            with suppress(OSError):  # the next plan finds a rank that is gone
                wire.send(sock, {"drop": name})

    def close(self) -> None:
        for sock in (*self._socks, *self._sides):
            sock.close()
        self._socks, self._sides, self._store = [], [], None
        self._workers.stop()

    def _start(self) -> int:
        """Start all ranks. Returns the number of KV blocks that each has."""
        token, host = secrets.token_hex(16), self._workers.host
        self._messages = [deque() for _ in range(self._pp)]
        self._refused.clear()
        self._adapters, self._plans = {}, 0
        self._bubbles = Bubbles(self._pp)
        # Where the ranks meet. It listens from now on, so that no other process can take the port.
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._setup |= {"host": host, "port": self._store.port}
        with socket.create_server((host, 0)) as server:
            try:
                self._workers.start(self._each, self._pp, self._setup["options"]["device"], server.getsockname()[1], token)
                self._socks, self._sides = self._accept(server, token)
                return self._set_up()
            except ConnectionError as error:
                self.close()
                raise RuntimeError(f"the ranks did not start: {error}") from None
            except BaseException:
                self.close()
                raise

    def _accept(self, server: socket.socket, token: str) -> tuple[list[socket.socket], list[socket.socket]]:
        """The ranks' first and second connections."""
        end, socks = time.monotonic() + START_S, dict[tuple[int, bool], socket.socket]()
        ranks = range(self._each * self._pp)
        host, port = server.getsockname()[:2]
        server.settimeout(1)
        while len(socks) < 2 * len(ranks):
            try:
                sock, _ = server.accept()
            except TimeoutError:
                if time.monotonic() < end and self._workers.alive():
                    continue
                missing = ", ".join(str(rank) for rank in ranks if not {(rank, False), (rank, True)} <= socks.keys())
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
            socks[int(hello["rank"]), bool(hello.get("side"))] = sock
        return [socks[rank, False] for rank in ranks], [socks[rank, True] for rank in ranks]

    def _set_up(self) -> int:
        for rank, sock in enumerate(self._socks):
            wire.send(sock, self._setup | {"rank": rank})
        num_blocks = min(answer["num_blocks"] for answer in self._answers())
        for sock in self._socks:
            wire.send(sock, {"num_blocks": num_blocks})
        self._answers()
        return int(num_blocks)

    def _answers(self) -> list[dict[str, Any]]:
        """The next message of each rank. Raises the error that a rank reports; other ranks may then wait for the failed one."""
        end, answers = time.monotonic() + START_S, dict[int, dict[str, Any]]()
        while len(answers) < len(self._socks):
            waiting = [sock for rank, sock in enumerate(self._socks) if rank not in answers]
            ready, _, _ = select.select(waiting, [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise ConnectionError(f"rank {self._socks.index(waiting[0])} did not answer within {START_S:g} s")
            for sock in ready:
                rank = self._socks.index(sock)
                try:
                    answer = answers[rank] = wire.receive(sock)
                except ConnectionError:
                    raise ConnectionError(f"rank {rank} ended; its output above says why") from None
                if "error" in answer:
                    kinds: dict[str, Callable[[str], Exception]] = {"ValueError": ValueError, "MemoryError": MemoryError}
                    raise kinds.get(answer["kind"], RuntimeError)(f"rank {rank}: {answer['error']}")
        return [answers[rank] for rank in range(len(answers))]

    def _next(self) -> list[dict[str, Any]]:
        """The messages of all stages about the oldest plan; the last stage's is the result. Raises ConnectionError if a rank is
        gone, if it reports an error, or if none answers in time.
        """
        while not all(self._messages):
            self._receive()
        return [messages.popleft() for messages in self._messages]

    def _receive(self) -> None:
        """Sort the next messages of ranks, about plans or with KV. Raises ConnectionError as `_next` does."""
        ready, _, _ = select.select(self._socks, [], [], self._answer_s)
        if not ready:
            raise ConnectionError(f"no rank answered within {self._answer_s:g} s")
        self._sort(ready)

    def _sort(self, ready: Sequence[socket.socket]) -> None:
        """Sort a message of each rank that has sent one. Raises ConnectionError as `_next` does."""
        for sock in ready:
            rank = self._socks.index(sock)
            try:
                message = wire.receive(sock)
            except ConnectionError as error:
                raise ConnectionError(f"rank {rank} is gone: {error}") from None
            if "kv" in message:
                self._kv[rank] = message["kv"]
            elif "step" in message:
                self._messages[rank // self._each].append(message)
            else:
                raise ConnectionError(f"rank {rank}: {message['error']}")

    @contextmanager
    def _moving_kv(self) -> Iterator[None]:
        """If a rank is gone, or only some got a message, close all connections, so that the next plan finds the ranks gone."""
        try:
            yield
        except OSError as error:
            for sock in self._socks:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            raise ConnectionError(f"KV could not be moved: {error}") from None

    def _lost(self, why: str) -> NoReturn:
        """Start all ranks again and raise `Lost`."""
        self.close()
        self._start()
        raise Lost(f"{why}; all ranks were started again, and the KV that they held is lost")
