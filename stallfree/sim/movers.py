"""Movers: which requests are cut or moved, and where to. Both are published.

A mover sees the replicas as they are when it is asked, prices as calibrated, the targets, and the lengths of the answers that have
ended. It does not know how long an answer will be.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.perf.fitted import Fitted
from stallfree.qos import prices
from stallfree.qos.answers import Answers
from stallfree.qos.deadlines import Deadlines, gap
from stallfree.sim.moving import Moving, Place

LARGEST = 8192
"""Most prompt tokens in an iteration of a replica that finds its own budget, if no target for later tokens limits it."""


class Machine(NamedTuple):
    """What a mover knows of a replica. `cost`: prices of its iterations. `budget`: the tokens of an iteration; None if its policy
    finds them by the targets. `near`: the other replicas that its KV may go to.
    """

    cost: Fitted
    budget: int | None
    near: Sequence[int]


class TaiChi:
    """TaiChi (arXiv 2508.01989): the first `heavy` replicas are P-heavy, with large chunks. The others are D-heavy, with small
    chunks. All compute prompts and decode.

    A prompt goes to a P-heavy replica, unless its first token would come late there and sooner on a D-heavy one. Computed on a
    P-heavy replica, it decodes on a D-heavy one that has memory and time for it; if none has, it stays. A D-heavy replica that runs
    short of memory or time moves the stream with the most slack to a P-heavy one, if iterations there are shorter than this slack.
    A stream on a P-heavy replica moves back before its target is broken.

    The order of these rules is modelled; the paper's thresholds and its prediction of first tokens are not.
    """

    kept = 0.5
    """The share of the target for first tokens that the predicted wait at a P-heavy replica may take."""
    full = 0.9
    """A replica is short of memory or time if it uses more than this share of its KV blocks, or of the target between tokens."""
    hurry = 1.5
    """A stream stays on a P-heavy replica while its slack is this many iterations there."""

    def __init__(self, machines: Sequence[Machine], heavy: int, targets: Slo):
        self._machines, self._heavy, self._targets = machines, heavy, targets
        self._answers = Answers()
        self._deadlines = Deadlines(targets, self._answers)

    def place(self, request: Request, cluster: Moving) -> Place:
        waits = [self._wait(number, request, cluster) for number in range(len(cluster.replicas))]
        source = waits.index(min(waits[: self._heavy]))
        patience = 0.0 if self._targets.ttft is None else self.kept * self._targets.ttft.seconds
        if waits[source] > max(patience, min(waits)):
            return Place(waits.index(min(waits)))
        target = self._roomiest(source, request, cluster, self._others(source))
        return Place(source) if target is None else Place(source, target, len(request.prompt))

    def stepped(self, number: int, cluster: Moving, now: float) -> None:
        if number < self._heavy:
            self._back(number, cluster, now)
        elif self._short(number, 0, 0, cluster) and not cluster.leaving(number):
            self._away(number, cluster, now)

    def ended(self, request: Request) -> None:
        self._answers.learn(request)

    def _back(self, number: int, cluster: Moving, now: float) -> None:
        """Move streams that have no slack for this P-heavy replica to D-heavy ones."""
        streams = cluster.streams(number)
        if not streams:
            return
        enough = now + self.hurry * self._pace(number, 0, cluster)[1]
        for request, due in zip(streams, self._deadlines.nexts(streams), strict=True):
            if due < enough:
                target = self._roomiest(number, request, cluster, self._others(number))
                if target is not None:
                    cluster.move(request, number, target, now)

    def _away(self, number: int, cluster: Moving, now: float) -> None:
        """Move the stream with the most slack from this D-heavy replica to a P-heavy one."""
        streams = cluster.streams(number)
        if not streams:
            return
        dues = self._deadlines.nexts(streams)
        due, _, request = max(zip(dues, map(len, (r.output for r in streams)), streams, strict=True), key=lambda each: each[:2])
        heavy = [n for n in self._machines[number].near if n < self._heavy]
        enough = [n for n in heavy if now + self.hurry * self._pace(n, 1, cluster)[1] <= due]
        target = self._roomiest(number, request, cluster, enough)
        if target is not None:
            cluster.move(request, number, target, now)

    def _others(self, number: int) -> list[int]:
        """The D-heavy replicas that KV of this P-heavy one may go to."""
        return [n for n in self._machines[number].near if n >= self._heavy]

    def _roomiest(self, source: int, request: Request, cluster: Moving, numbers: Sequence[int]) -> int | None:
        """Of these replicas, the one with the most free KV; None if all would be short with this request."""
        fitting = [n for n in numbers if not self._short(n, 1, request.num_tokens, cluster)]
        return min(fitting, key=cluster.used, default=None)

    def _short(self, number: int, streams: int, tokens: int, cluster: Moving) -> bool:
        """Whether a replica with so many more streams, of so many tokens together, is short of memory or time."""
        decodes, context = _decoding(number, cluster)
        pool = cluster.replicas[number].scheduler.ledger.pool
        if cluster.used(number) + tokens / pool.block_size / pool.num_blocks > self.full:
            return True
        seconds = self._machines[number].cost.batch(decodes + streams, context + tokens, [])
        return seconds > self.full * gap(self._targets)

    def _wait(self, number: int, request: Request, cluster: Moving) -> float:
        """Seconds until the first token of a new request, if its prompt is computed after those that wait."""
        chunk, seconds = self._pace(number, 0, cluster)
        return (cluster.replicas[number].pending(request.arrival) + len(request.prompt)) / chunk * seconds

    def _pace(self, number: int, more: int, cluster: Moving) -> tuple[int, float]:
        """The prompt tokens and the seconds of a full iteration of a replica with so many more streams."""
        cost, budget, _ = self._machines[number]
        decodes, context = _decoding(number, cluster)
        context, decodes = context + more * (context // max(1, decodes)), decodes + more
        if budget is not None:
            chunk = max(1, budget - decodes)
        else:
            shape = [(context // max(1, decodes), 1)] * decodes
            limit = gap(self._targets)
            chunk = LARGEST if limit == inf else max(1, cost.room(shape, 0, LARGEST, limit))
        return chunk, cost.batch(decodes, context, [(0, chunk)])


class DynaServe:
    """DynaServe (arXiv 2504.09285): all replicas are equal. The one with the fewest pending tokens computes a request up to some
    token, and of the others the one with the least work computes the rest. The cut is where both will have as much work left. It
    may be in the prompt, in the answer as long as it is expected to be, or at the end.

    The cut, the balance and the transfer while computing are modelled. The paper's predictor of lengths is not: the mean of the
    answers so far is expected. A cut in the answer is made when the stream has got there, if the second replica has room then.
    """

    least = 128
    """A part of fewer tokens is not worth its fixed costs."""

    def __init__(self, machines: Sequence[Machine], heavy: int, targets: Slo):
        self._machines = machines
        self._answers = Answers()
        self._cuts: list[dict[str, tuple[int, int]]] = [{} for _ in machines]

    def place(self, request: Request, cluster: Moving) -> Place:
        loads = [self._load(number, cluster) for number in range(len(self._machines))]
        waits = [replica.pending(request.arrival) for replica in cluster.replicas]
        source = waits.index(min(waits))
        cost, _, near = self._machines[source]
        if not near:
            return Place(source)
        target = min(near, key=loads.__getitem__)
        prompt, answer = len(request.prompt), self._answers.left(request)
        each = prices.decode(cost, prompt + int(answer / 2))
        first = prices.prefill(cost, 0, prompt)
        share = (loads[target] + first + answer * each - loads[source]) / 2
        if share < first:
            cut = max(self.least, _within(cost, prompt, share))
            return Place(source, target, cut if prompt - cut >= self.least else prompt)
        more = int((share - first) / each)
        if answer - more >= self.least:
            self._cuts[source][request.id] = prompt + more, target
        return Place(source)

    def stepped(self, number: int, cluster: Moving, now: float) -> None:
        cuts, requests = self._cuts[number], cluster.replicas[number].scheduler.ledger.requests
        reached = [id for id, (cut, _) in cuts.items() if id in requests and requests[id].output and requests[id].num_tokens >= cut]
        if not reached:
            return
        streams = {r.id: r for r in cluster.streams(number)}
        for id in reached:
            _, target = cuts.pop(id)
            if id in streams:
                cluster.move(streams[id], number, target, now)

    def ended(self, request: Request) -> None:
        self._answers.learn(request)
        for cuts in self._cuts:
            cuts.pop(request.id, None)

    def _load(self, number: int, cluster: Moving) -> float:
        """Seconds of work that the requests of a replica still need there, by their marginal prices."""
        cost, cuts = self._machines[number].cost, self._cuts[number]
        prefill = context = streams = 0
        decodes = 0.0
        for request, computed in cluster.requests(number):
            left = self._answers.left(request)
            if request.id in cuts:
                left = min(left, max(0, cuts[request.id][0] - request.num_tokens))
            prefill += request.num_tokens - computed
            decodes += left
            context += request.num_tokens
            streams += 1
        if not streams:
            return 0.0
        mean = context // streams
        return prefill * prices.prefill(cost, 0, mean + 1) / (mean + 1) + decodes * prices.decode(cost, mean)


def _decoding(number: int, cluster: Moving) -> tuple[int, int]:
    """How many streams a replica has, and their tokens."""
    tokens = [r.num_tokens for r in cluster.replicas[number].scheduler.ledger.running if r.output]
    return len(tokens), sum(tokens)


def _within(cost: Fitted, prompt: int, seconds: float) -> int:
    """The most tokens of a prompt, at least 1, that add at most so many seconds."""
    low, high = 1, prompt
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if prices.prefill(cost, 0, middle) <= seconds else (low, middle)
    return low


MOVERS: dict[str, type[TaiChi] | type[DynaServe]] = {"taichi": TaiChi, "dynaserve": DynaServe}
