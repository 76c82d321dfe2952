"""Guesses by a smaller model with the same vocabulary, on an executor of its own. It takes the likeliest token each time, for all
requests at once, in as many short iterations as tokens are wanted.

It keeps KV of its own for each request, and forgets it with the request. A long prompt is read a few tokens per iteration of the
large model, so that no stream waits for it; until then the request has no guesses. It does not know the large model.
"""

from collections.abc import Sequence

from stallfree.core.kv import BlockPool
from stallfree.core.plan import Plan, Work
from stallfree.core.request import Request, Status
from stallfree.executors.base import Executor

READ = 128
"""The most tokens that the small model reads in one iteration, over all requests, before it guesses."""

HABIT = 0.1
"""The weight of the newest iteration in `draft_s`."""

WARM_UP = 3
"""Iterations that are timed at the start."""


class _Own:
    """The small model's side of a request: its `blocks`, and the first `computed` tokens whose KV is in them. `tokens` are those of
    them that were guessed, the first at position `at`; some may turn out to be wrong."""

    __slots__ = ("at", "blocks", "computed", "request", "tokens")

    def __init__(self, request: Request):
        self.request = request
        self.blocks: list[int] = []
        self.computed = 0
        self.at = 0
        self.tokens: list[int] = []


class DraftModel:
    """A `Proposer` that asks the model of `executor`, which it owns."""

    def __init__(self, executor: Executor):
        self._executor = executor
        self._pool = BlockPool(executor.capacity.num_blocks, executor.capacity.block_size, reuse=False)
        self._own: dict[int, _Own] = {}
        self._step = 0
        work = Work("warm-up", 0, 1, True, True, (0,), (0,), None, "", (0,), ())
        self.draft_s = min(self._run([work])[1] for _ in range(WARM_UP))

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[Sequence[int]]:
        """Raises what the executor raises. Then nothing is known of any KV."""
        guesses: list[list[int]] = [[] for _ in requests]
        self._forget()
        try:
            self._guess([self._of(request) for request in requests], most, guesses)
        except BaseException:
            for own in self._own.values():
                own.computed = 0
            raise
        return list(guesses)

    def close(self) -> None:
        self._executor.close()

    def _guess(self, owns: Sequence[_Own], most: Sequence[int], guesses: list[list[int]]) -> None:
        left, work, ready = READ, [], []
        for number, (own, count) in enumerate(zip(owns, most, strict=True)):
            request = own.request
            size = min(request.num_tokens - own.computed, left)
            if size > 0 and self._grow(own, request.num_tokens + count):
                left -= size
                stop = own.computed + size
                tokens = request.tokens(own.computed, stop)
                samples = stop == request.num_tokens
                work.append(Work(str(number), own.computed, size, samples, False, tokens, tuple(own.blocks), None, "", tokens, ()))
                own.computed = stop
                if samples:
                    own.at, own.tokens = stop, []
                    ready.append(number)
        while work:
            sampled, seconds = self._run(work)
            if all(w.decode for w in work):
                self.draft_s += HABIT * (seconds - self.draft_s)
            for number in ready:
                guesses[number] += sampled.get(str(number), ())
            ready = [number for number in ready if 0 < len(guesses[number]) < most[number]]
            work = []
            for number in ready:
                own, token = owns[number], guesses[number][-1]
                work.append(Work(str(number), own.computed, 1, True, True, (token,), tuple(own.blocks), None, "", (token,), ()))
                own.tokens.append(token)
                own.computed += 1

    def _run(self, work: Sequence[Work]) -> tuple[dict[str, Sequence[int]], float]:
        """The tokens sampled by an iteration, by id, and its seconds. Raises RuntimeError if it fails."""
        self._step += 1
        self._executor.submit(Plan(self._step, 0.0, tuple(work)))
        result = self._executor.collect()
        if result.error is not None:
            raise RuntimeError(result.error)
        return dict(result.tokens), result.seconds

    def _of(self, request: Request) -> _Own:
        """The small model's side of a request, without the KV of tokens that turned out otherwise."""
        own = self._own.get(id(request))
        if own is None:
            own = self._own[id(request)] = _Own(request)
        right = 0
        for token, guessed in zip(request.tokens(own.at, request.num_tokens), own.tokens, strict=False):
            if token != guessed:
                break
            right += 1
        if own.tokens:
            own.computed = min(own.computed, own.at + right)
        own.computed = min(own.computed, request.num_tokens - 1)  # the last token's logits are needed again
        own.tokens = []
        return own

    def _grow(self, own: _Own, upto: int) -> bool:
        """Blocks for `upto` tokens; False if there are none."""
        if upto > self._executor.capacity.max_model_len:
            return False
        need = -(-upto // self._pool.block_size) - len(own.blocks)
        if need > 0:
            taken = self._pool.take(need)
            if taken is None:
                return False
            own.blocks += taken
        return True

    def _forget(self) -> None:
        """Free what belongs to requests that have ended."""
        for key, own in list(self._own.items()):
            if own.request.status is Status.FINISHED:
                self._pool.give(own.blocks)
                del self._own[key]
