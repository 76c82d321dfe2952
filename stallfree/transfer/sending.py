"""The KV of one request on its way out of the engine that prefills: copied as it is computed, and sent piece by piece. It does not
know who asked, or what is done with it.

Blocks are copied in the engine's thread, right after an iteration, before any request can write over them. If both executors move
layers, some layers are copied while the iteration computes the next ones; the last copy is still waited for after the iteration.
They go by a line between the devices, if there is one; else into the memory shared with the decode engine if it has room; else into
a frame.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import cast

from stallfree.core.plan import Work
from stallfree.engine.thread import EngineThread
from stallfree.executors.base import KVLine, MovesKV, MovesLayers
from stallfree.transfer.forms import Form
from stallfree.transfer.frames import Link
from stallfree.transfer.pieces import Outgoing, Piece
from stallfree.transfer.ring import Room

log = logging.getLogger(__name__)

FRAME = 4 << 20
"""Bytes of KV in one frame, about (`Outgoing`). Small frames are sent only where there is nothing to add: on one machine each wakes
four threads, in two processes, while the next chunk or layer is computed.
"""


@dataclass(slots=True)
class Pipe:
    """How KV goes to a decode engine: over `link`, in `form`, through the memory that both share (`ring`, of which `room` says what
    is free). It takes `num_layers` layers one by one (0: it takes only whole blocks). `line`: between the devices, once it is open.
    """

    link: Link
    form: Form | None
    ring: memoryview | None
    room: Room | None
    num_layers: int
    line: KVLine | None = None


class Sending:
    """Copies the blocks of the first `upto` tokens of request `number`, from block `first` on, and sends them through `pipe`, piece
    by piece (`Outgoing`). `seconds`: spent on copying. The engine's thread calls it.
    """

    def __init__(self, thread: EngineThread, pipe: Pipe, number: int, first: int, upto: int):
        self._executor = cast(MovesKV, thread.engine.executor)
        self._block_size = thread.engine.executor.capacity.block_size
        self._pipe = pipe
        self._link, self._form, self._ring, self._room, self._num_layers = (
            pipe.link,
            pipe.form,
            pipe.ring,
            pipe.room,
            pipe.num_layers,
        )
        self._number, self._upto = number, upto
        self._outgoing = Outgoing(first, self._executor.block_bytes, self._num_layers, FRAME)
        self._copies: list[tuple[int, threading.Event]] = []
        """Copies under way: the block at which each ends, and whether it was sent or has failed."""
        self.seconds = 0.0
        self.error: str | None = None

    def watch(self, work: Work) -> None:
        """Send the blocks that `work` and earlier work filled: of a prompt in full frames, and once it is computed all that are
        full, with the last token also a part-filled block. Return once they are copied, because other requests may get the blocks
        now.
        """
        self.computed(work, None)
        began, filled = time.perf_counter(), self._filled(work)
        for end, sent in self._copies:
            if end <= filled:  # a later one may be of an iteration that was submitted already
                sent.wait()
        self._copies = [each for each in self._copies if each[0] > filled]
        self.seconds += time.perf_counter() - began

    def computed(self, work: Work, layers: int | None) -> None:
        """Send what is due when `layers` layers (None: all) of `work` are computed."""
        began = time.perf_counter()
        try:
            for piece in self._outgoing.due(self._filled(work), layers, last=work.samples) if self.error is None else ():
                self._send(piece, work)
        except Exception as error:
            self._failed(error)
        self.seconds += time.perf_counter() - began

    def _filled(self, work: Work) -> int:
        """The end of the blocks that `work` fills; with the last token, of all blocks."""
        end = work.start + work.count
        return -(-end // self._block_size) if end >= self._upto else end // self._block_size

    def _send(self, piece: Piece, work: Work) -> None:
        """Copy a piece of the request's blocks, and send it once it is copied."""
        if self._sent_by_line(piece, work):
            return
        raw = piece.size(self._executor.block_bytes, self._num_layers)
        size = raw if self._form is None else self._form.size(piece.blocks, piece.num_layers)
        header = {"type": "blocks", "number": self._number} | piece.header
        at = None if self._room is None else self._room.take(size)
        body = bytearray(size if at is None else 0)
        memory = memoryview(body)
        if at is not None and self._ring is not None:
            header["at"], memory = at, self._ring[at : at + size]
        kv = memory if self._form is None else memoryview(bytearray(raw))
        tokens = min(self._block_size, work.start + work.count - (piece.end - 1) * self._block_size)
        sent = threading.Event()

        def send(copy: Future[None]) -> None:
            try:
                copy.result()
                if self._form is not None:
                    memory[:] = self._form.pack(kv, piece.blocks, tokens, piece.num_layers)
            except Exception as error:
                self._failed(error)
            self._link.send(header, body)  # after a failure, too: the other side drops it, and frees its memory
            sent.set()

        self._copied(piece, work.blocks[piece.first : piece.end], kv).add_done_callback(send)
        self._copies.append((piece.end, sent))

    def _sent_by_line(self, piece: Piece, work: Work) -> bool:
        """Send a piece by the line, if it is open and can take it. The frame tells the other side that it comes."""
        line = self._pipe.line
        if line is None or piece.layers is None:
            return False
        copy = line.send(work.blocks[piece.first : piece.end], piece.layers)
        if copy is None:
            return False
        self._link.send({"type": "blocks", "number": self._number, "line": True} | piece.header)
        sent = threading.Event()
        copy.add_done_callback(lambda _: sent.set())
        self._copies.append((piece.end, sent))
        return True

    def _copied(self, piece: Piece, blocks: Sequence[int], memory: memoryview) -> Future[None]:
        """Copy a piece of these blocks into `memory`."""
        copy: Future[None] = Future()
        try:
            if piece.layers is not None:
                return cast(MovesLayers, self._executor).read_layers(blocks, piece.layers, memory)
            self._executor.read_blocks(blocks, memory)
            copy.set_result(None)
        except Exception as error:
            copy.set_exception(error)
        return copy

    def _failed(self, error: Exception) -> None:
        """End the transfer with an error. It must not end the engine."""
        if self.error is None:
            log.error("KV could not be read", exc_info=error)
            self.error = f"its KV could not be read: {type(error).__name__}"
            self._link.send({"type": "failed", "number": self._number, "why": self.error})
