"""The waiting requests, first to serve first. It knows their keys and nothing else about them."""

import heapq
from typing import Any

from stallfree.core.request import Request

Entry = tuple[tuple[Any, ...], int, Request]
"""A request's key, its ticket, and the request."""


class Queue:
    """Waiting requests in the order of their keys, in a heap. An entry is dead if its request has another ticket by now."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._tickets = 0
        self._live = 0

    def __len__(self) -> int:
        return self._live

    def push(self, request: Request) -> None:
        self._tickets += 1
        request.ticket = self._tickets
        self._live += 1
        heapq.heappush(self._heap, (request.key, request.ticket, request))

    def discard(self, request: Request) -> None:
        """Forget a waiting request. Dead entries are removed when they would outnumber the live ones by 16."""
        request.ticket = 0
        self._live -= 1
        if len(self._heap) > 2 * self._live + 16:
            self._heap = [entry for entry in self._heap if self.live(entry)]
            heapq.heapify(self._heap)

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
