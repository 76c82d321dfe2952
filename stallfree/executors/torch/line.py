"""A line between the devices of two engines on one machine: KV goes from GPU to GPU by NCCL, and never to the host. Between
processors gloo carries it; that is slower than the memory that both share, and for tests.

A line has two ends, numbers 0 and 1, which meet at a file. What one sends, the other receives in the same order. It knows no
requests.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_S = 10.0
"""Seconds within which the other end must be there, take what was sent, or send what it said it would."""
MOST = 256 << 20
"""Most bytes of KV that are copied and not sent yet."""


class Line:
    """The `end` (0 or 1) of a line between `device` and the device of the other end, which meet at the file `path`. `tensors` gives
    the keys and values of some layers, each [blocks, bytes]. See `base.KVLine` and `base.LinksKV`.
    """

    def __init__(
        self,
        path: str,
        end: int,
        device: torch.device,
        tensors: Callable[[range], Sequence[torch.Tensor]],
        broken: Callable[[], object] = lambda: None,
    ):
        self._other, self._device, self._tensors, self._broken = 1 - end, device, tensors, broken
        store, patience = dist.FileStore(path, 2), timedelta(seconds=PATIENCE_S)  # type: ignore[attr-defined]
        store.set_timeout(patience)
        self._stream = None
        self._group: Any
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = patience
            self._group = dist.ProcessGroupNCCL(store, end, 2, options)
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = patience
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._group = dist.ProcessGroupGloo(store, end, 2, options)
        self._copier, self._sender = ThreadPoolExecutor(1, "kv-copier"), ThreadPoolExecutor(1, "kv-sender")
        self._lock, self._under_way, self._closed = threading.Lock(), 0, False
        self._meet(end)

    def send(self, blocks: Sequence[int], layers: range) -> Future[None] | None:
        tensors = self._tensors(layers)
        size = len(blocks) * sum(tensor.shape[1] for tensor in tensors)
        with self._lock:
            if self._closed or self._under_way + size > MOST:
                return None
            self._under_way += size
        if self._stream is None:
            done: Future[None] = Future()
            self._sender.submit(self._send, _gathered(tensors, blocks), None)
            done.set_result(None)
            return done
        launched, copied = torch.cuda.Event(), torch.cuda.Event(blocking=True)
        launched.record(torch.cuda.current_stream(self._device))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._stream.wait_event(launched)
            kv = _gathered(tensors, blocks)
            copied.record(self._stream)
        self._sender.submit(self._send, kv, copied)
        return self._copier.submit(copied.synchronize)

    def receive(self, number: int, layers: range) -> Callable[[Sequence[int]], None]:
        tensors = self._tensors(layers)
        sizes = [number * tensor.shape[1] for tensor in tensors]
        kv = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        # On a GPU the bytes come later, but before anything that is launched after this.
        self._group.recv([kv], self._other, 0).wait()

        def write(blocks: Sequence[int]) -> None:
            for tensor, part in zip(tensors, kv.split(sizes), strict=True):
                tensor[list(blocks)] = part.view(number, -1)

        return write

    def close(self) -> None:
        """End the line, and what waits at this end. For any thread, and more than once."""
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed:
            with suppress(RuntimeError):
                self._group.abort()
            for pool in (self._copier, self._sender):
                pool.shutdown(wait=False, cancel_futures=True)

    def _meet(self, end: int) -> None:
        """Send a byte and receive one, so that the first KV does not wait for the ends to connect."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self._device)
        ways = [self._group.send, self._group.recv]
        try:
            for way in ways if end else reversed(ways):
                way([byte], self._other, 0).wait()
            byte.item()  # on a GPU, both have only been launched
        except Exception:
            self.close()
            raise

    def _send(self, kv: torch.Tensor, copied: "torch.cuda.Event | None") -> None:
        try:
            if copied is None:
                self._group.send([kv], self._other, 0).wait()
            else:
                copied.synchronize()
                with torch.cuda.stream(self._stream):
                    self._group.send([kv], self._other, 0).wait()
                    copied.record(self._stream)
                copied.synchronize()
        except RuntimeError:
            self.close()
            self._broken()
        finally:
            with self._lock:
                self._under_way -= kv.numel()


def _gathered(tensors: Sequence[torch.Tensor], blocks: Sequence[int]) -> torch.Tensor:
    """`blocks` of each of `tensors`, [blocks, bytes], one after the other in one piece."""
    which = torch.tensor(blocks, device=tensors[0].device)
    return torch.cat([tensor[which].flatten() for tensor in tensors])
