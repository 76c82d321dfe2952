"""KV from tensors to bytes on the host. On a GPU, some layers are read in a thread and a stream of their own, while later layers
are computed. It knows no requests and no models.

The computing stream never waits for the reader. The reader waits for what was launched before it was asked, so it sees the KV of
all layers up to there.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch


def parts(
    tensors: Sequence[torch.Tensor], blocks: Sequence[int], memory: memoryview
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each of `tensors`, [blocks, bytes], with its part of `memory`, [len(blocks), bytes]."""
    values, at = torch.frombuffer(memory, dtype=torch.uint8), 0
    for tensor in tensors:
        size = len(blocks) * tensor.shape[1]
        yield tensor, values[at : at + size].view(len(blocks), -1)
        at += size


def copy(tensors: Sequence[torch.Tensor], blocks: Sequence[int], memory: memoryview) -> None:
    """Copy `blocks` of each of `tensors` into `memory`, after all work that the device has."""
    for tensor, part in parts(tensors, blocks, memory):
        part.copy_(tensor[list(blocks)])


class Reader:
    """Reads KV of the GPU `device` in its own thread, one piece after the other. So at most one piece takes memory on the GPU, and
    one in pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, "kv-reader")
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def read(self, tensors: Sequence[torch.Tensor], blocks: Sequence[int], memory: memoryview) -> Future[None]:
        """Copy `blocks` of each of `tensors`, [blocks, bytes], into `memory`, once the GPU has done what it was given so far. It
        returns at once. The future is done, or has the error, when `memory` has the bytes.
        """
        launched = torch.cuda.Event()
        launched.record(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._read, launched, tensors, list(blocks), memory)

    def close(self) -> None:
        """Wait for what is being read, and end the thread."""
        self._thread.shutdown()

    def _read(self, launched: torch.cuda.Event, tensors: Sequence[torch.Tensor], blocks: Sequence[int], memory: memoryview) -> None:
        if len(self._pinned) < len(memory):
            self._pinned = torch.empty(len(memory), dtype=torch.uint8, pin_memory=tensors[0].is_cuda)
        arrived = torch.cuda.Event(blocking=True)  # the thread sleeps while it waits
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            which = torch.tensor(blocks, device=tensors[0].device)
            self._stream.wait_event(launched)
            at = 0
            for tensor in tensors:
                gathered = tensor[which].flatten()
                self._pinned[at : at + len(gathered)].copy_(gathered, non_blocking=True)
                at += len(gathered)
            arrived.record(self._stream)
        arrived.synchronize()
        torch.frombuffer(memory, dtype=torch.uint8).copy_(self._pinned[: len(memory)])
