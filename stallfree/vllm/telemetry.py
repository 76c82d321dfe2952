"""What is told of the iterations that vLLM ran: a record file, and values in vLLM's `/metrics` under the names that this project's
server uses. It decides nothing.
"""

import secrets
from collections.abc import Iterable, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path

from prometheus_client import Counter, Gauge

from stallfree.core.record import Arrived, Finished, Run, StepRecord
from stallfree.core.slo import Slo
from stallfree.engine.recording import RecordFile
from stallfree.metrics.stalls import CAUSES, StallAccount
from stallfree.vllm.draft import Iteration, View

LABELS = ("engine",)
"""vLLM's label for the rank in data parallelism."""


class Values:
    """The metrics of this process, one set for all of its engines. With PROMETHEUS_MULTIPROC_DIR set they are in files there, which
    vLLM's API servers read; without it only this process has them.
    """

    def __init__(self) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"stallfree_{name}", text, LABELS, multiprocess_mode="mostrecent")

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"stallfree_{name}", text, (*LABELS, *labels))

        self.budget = gauge("budget_tokens", "Token budget of the last iteration.")
        self.limit = gauge("limit_seconds", "Time that the policy allowed the last iteration.")
        self.margin = gauge("margin_ratio", "Factor by which the policy multiplies expected times.")
        self.late = counter("late_tokens", "Tokens that came after they were due, without first tokens.", "cause")
        self.late_s = counter("decode_stall_seconds", "Lateness of tokens that came after they were due.", "cause")
        self.stalled = counter("stalled_decodes", "Ready decodes that got no token in an iteration.")


values = cache(Values)


class Telemetry:
    """Tells of one engine, number `rank`, held to `slo`. `file`: where its records go, if anywhere; the run's first line is
    `header`. Times count from `origin`. `hashed`: vLLM hashes blocks of the size in `header`, so records can have fingerprints.
    """

    def __init__(self, slo: Slo, header: Run, origin: float, rank: int = 0, file: Path | None = None, *, hashed: bool):
        self._account = StallAccount(slo)
        self._origin, self._rank = origin, str(rank)
        self._values = values()
        for cause in CAUSES:  # so that they are there, at 0, before the first
            self._values.late.labels(self._rank, cause)
            self._values.late_s.labels(self._rank, cause)
        self._values.stalled.labels(self._rank)
        self._block_size = header.capacity.block_size
        self._key = secrets.token_bytes(16) if hashed and file is not None else None
        self._file = None if file is None else RecordFile(file)
        if self._file is not None:
            self._file.begin(header)

    def record(
        self,
        iteration: Iteration,
        arrived: Iterable[View],
        finished: Iterable[tuple[View, str]],
        counts: tuple[int, int, int],
    ) -> None:
        """Tell of an iteration that has ended. `finished`: each with its reason. `counts`: running and waiting requests, and free
        KV blocks, after it."""
        origin, requests = self._origin, iteration.requests
        running, waiting, free = counts
        emitted = [view.id for view in iteration.decoding]
        emitted += [view.id for view, samples in zip(iteration.others, iteration.samples, strict=True) if samples]
        record = StepRecord(
            iteration.step,
            iteration.planned - origin,
            iteration.now - origin,
            iteration.end - origin,
            work=[(view.id, start, count) for view, (start, count) in zip(requests, iteration.shape, strict=True)],
            emitted=emitted,
            cached=iteration.cached,
            arrived=[self._arrived(view) for view in arrived],
            finished=[self._finished(view, reason) for view, reason in finished],
            preempted=iteration.preempted,
            stalled=iteration.stalled,
            num_running=running,
            num_waiting=waiting,
            free_blocks=free,
            budget=iteration.budget,
            reason=iteration.reason,
            limit_s=iteration.limit_s,
            margin=iteration.margin,
        )
        if self._file is not None:
            self._file.write(record)
        self._publish(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _publish(self, record: StepRecord) -> None:
        metrics, rank = self._values, self._rank
        metrics.budget.labels(rank).set(record.budget)
        if record.limit_s is not None and record.margin is not None:
            metrics.limit.labels(rank).set(record.limit_s)
            metrics.margin.labels(rank).set(record.margin)
        if record.stalled:
            metrics.stalled.labels(rank).inc(len(record.stalled))
        for stall in self._account.record(record):
            if stall.kind == "late":
                metrics.late.labels(rank, stall.cause).inc()
                metrics.late_s.labels(rank, stall.cause).inc(stall.late_s)

    def _arrived(self, view: View) -> Arrived:
        request = view.request
        slo = "" if view.asked is None else str(view.asked)
        prints = self._prints(request.block_hashes[: self._in_prompt(view)])
        arrival = view.arrival - self._origin
        return Arrived(view.id, arrival, request.num_prompt_tokens, request.max_tokens, view.priority, slo, prints)

    def _finished(self, view: View, reason: str) -> Finished:
        return Finished(view.id, reason, self._prints(view.request.block_hashes[self._in_prompt(view) :]))

    def _in_prompt(self, view: View) -> int:
        """The number of full KV blocks of a prompt."""
        return int(view.request.num_prompt_tokens // self._block_size)

    def _prints(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """Fingerprints of KV blocks (see `core.record.Fingerprints`), from vLLM's own hashes, which have no secret key."""
        if self._key is None:
            return ()
        return tuple([int.from_bytes(blake2b(block, digest_size=6, key=self._key).digest()) for block in hashes])
