"""The messages between the driver and its workers: msgpack over a socket, each message after its length.

A plan is sent as numbers, without prompts. Only a sampling that depends on earlier tokens sends these, too. No pickle. It does not
know who sends a message, or why.
"""

import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from stallfree.core.plan import Plan, StepResult, Work
from stallfree.executors.sampling import GREEDY, Sampling, Score, TokenLogprob, of_values, sampled_before, to_values
from stallfree.executors.torch.placed import Piece
from stallfree.executors.torch.slots import Kept

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


def of_placed(
    plan: Plan, members: Sequence[int], pasts: Sequence[Sequence[Kept]], keepers: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """An iteration of instances as a message; `for_member` adds what only one of them needs. `pasts`: what each member has of each
    piece; `keepers`: the members that keep its new tokens, by their places in `members`."""
    return of_plan(plan) | {
        "members": list(members),
        "past": [[_packed(kept.positions) for kept in past] for past in pasts],
        "keepers": [_packed(each) for each in keepers],
    }


def for_member(slots: Sequence[Sequence[int]], kept: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The slots of one member, for each piece: of the past tokens, and of the new ones that it keeps."""
    return {"slots": [_packed(each) for each in slots], "kept": [_packed(each) for each in kept]}


def to_placed(message: dict[str, Any]) -> tuple[Plan, list[int], list[Piece]]:
    """The plan, the members, and the pieces as one member sees them."""
    plan = to_plan(message)
    rows = zip(plan.work, *(message[key] for key in ("past", "keepers", "slots", "kept")), strict=True)
    return plan, message["members"], [
        Piece(work, [_unpacked(each) for each in past], *(_unpacked(each) for each in rest)) for work, past, *rest in rows
    ]  # fmt: skip


def of_move(sources: Mapping[int, Sequence[int]], target: int, into: Sequence[int]) -> dict[str, Any]:
    """A move of KV between instances, from slots to slots."""
    return {"target": target, "sources": [[number, _packed(slots)] for number, slots in sources.items()], "into": _packed(into)}


def to_move(message: dict[str, Any]) -> tuple[dict[int, list[int]], int, list[int]]:
    sources = {number: _unpacked(slots) for number, slots in message["sources"]}
    return sources, message["target"], _unpacked(message["into"])


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
