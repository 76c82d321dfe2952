"""A minimal HTTP server around OpenVINO GenAI's continuous batching: `POST /v1/completions`, streamed, and `GET /v1/models`.

    python serve_openvino_genai.py MODEL.gguf PORT STEP_TOKENS

One thread steps the pipeline and passes each new token to its request's thread, which writes it as one server-sent event. There is
no detokenising, which favours this peer. `STEP_TOKENS` is the pipeline's `max_num_batched_tokens`.
"""

import json
import queue
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

NAME = "genai"


class Pipeline:
    """The pipeline, stepped by a thread of its own while there is work."""

    def __init__(self, model: str, step_tokens: int):
        schedule = genai.SchedulerConfig()
        schedule.cache_size = 2  # GB
        schedule.dynamic_split_fuse = True
        schedule.enable_prefix_caching = False
        schedule.max_num_batched_tokens = step_tokens
        schedule.max_num_seqs = 256
        self._pipeline = genai.ContinuousBatchingPipeline(model, schedule, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        self._tokenizer = self._pipeline.get_tokenizer()
        self._coming: queue.SimpleQueue[tuple[Any, int, queue.SimpleQueue[int]]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def tokens(self, prompt: str | list[int]) -> Any:
        return self._tokenizer.encode(prompt).input_ids if isinstance(prompt, str) else ov.Tensor(np.array([prompt], np.int64))

    def generate(self, tokens: Any, count: int) -> "queue.SimpleQueue[int]":
        out: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._coming.put((tokens, count, out))
        return out

    def _serve(self) -> None:
        running: list[tuple[Any, queue.SimpleQueue[int]]] = []
        number = 0
        while True:
            while not running or not self._coming.empty():
                tokens, count, out = self._coming.get()
                options = genai.GenerationConfig()
                options.max_new_tokens, options.ignore_eos, options.do_sample = count, True, False
                number += 1
                running.append((self._pipeline.add_request(number, tokens, options), out))
            self._pipeline.step()
            for handle, out in running:
                if handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            out.put(token)
            running = [(handle, out) for handle, out in running if handle.get_status() == genai.GenerationStatus.RUNNING]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    pipeline: Pipeline

    def do_GET(self) -> None:
        self._answer({"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens, count = self.pipeline.tokens(body["prompt"]), body["max_tokens"]
        out = self.pipeline.generate(tokens, count)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for left in range(count - 1, -1, -1):
            out.get()
            self._event({"choices": [{"index": 0, "text": "x", "finish_reason": None if left else "length"}]})
        length = tokens.shape[1]
        usage = {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    model, port, step_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    Handler.pipeline = Pipeline(model, step_tokens)
    ThreadingHTTPServer.request_queue_size = 512
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()
