"""A call's outputs as server-sent events: one write for all outputs of one iteration. It does not know the dialects' JSON.

A stream that has nothing to send for a while sends a comment, so that no proxy closes it while a long prompt is computed. A client
that goes away aborts its requests. For one that reads slowly `send` waits, while its outputs pile up: at most `max_tokens` of them.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Response
from starlette.types import Receive, Scope, Send

from stallfree.engine.streams import Output
from stallfree.engine.thread import Outputs
from stallfree.server.dialects.call import Call
from stallfree.server.errors import ApiError

SILENCE_S = 15.0
"""Seconds without an event after which a comment is sent. Proxies close idle connections after 30 to 60 s by default."""
COMMENT = ": the prompt is being computed\n\n"


@asynccontextmanager
async def watching(outputs: Outputs, receive: Receive) -> AsyncIterator[None]:
    """Close `outputs` when the client disconnects, and in any case at the end."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        outputs.close()

    watcher = asyncio.create_task(wait())
    try:
        with outputs:
            yield
    finally:
        watcher.cancel()


class EventStream(Response):
    """Streams `call`."""

    media_type = "text/event-stream"

    def __init__(self, call: Call):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call
        clock = asyncio.get_running_loop().time
        last = clock()

        async def write(events: str, more: bool = True) -> None:
            nonlocal last
            if events:
                last = clock()
                await send({"type": "http.response.body", "body": events.encode(), "more_body": more})

        async def comment() -> None:
            while True:
                await asyncio.sleep(last + SILENCE_S - clock())
                if clock() - last >= SILENCE_S:
                    await write(COMMENT)

        async with watching(call.outputs, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(call.opening())
            commenter = asyncio.create_task(comment())
            try:
                unfinished = len(call.choices)
                async for batch in call.outputs:
                    unfinished -= sum(output.finish_reason is not None for output in batch)
                    await write("".join(map(self._events, batch)))
            except ApiError as error:
                commenter.cancel()
                await write(call.failure(error), more=False)
                return
            finally:
                commenter.cancel()
            if unfinished:
                return  # the client has gone
            await write(call.ending(), more=False)

    def _events(self, output: Output) -> str:
        choice = self._call.count(output)
        return self._call.events(choice, output)
