"""A small fake server in its client's event loop, which behaves as each test asks."""

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

from aiohttp import web

from stallfree.bench.client import Client


def chunk(text: str = "x", finish_reason: str | None = None, **fields: Any) -> str:
    """An event of a completion."""
    choice = {"index": 0, "text": text, "finish_reason": finish_reason} | {k: fields.pop(k) for k in ("token_ids",) if k in fields}
    return f"data: {json.dumps({'choices': [choice], **fields})}\n\n"


PAUSE_S = 0.1


class Fake:
    """Answers with `max_tokens` events, or with those of `events`, or always with those of `style(max_tokens)`, in which None is a
    pause of `PAUSE_S`. `refuse(body)`: why a body gets a 400, or None. `per_word`: tokens in a word. `failure`: what happens
    to requests for more than two tokens, so that the probe passes: a status, "die" (after two tokens), "mute" (never answers),
    "stop" (ends after two tokens as if that were all).
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.models: Any = {"data": [{"id": "fake"}]}
        self.refuse: Callable[[dict[str, Any]], str | None] = lambda body: None
        self.events: list[str] | None = None
        self.style: Callable[[int], list[str | None]] | None = None
        self.failure: str | int | None = None
        self.per_word = 1
        self.over = asyncio.Event()
        self.url = ""

    async def list(self, _: web.Request) -> web.Response:
        return web.json_response(self.models)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if (why := self.refuse(body)) is not None:
            return web.json_response({"error": {"message": why}}, status=400)
        prompt, usage = body["prompt"], body.get("stream_options")
        counts = {"prompt_tokens": len(prompt) if isinstance(prompt, list) else 1 + self.per_word * len(prompt.split())}
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "x"}], "usage": counts})
        failure = self.failure if body["max_tokens"] > 2 else None
        if isinstance(failure, int):
            return web.json_response({"error": {"message": "too much"}}, status=failure)
        if failure == "mute":
            await self.over.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if self.style is not None:
            for event in self.style(body["max_tokens"]):
                await (asyncio.sleep(PAUSE_S) if event is None else response.write(event.encode()))
            return response
        if self.events is not None and body["max_tokens"] > 2:
            await response.write("".join(self.events).encode())
            return response
        for number in range(body["max_tokens"]):
            if number == 2 and failure == "die":
                request.transport.abort()
            if number == 2 and failure == "stop":
                break
            await response.write(chunk(usage=counts | {"completion_tokens": number + 1} if usage else None).encode())
        await response.write((chunk("", "length") + "data: [DONE]\n\n").encode())
        return response


class Hasty:
    """A server on bare sockets that ends connections too early: "kept" ones at their second request, all "before" the first byte
    of the answer, or all "within" the answer. `requests` counts the complete requests, `connections` all connections.
    """

    def __init__(self, ends: Literal["kept", "before", "within"]) -> None:
        self.ends = ends
        self.requests = self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = 0
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(
                (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0
            )
            body = json.loads(await reader.readexactly(length)) if length else {"max_tokens": 0}
            number += 1
            self.requests += 1
            if self.ends == "before" or (self.ends == "kept" and number == 2):
                break
            events = "".join(chunk() for _ in range(body["max_tokens"])) + chunk("", "length") + "data: [DONE]\n\n"
            data = events.encode() if length else json.dumps({"data": [{"id": "hasty"}]}).encode()
            declared = len(data) + 9 * (self.ends == "within")
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {declared}\r\n\r\n".encode() + data)
            if self.ends == "within":
                break
        writer.close()

    @asynccontextmanager
    async def client(self):
        """A client of this server, on a free port."""
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            yield client


@asynccontextmanager
async def running(fake: Fake, **options: Any):
    """A client of the fake server, on a free port."""
    app = web.Application()
    app.add_routes([web.get("/v1/models", fake.list), web.post("/v1/completions", fake.complete)])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with Client(fake.url, **options) as client:
            yield client
    finally:
        fake.over.set()
        await runner.cleanup()
