"""A call's outputs as server-sent events: one write for all outputs of one iteration. It does not know the two dialects' JSON.

The constant beginning of a chunk is made once per stream, so that a token costs one `json.dumps` of its text. A client that goes
away aborts its requests. For one that reads slowly `send` waits, while its outputs pile up: at most `max_tokens` of them.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Response
from starlette.types import Receive, Scope, Send

from stallfree.engine.streams import Output
from stallfree.engine.thread import Outputs
from stallfree.server.answers import Call, Choice
from stallfree.server.errors import ApiError

DONE = b"data: [DONE]\n\n"


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
    """Streams `call`. The usage is in an extra last chunk (`include_usage`), or in every chunk (`continuous_usage` too)."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, *, include_usage: bool = False, continuous_usage: bool = False):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._call = call
        self._head = "data: " + call.chunk_head()
        self._include_usage = include_usage
        self._continuous = include_usage and continuous_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = self._call

        async def write(events: str | bytes, more: bool = True) -> None:
            if events:
                body = events if isinstance(events, bytes) else events.encode()
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async with watching(call.outputs, receive):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            openings = ((choice, call.opening(choice)) for choice in call.choices.values())
            await write("".join(self._chunk(choice, opening) for choice, opening in openings if opening is not None))
            unfinished = len(call.choices)
            try:
                async for batch in call.outputs:
                    unfinished -= sum(output.finish_reason is not None for output in batch)
                    await write("".join(map(self._events, batch)))
            except ApiError as error:
                await write(b"data: " + error.body() + b"\n\n" + DONE, more=False)
                return
            if unfinished:
                return  # the client has gone
            usage = f'{self._head}], "usage": {json.dumps(call.usage())}}}\n\n' if self._include_usage else ""
            await write(usage.encode() + DONE, more=False)

    def _events(self, output: Output) -> str:
        choice = self._call.count(output)
        events = ""
        if output.text or output.details is not None:
            logprobs = "null"
            if output.details is not None:
                logprobs = self._call.joined([self._call.logprobs(choice, output)])
            events = self._chunk(choice, self._call.delta(output.text), logprobs)
        if output.finish_reason is not None:
            stop_reason = f', "stop_reason": {json.dumps(output.stop_reason)}'
            events += self._chunk(choice, self._call.closing(), "null", f'"{output.finish_reason}"{stop_reason}')
        return events

    def _chunk(self, choice: Choice, members: str, logprobs: str = "null", finish_reason: str = "null") -> str:
        usage = ""
        if self._include_usage:
            usage = f', "usage": {json.dumps(self._call.usage()) if self._continuous else "null"}'
        ending = f', "logprobs": {logprobs}, "finish_reason": {finish_reason}}}]{usage}}}\n\n'
        return f'{self._head}{{"index": {choice.index}, {members}{ending}'
