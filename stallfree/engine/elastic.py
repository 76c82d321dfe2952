"""Requests on instances whose groups form anew for every iteration: a policy of `stallfree.elastic` plans, a cluster computes, and
tokens come out. The simulator runs the same policies with the same `Instances`. It knows no text.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import NamedTuple, Protocol

from stallfree.core.plan import StepResult, Work
from stallfree.core.request import Refused, Request, Status
from stallfree.elastic.policy import Policy
from stallfree.elastic.state import Instances, Iteration, Stream
from stallfree.executors.base import Lost
from stallfree.executors.sampling import Sampling


class Cluster(Protocol):
    """Instances that compute; see `executors.torch.elastic.Cluster`."""

    rooms: Sequence[int]
    max_model_len: int

    def submit(self, step: int, members: Sequence[int], parts: Sequence[tuple[Work, Mapping[int, int]]]) -> None: ...

    def collect(self) -> StepResult: ...

    def move(self, id: str, target: int) -> None: ...

    def drop(self, id: str) -> None: ...


class LiveInstances(Instances):
    """Instances whose KV a cluster has: what moves or leaves here does so there, too."""

    def __init__(self, cluster: Cluster):
        super().__init__(cluster.rooms)
        self._cluster = cluster

    def move(self, stream: Stream, target: int) -> None:
        super().move(stream, target)
        self._cluster.move(stream.id, target)

    def leave(self, stream: Stream) -> None:
        super().leave(stream)
        self._cluster.drop(stream.id)

    def preempt(self, stream: Stream) -> None:
        super().preempt(stream)
        self._cluster.drop(stream.id)


class Token(NamedTuple):
    """What an iteration gave a request: a token (None: it ended without one), and why it ended, if it did."""

    request: Request
    token: int | None
    finish_reason: str | None


class Elastic:
    """Serves requests on `cluster` as `policy` plans. `limit`: the most tokens of a request. One thread uses it."""

    def __init__(self, cluster: Cluster, policy: Policy, clock: Callable[[], float] = time.perf_counter):
        self._cluster, self._policy, self._clock = cluster, policy, clock
        self.instances = LiveInstances(cluster)
        # Policies leave a token of room on each instance when they place a whole prompt.
        self.limit = min(cluster.max_model_len, sum(cluster.rooms) - len(cluster.rooms))
        self._requests: dict[Stream, Request] = {}
        self._aborted: set[Stream] = set()
        self._out: dict[int, Iteration] = {}
        self._steps = count()
        self.losses = 0
        """How often a rank was lost."""

    @property
    def pending(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """A request arrives now. Raises `Refused` for one that can never be served, or that needs what instances do not have."""
        if not request.prompt:
            raise Refused("the prompt is empty; give it at least one token", "prompt")
        if len(request.prompt) >= self.limit:
            raise Refused(
                f"the prompt has {len(request.prompt):,} tokens; with room for one more, at most {self.limit - 1:,} fit (context "
                f"{self._cluster.max_model_len:,}, KV of all instances {sum(self._cluster.rooms):,} tokens)",
                "prompt",
            )
        sampling = request.sampling
        constrained = isinstance(sampling, Sampling) and sampling.constraint is not None
        for wanted, name in (
            (request.adapter, "adapters"),
            (constrained, "grammars"),
            (request.scored, "prompt log-probabilities"),
        ):
            if wanted:
                raise Refused(f"elastic groups have no {name}; leave them out, or serve with a fixed ring", name)
        if any(request.id == other.id for other in self._requests.values()):
            raise Refused(f"a request {request.id!r} is there already; give each its own id", "id")
        request.arrival = self._clock()
        stream = Stream(request.id, request.arrival, len(request.prompt))
        self.instances.arrive(stream)
        self._requests[stream] = request

    def abort(self, request: Request) -> None:
        """The request ends; if an iteration computes it now, after this."""
        self._aborted |= {stream for stream, other in self._requests.items() if other is request}

    def step(self) -> list[Token]:
        """Begins what the policy plans, waits for the iteration that ends first, and gives its tokens. Raises ValueError if the
        policy leaves all requests waiting."""
        tokens = self._swept()
        try:
            for iteration in self._policy.plan(self.instances, self._clock()):
                self._begin(iteration)
            if not self._out:
                if self._requests:
                    raise ValueError(
                        f"{type(self._policy).__name__} plans no work for {len(self._requests)} requests; they would wait for ever"
                    )
                return tokens
            result = self._cluster.collect()
        except Lost:
            self._lose()
            return tokens
        return tokens + self._ended(result)

    def serve(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Adds all requests, and gives tokens as they come."""
        for request in requests:
            self.add(request)
        while self.pending:
            yield from self.step()

    def _begin(self, iteration: Iteration) -> None:
        self.instances.begin(iteration)
        step = next(self._steps)
        self._out[step] = iteration
        parts: list[tuple[Work, Mapping[int, int]]] = [
            (self._work(stream, sum(kept.values()), False), kept) for stream, kept in iteration.chunks.items()
        ]
        parts += [(self._work(stream, 1, True), {member: 1}) for stream, member in iteration.decodes.items()]
        self._cluster.submit(step, sorted(iteration.members), parts)

    def _work(self, stream: Stream, number: int, decode: bool) -> Work:
        request, start = self._requests[stream], stream.computed
        request.status = Status.RUNNING
        tokens = request.tokens(start, start + number)
        samples = start + number == stream.length
        return Work(request.id, start, number, samples, decode, tokens, (), request.sampling, "", request.prompt, request.output)

    def _ended(self, result: StepResult) -> list[Token]:
        iteration, now, tokens = self._out.pop(result.step), self._clock(), []
        for stream in self.instances.end(iteration):
            request = self._requests[stream]
            if request.id in result.failed:
                tokens.append(self._leave(stream, "error", None, now))
                continue
            (token,) = result.tokens[request.id]
            reason = request.append((token,), now) or ("length" if stream.length >= self.limit else None)
            tokens.append(Token(request, token, None) if reason is None else self._leave(stream, reason, token, now))
        return tokens

    def _leave(self, stream: Stream, reason: str, token: int | None, now: float) -> Token:
        request = self._requests.pop(stream)
        self._aborted.discard(stream)
        if stream in self.instances.waiting:
            self.instances.waiting.remove(stream)
        else:
            self.instances.leave(stream)
        request.status, request.finish_reason = Status.FINISHED, reason
        self._policy.ended(stream, max(0.0, now - request.first_token))
        return Token(request, token, reason)

    def _swept(self) -> list[Token]:
        """Ends requests that were aborted and that no iteration computes."""
        busy = {stream for iteration in self._out.values() for stream in (*iteration.chunks, *iteration.decodes)}
        return [self._leave(stream, "abort", None, self._clock()) for stream in [*self._requests] if stream in self._aborted - busy]

    def _lose(self) -> None:
        """All KV is lost: every stream that had some waits again, the first to come first."""
        self.losses += 1
        self._out.clear()
        self.instances.computing.clear()
        for stream in sorted(self.instances.running, key=lambda stream: -stream.arrival):
            self.instances.preempt(stream)
        # An iteration that had begun has room taken for tokens that never came.
        self.instances.free = list(self.instances.rooms)
