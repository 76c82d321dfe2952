"""A worker process: one rank of the model. The driver tells it over a socket what to run, and which KV to read or write. The first
rank of each stage answers each iteration with the time that the stage waited, and, in the last stage, with the sampled tokens. The
others only report that they are ready, or an error. It does not know who sends requests.
"""

import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stallfree.checkpoint import open_checkpoint
from stallfree.checkpoint.adapter import open_adapter
from stallfree.core.plan import Plan, StepResult
from stallfree.executors.sampling import Rows
from stallfree.executors.torch import wire
from stallfree.executors.torch.executor import OUT_OF_MEMORY, blocks
from stallfree.executors.torch.parallel import Alone, Group, Ranks
from stallfree.executors.torch.placed import Members
from stallfree.executors.torch.runner import Options, Runner, stages, use_threads
from stallfree.executors.torch.sampler import sample
from stallfree.executors.torch.striped import Groups

TOKEN = "STALLFREE_WORKER_TOKEN"
"""The environment variable with the token by which the driver knows its own processes."""


class Waits:
    """The seconds that a stage waits between the end of one iteration and the beginning of the next."""

    def __init__(self, device: torch.device):
        self._device = device
        self._began: Any = None
        self._ended: Any = None

    def begin(self) -> None:
        """The input of the iteration is here."""
        self._began = self._now()

    def end(self) -> float:
        """The stage's part is done, or queued on the GPU. Returns the seconds waited before it; on a GPU, once it has begun."""
        before, self._ended = self._ended, self._now()
        if before is None:
            return 0.0
        if self._device.type != "cuda":
            return float(self._began - before)
        self._began.synchronize()
        return float(before.elapsed_time(self._began)) / 1000

    def _now(self) -> Any:
        """This moment; on a GPU, an event in its queue that notes the moment."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Rank:
    """The part of `setup`'s model that rank `setup["rank"]` holds, joined with the other ranks. `local`: the number of its GPU."""

    def __init__(self, setup: dict[str, Any], local: int):
        rank, tp, sp, pp = setup["rank"], setup["tp"], setup["sp"], setup["pp"]
        options = Options(**setup["options"])
        each = tp * sp
        self._stage, self._each, self._pp = rank // each, each, pp
        self._rank, self._tp = rank, tp
        device = torch.device(options.device, local) if options.device == "cuda" else torch.device(options.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        use_threads(options, each * pp)
        ranks: Ranks = Alone()
        stripes: Groups | None = None
        if each * pp > 1:
            join(setup, "nccl" if device.type == "cuda" else "gloo")
            # Every rank has to take part in making every group.
            layers = [dist.new_group(range(first, first + tp)) for first in range(0, each * pp, tp)]
            across = [range(stage * each + place, (stage + 1) * each, tp) for stage in range(pp) for place in range(tp)]
            tokens = [dist.new_group(members) for members in across]
            if tp > 1:
                ranks = Group(layers[rank // tp])
            if sp > 1 and not setup["elastic"]:
                own = self._stage * tp + rank % tp
                stripes = Groups(tokens[own], across[own])
        checkpoint = open_checkpoint(Path(setup["model"]))
        self._device, self._waits = device, Waits(device)
        part = stages(checkpoint.config.num_layers, pp)[self._stage]
        self._runner = Runner(checkpoint, options, ranks, part, device, stripes)
        self._config = checkpoint.config
        self._plans, self._ran = 0, threading.Condition()
        self._kv_bytes: int | None = setup["kv_bytes"]

    def room(self) -> int:
        """The number of KV blocks that fit."""
        return blocks(self._runner.room() if self._kv_bytes is None else self._kv_bytes, self._runner.block_bytes)

    def allocate(self, num_blocks: int) -> None:
        self._runner.allocate(num_blocks, self._pp)
        self._runner.record()

    def run(self, plan: Plan) -> dict[str, Any] | None:
        """Run this rank's part of the plan's iteration. Returns its message to the driver, if this rank sends one."""
        started = time.perf_counter()
        hidden = None
        number = self._runner.num_tokens(plan.work)
        if self._stage:
            hidden = torch.empty((number, self._runner.hidden_size), dtype=self._runner.dtype, device=self._device)
            if number:
                dist.recv(hidden, self._rank - self._each)
        self._waits.begin()
        rows = Rows(plan.work)
        out = self._runner.run(plan.work, rows.rows, hidden)
        message: dict[str, Any] = {"step": plan.step}
        if self._stage < self._pp - 1:
            message["waited_s"] = self._waits.end()
            if number:
                dist.send(out.contiguous(), self._rank + self._each)
        elif self._rank % self._each == 0:
            message = self._sampled(plan, rows, out, started)
            message["waited_s"] = self._waits.end()
        with self._ran:
            self._plans += 1
            self._ran.notify()
        return message if self._rank % self._each == 0 else None

    def run_placed(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Run this rank's part of an iteration of instances. Returns the result if this is the first rank of the first member."""
        started = time.perf_counter()
        plan, instances, pieces = wire.to_placed(message)
        rows = Rows(plan.work)
        instance, place = divmod(self._rank, self._tp)
        members = Members(instances.index(instance), [member * self._tp + place for member in instances])
        out = self._runner.run_placed(members, pieces, rows.rows)
        return self._sampled(plan, rows, out, started) if members.number == 0 and place == 0 else None

    def move(self, sources: dict[int, list[int]], target: int, into: list[int]) -> None:
        """Take part in a move of KV from the slots of `sources`, by instance, to those of `target`."""
        instance, place = divmod(self._rank, self._tp)
        if instance != target:
            dist.send(self._runner.read_slots(sources[instance]), target * self._tp + place)
            return
        first = 0
        for source, slots in sources.items():
            own = into[first : first + len(slots)]
            kv = self._runner.read_slots(own)
            dist.recv(kv, source * self._tp + place)
            self._runner.write_slots(own, kv)
            first += len(slots)

    def _sampled(self, plan: Plan, rows: Rows, out: torch.Tensor, started: float) -> dict[str, Any]:
        """The result of a plan that began at `started`, as a message. `out`: the logits of `rows`."""
        tokens, details, failed = sample(out[rows.sampled] if rows.scored else out, [w for w in plan.work if w.samples])
        scores = rows.scores(out.cpu().numpy()) if rows.scored else {}
        seconds = time.perf_counter() - started
        return wire.of_result(StepResult(plan.step, tokens, seconds, details=details, failed=failed, scores=scores))

    def read(self, blocks: list[int]) -> dict[str, Any]:
        """This rank's part of the KV in these blocks."""
        kv = bytearray(len(blocks) * self._runner.block_bytes)
        self._runner.read_blocks(blocks, memoryview(kv))
        return {"kv": kv}

    def write(self, blocks: list[int], kv: bytes) -> None:
        self._runner.write_blocks(blocks, memoryview(bytearray(kv)))

    def load(self, message: dict[str, Any]) -> None:
        """Load this rank's part of an adapter, after the first `after` plans. Raises as `Adapts.load_adapter` does."""
        with self._ran:
            self._ran.wait_for(lambda: self._plans >= message["after"])
        adapter = open_adapter(message["folder"], self._config, max_rank=message["rank"])
        self._runner.load_adapter(message["load"], adapter, message["blocks"])

    def drop(self, key: str) -> None:
        """Forget an adapter."""
        self._runner.drop_adapter(key)


def join(setup: dict[str, Any], backend: str) -> None:
    """Meet the other ranks at the driver's store. Raises RuntimeError, which names its address, if that takes too long."""
    host, port, seconds = setup["host"], setup["port"], timedelta(seconds=setup["timeout_s"])
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=seconds)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=setup["rank"], world_size=setup["world"], timeout=seconds)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"rank {setup['rank']} could not meet the others at {host}:{port} within {seconds}: {reason}") from None


def work(host: str, port: int, token: str, rank: int, local: int) -> None:
    """Serve the driver that listens at `host`:`port` and knows `token`, until the connection ends. `local`: see `Rank`."""
    with socket.create_connection((host, port), timeout=60) as sock, socket.create_connection((host, port), timeout=60) as side:
        for connection in (sock, side):
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.send(connection, {"token": token, "rank": rank, "side": connection is side})
        try:
            member = Rank(wire.receive(sock), local)
            wire.send(sock, {"num_blocks": member.room()})
            member.allocate(wire.receive(sock)["num_blocks"])
            wire.send(sock, {"ready": True})
        except ConnectionError:
            return
        except (ValueError, RuntimeError, MemoryError, OSError) as error:
            wire.send(sock, {"error": str(error), "kind": type(error).__name__})
            return
        threading.Thread(target=_serve_adapters, args=(side, member), daemon=True).start()
        try:
            _serve(sock, member)
        except ConnectionError:
            return
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _serve_adapters(side: socket.socket, rank: Rank) -> None:
    """Load adapters while iterations run. The answer is empty, or an error."""
    with suppress(ConnectionError):
        while True:
            message = wire.receive(side)
            if "drop" in message:  # another rank could not load it
                rank.drop(message["drop"])
                continue
            answer = {}
            try:
                rank.load(message)
            except Exception as error:
                answer = {"error": f"{error}", "kind": type(error).__name__}
            wire.send(side, answer)


def _serve(sock: socket.socket, rank: Rank) -> None:
    while True:
        message = wire.receive(sock)
        try:
            answer = None
            if "read" in message:
                answer = rank.read(message["read"])
            elif "write" in message:
                rank.write(message["write"], message["kv"])
            elif "drop" in message:
                rank.drop(message["drop"])
            elif "members" in message:
                answer = rank.run_placed(message)
            elif "into" in message:
                rank.move(*wire.to_move(message))
            else:
                answer = rank.run(wire.to_plan(message))
        except Exception as error:  # the other ranks wait for this one's part, so the driver starts them all again
            reason = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {error}"
            wire.send(sock, {"error": reason})
            return
        if answer is not None:
            wire.send(sock, answer)
