"""The messages between the driver and its workers: msgpack over a socket, each message after its length.

A plan is sent as numbers, without prompts. Only a sampling that depends on earlier tokens sends these, too. No pickle. It does not
know who sends a message, or why.
"""

import socket
import struct
from typing import Any

import msgpack
import numpy as np

from stallfree.core.plan import Plan, StepResult, Work
from stallfree.executors.sampling import GREEDY, Sampling, Score, TokenLogprob, of_values, sampled_before, to_values

MOST = 256 << 20
"""The longest message that is accepted, in bytes."""


def send(sock: socket.socket, message: dict[str, Any]) -> None:
    body = msgpack.packb(message)
    sock.sendall(struct.pack("<I", len(body)) + body)


def receive(sock: socket.socket) -> dict[str, Any]:
    """The next message. Raises ConnectionError if the other side is gone, or sends something else."""
    (length,) = struct.unpack("<I", _read(sock, 4))
    if length > MOST:
        raise ConnectionError(f"a message of {length:,} bytes is longer than the {MOST:,} that are allowed")
    try:
        message = msgpack.unpackb(_read(sock, length))
    except ValueError as error:
        raise ConnectionError(f"a message could not be read: {error}") from None
    if not isinstance(message, dict):
        raise ConnectionError(f"a message is {type(message).__name__}, expected a table")
    return message


def _read(sock: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = sock.recv(min(length, 1 << 20))
        if not part:
            raise ConnectionError("the other side closed the connection")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def of_plan(plan: Plan) -> dict[str, Any]:
    """A plan as a message."""
    return {
        "step": plan.step,
        "ids": [w.id for w in plan.work],
        "starts": [w.start for w in plan.work],
        "counts": [w.count for w in plan.work],
        "samples": [w.samples for w in plan.work],
        "decodes": [w.decode for w in plan.work],
        "adapters": [w.adapter for w in plan.work],
        "tokens": _packed([token for w in plan.work for token in w.tokens]),
        "tables": [_packed(w.blocks) for w in plan.work],
        "sampling": [_of_sampling(w) if w.samples or _scored(w) else None for w in plan.work],
    }


def to_plan(message: dict[str, Any]) -> Plan:
    tokens, at, work = _unpacked(message["tokens"]), 0, []
    rows = zip(
        *(message[key] for key in ("ids", "starts", "counts", "samples", "decodes", "adapters", "tables", "sampling")), strict=True
    )  # fmt: skip
    for id, start, count, samples, decode, adapter, table, values in rows:
        sampling, prompt, output = _to_sampling(values)
        own = tuple(tokens[at : at + count])
        at += count
        work.append(Work(id, start, count, samples, decode, own, tuple(_unpacked(table)), sampling, adapter, prompt, output))
    return Plan(message["step"], 0.0, tuple(work))


def of_result(result: StepResult) -> dict[str, Any]:
    details = {
        id: [[detail.logprob, detail.top] for detail in details if isinstance(detail, TokenLogprob)]
        for id, details in result.details.items()
    }
    return {
        "step": result.step,
        "tokens": {id: list(tokens) for id, tokens in result.tokens.items()},
        "seconds": result.seconds,
        "error": result.error,
        "details": details,
        "failed": dict(result.failed),
        "scores": {id: [start, scores] for id, (start, scores) in result.scores.items()},
    }


def to_result(message: dict[str, Any], bubble_s: float) -> StepResult:
    details = {
        id: [TokenLogprob(logprob, tuple((token, value) for token, value in top)) for logprob, top in rows]
        for id, rows in message["details"].items()
    }
    tokens = {id: tuple(numbers) for id, numbers in message["tokens"].items()}
    step, seconds, error, failed = (message[key] for key in ("step", "seconds", "error", "failed"))
    scores: dict[str, tuple[int, list[object]]] = {
        id: (start, [Score(logprob, tuple((t, v) for t, v in top), rank) for logprob, top, rank in rows])
        for id, (start, rows) in message["scores"].items()
    }
    return StepResult(step, tokens, seconds, error, details=details, failed=failed, bubble_s=bubble_s, scores=scores)


def _of_sampling(work: Work) -> list[Any]:
    sampling = work.sampling if isinstance(work.sampling, Sampling) else GREEDY
    output = sampled_before(work)
    seen = not sampling.plain or _scored(work)
    return [to_values(sampling, output, work.drafts), _packed(work.prompt) if seen else b"", _packed(output) if seen else b""]


def _scored(work: Work) -> bool:
    return isinstance(work.sampling, Sampling) and work.sampling.prompt_logprobs is not None


def _to_sampling(message: list[Any] | None) -> tuple[Sampling, tuple[int, ...], tuple[int, ...]]:
    if message is None:
        return GREEDY, (), ()
    values, prompt, output = message
    own = tuple(_unpacked(output))
    return of_values(values, len(own)), tuple(_unpacked(prompt)), own


def _packed(numbers: Any) -> bytes:
    return np.asarray(numbers, dtype="<i4").tobytes()


def _unpacked(numbers: bytes) -> list[int]:
    values: list[int] = np.frombuffer(numbers, dtype="<i4").tolist()
    return values
