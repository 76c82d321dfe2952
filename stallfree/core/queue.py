"""The waiting requests, first to serve first, all together and by lane. It knows their keys and lanes, and nothing else about
them."""

import heapq
from collections.abc import Collection
from typing import Any

from stallfree.core.request import Lane, Request

Entry = tuple[tuple[Any, ...], int, Request]
"""A request's key, its ticket, and the request."""


class Queue:
    """Waiting requests in the order of their keys, in a heap, and those of each lane in a heap of its own. An entry is dead if its
    request has another ticket by now."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._lanes: dict[Lane, list[Entry]] = {}
        self._waiting: dict[Lane, int] = {}
        self._tickets = 0
        self._live = 0

    def __len__(self) -> int:
        return self._live

    @property
    def lanes(self) -> Collection[Lane]:
        """Those with a waiting request."""
        return self._waiting.keys()

    @property
    def version(self) -> tuple[int, int]:
        """Another one after each change."""
        return self._tickets, self._live

    def push(self, request: Request) -> None:
        self._tickets += 1
        request.ticket = self._tickets
        self._live += 1
        entry = (request.key, request.ticket, request)
        heapq.heappush(self._heap, entry)
        lane = request.lane
        self._waiting[lane] = self._waiting.get(lane, 0) + 1
        heapq.heappush(self._lanes.setdefault(lane, []), entry)

    def discard(self, request: Request) -> None:
        """Forget a waiting request. Dead entries are removed when they would outnumber the live ones by 16."""
        request.ticket = 0
        self._live -= 1
        lane = request.lane
        left = self._waiting[lane] - 1
        if left:
            self._waiting[lane] = left
            self._lanes[lane] = self._swept(self._lanes[lane], left)
        else:
            del self._waiting[lane], self._lanes[lane]
        self._heap = self._swept(self._heap, self._live)

    def first(self, lane: Lane, most: int = 1) -> list[Request]:
        """The first `most` waiting requests of a lane, in order."""
        heap = self._lanes.get(lane, [])
        if most == 1 and heap and self.live(heap[0]):
            return [heap[0][2]]
        entries: list[Entry] = []
        while heap and len(entries) < most:
            entry = heapq.heappop(heap)
            if self.live(entry):
                entries.append(entry)
        for entry in entries:
            heapq.heappush(heap, entry)
        return [entry[2] for entry in entries]

    @staticmethod
    def live(entry: Entry) -> bool:
        return entry[2].ticket == entry[1]

    def head(self) -> Entry | None:
        while self._heap:
            if self.live(self._heap[0]):
                return self._heap[0]
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Entry:
        """Take the head's entry out for a while. Its request still counts as waiting; `restore` puts the entry back."""
        return heapq.heappop(self._heap)

    def restore(self, entry: Entry) -> None:
        if self.live(entry):
            heapq.heappush(self._heap, entry)

    def _swept(self, heap: list[Entry], live: int) -> list[Entry]:
        """`heap`, or one without its dead entries if they outnumber the `live` ones by 16."""
        if len(heap) <= 2 * live + 16:
            return heap
        heap = [entry for entry in heap if self.live(entry)]
        heapq.heapify(heap)
        return heap
