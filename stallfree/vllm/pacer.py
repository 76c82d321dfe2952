"""Between vLLM's scheduler and the policy: shows the one the other's requests, times iterations, and lets the policy learn from
them.

It reads vLLM's scheduler and changes nothing in it. Environment: `STALLFREE_SLO` has the latency targets, `STALLFREE_RECORD` names
a file for records.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, Self

from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.record import Run
from stallfree.core.request import Status
from stallfree.core.slo import Slo, Target
from stallfree.policies.slo import Slo as SloPolicy
from stallfree.policies.slo import possible
from stallfree.qos.order import LOOKAHEAD
from stallfree.vllm import cost
from stallfree.vllm.draft import Iteration, View, VllmDraft
from stallfree.vllm.targets import own_targets
from stallfree.vllm.telemetry import Telemetry

log = logging.getLogger(__name__)

TARGETS, RECORD = "STALLFREE_SLO", "STALLFREE_RECORD"
"""The environment variables."""

RETRY = 4
"""After how many drafts a request is offered again that the policy admitted and vLLM did not take. vLLM knows reasons that the
policy does not see: adapters, KV that comes from elsewhere. In the drafts between, its share goes to others."""

LOOKED = 8
"""For how many drafts the tokens that a waiting request has in the prefix cache are not looked up again: a look-up takes time for
each of its blocks."""

MOST_LOOKS = 16 * LOOKAHEAD
"""How many waiting requests are looked at for those that can begin."""

DELIVERY = 0.08
"""The share of a target for the gap between tokens that is left for their way from this process to the client, through vLLM's
front end. The way varies by 1 to 3 ms on two busy cores. Without this share, clients of a pretended H100 saw 2.3 % of the tokens
late at a target of 25 ms and 7.8 requests/s. Over that run and one at 12/s, 0.4 % were late in this process. With it, clients saw
0.4 % late at 7.8/s. (Measured by hand, runs of 15 s.)"""


def on_the_way(slo: Slo) -> Slo:
    """The targets that this process has to keep so that clients see `slo`. A first token has time enough."""

    def sooner(target: Target | None) -> Target | None:
        return None if target is None else replace(target, seconds=(1 - DELIVERY) * target.seconds)

    return replace(slo, tbt=sooner(slo.tbt), tpot=sooner(slo.tpot))


class Pacer:
    """`policy`: the `slo` policy of this project's own server. `block_size`: tokens of a KV block. `telemetry` is told of each
    iteration. An iteration that was scheduled while the one before ran begins when that one ends."""

    def __init__(
        self,
        policy: SloPolicy,
        block_size: int,
        telemetry: Telemetry,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.policy = policy
        self.blocked: list[Any] = []
        """vLLM's requests, found among the first that wait, that wait for something other than the policy."""
        self._block_size = block_size
        self._telemetry = telemetry
        self._clock = clock
        self._views: dict[str, View] = {}
        self._running: list[Any] = []
        self._running_views: list[View] = []
        self._outstanding: dict[int, tuple[Any, Iteration]] = {}
        self._ended: Iteration | None = None
        self._completed = -inf
        self._arrived: list[View] = []
        self._finished: list[tuple[View, str]] = []
        self._preempted: list[str] = []
        self._untold: list[tuple[Iteration, list[View], list[tuple[View, str]], tuple[int, int, int]]] = []
        self._step = self._drafts = 0

    @classmethod
    def of(cls, scheduler: Any) -> Self:
        """For vLLM's `scheduler`, from the environment and vLLM's options. Raises ValueError that says what cannot be served so."""
        config = scheduler.vllm_config
        parallel, scheduling, cache = config.parallel_config, config.scheduler_config, config.cache_config
        if parallel.pipeline_parallel_size > 1:
            raise ValueError(
                f"stallfree.vllm.SloScheduler: --pipeline-parallel-size {parallel.pipeline_parallel_size} is not supported: with "
                "several iterations at once, none has a time of its own; use --tensor-parallel-size"
            )
        if scheduling.prefill_schedule_interval > 1:
            raise ValueError(
                f"stallfree.vllm.SloScheduler: --prefill-schedule-interval {scheduling.prefill_schedule_interval} would hold back "
                "the prefills that the policy lets in; leave it at 1"
            )
        for option, there in (
            ("a model that is not for generating text", config.model_config.runner_type != "generate"),
            ("an encoder-decoder model", config.model_config.is_encoder_decoder),
            ("a diffusion model", config.model_config.is_diffusion),
            ("--no-enable-chunked-prefill", not scheduling.enable_chunked_prefill),
            ("--disable-chunked-mm-input", scheduling.disable_chunked_mm_input),
        ):
            if there:
                raise ValueError(f"stallfree.vllm.SloScheduler splits prompts, which {option} does not allow; use vLLM's own")
        prices, source = cost.prices(scheduler)
        words = os.environ.get(TARGETS, "")
        asked = Slo.parse(words) if words else Slo()
        possible(asked, prices)
        try:
            policy = SloPolicy(on_the_way(asked), prices)
        except ValueError as error:
            raise ValueError(f"{asked}, less {DELIVERY:.0%} for the way to the client: {error}") from None
        slo = asked.within(policy.slo)
        rank = parallel.data_parallel_index
        ahead = (2, True) if scheduling.async_scheduling else ()
        header = Run(
            "slo",
            Capacity(scheduler.block_size, cache.num_gpu_blocks, scheduler.max_model_len, *ahead),
            Limits(scheduling.max_num_seqs, scheduler.max_num_scheduled_tokens, scheduling.watermark),
            bool(cache.enable_prefix_caching),
            str(slo),
            policy.options,
            prices.state(),
        )
        file = os.environ.get(RECORD)
        path = None if not file else Path(f"{file}.{rank}" if rank else file)
        clock, hashed = time.monotonic, scheduler.hash_block_size == scheduler.block_size
        log.info("stallfree: %s; prices %s", slo, source)
        return cls(policy, scheduler.block_size, Telemetry(slo, header, clock(), rank, path, hashed=hashed), clock)

    def draft(self, scheduler: Any, *, waiting: bool) -> VllmDraft:
        """The next iteration as the policy writes it. `waiting`: whether requests may be admitted."""
        self.leave(scheduler)  # those who were aborted since the last iteration
        self._drafts += 1
        now = self._clock()
        if scheduler.running != self._running:  # most iterations have the same requests as the one before
            self._running = list(scheduler.running)
            self._running_views = [self._views.get(r.request_id) or self._meet(r, now) for r in self._running]
        running = self._running_views
        if scheduler.kv_holding_waiting:
            holding = [r for r in scheduler.kv_holding_waiting if not _blocked(scheduler, r)]
            running = running + [self._view(r, now) for r in holding]
        self.blocked = []
        draft = VllmDraft(
            running,
            self._offered(scheduler, now) if waiting else iter(()),
            now,
            num_waiting=len(scheduler.waiting),
            most=scheduler.max_num_scheduled_tokens,
            seats=scheduler.max_num_active_reqs - len(scheduler.running) - scheduler.num_waiting_for_streaming_input,
            free=scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            block_size=self._block_size,
            cached=lambda view: self._cached(scheduler, view),
            ahead=scheduler.scheduler_config.async_scheduling,
            speculates=scheduler.num_spec_tokens > 0,
        )
        self.policy.plan(draft)  # type: ignore[arg-type]  # it has all that the policy reads
        return draft

    def scheduled(self, draft: VllmDraft, output: Any) -> None:
        """vLLM has scheduled `output`, which runs from now on."""
        given = output.num_scheduled_tokens
        self._preempted += output.preempted_req_ids or ()
        for view in draft.admitted:
            if view.id not in given:
                view.offered_from = self._drafts + RETRY
        if given:
            self._outstanding[id(output)] = output, self._iteration(draft, output)
            self._step += 1
        else:
            self.tell()

    def ran(self, output: Any) -> None:
        """The iteration `output` has ended; what it computed is not yet applied."""
        now = self._clock()
        if id(output) not in self._outstanding:  # nothing was computed
            return
        _, iteration = self._outstanding.pop(id(output))
        iteration.now = max(iteration.now, self._completed)
        iteration.end = now
        self.policy.learn(iteration, iteration.requests, now)  # type: ignore[arg-type]  # it has all that the policy reads
        for view in iteration.decoding:
            view.last_token = now
        for view, samples in zip(iteration.others, iteration.samples, strict=True):
            if samples:
                view.first_token = min(view.first_token, now)
                view.last_token = now
        self._ended = iteration
        self._completed = now

    def applied(self, scheduler: Any) -> None:
        """What the iteration computed is applied, so that it is known who has ended."""
        self.leave(scheduler)
        if self._ended is None:
            return
        waiting = len(scheduler.waiting) + len(scheduler.kv_holding_waiting)
        counts = len(scheduler.running), waiting, scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        self._untold.append((self._ended, self._arrived, self._finished, counts))
        self._ended, self._arrived, self._finished = None, [], []

    def tell(self) -> None:
        """Tell of the iterations that have ended. This may wait until the next one runs, when the engine has nothing else to do."""
        untold, self._untold = self._untold, []
        try:
            for iteration in untold:
                self._telemetry.record(*iteration)
        except Exception:  # it decides nothing, so it must not end the engine
            log.exception("stallfree: an iteration could not be recorded")

    def close(self) -> None:
        self.tell()
        self._telemetry.close()

    def _iteration(self, draft: VllmDraft, output: Any) -> Iteration:
        """The iteration as vLLM scheduled it."""
        given: Mapping[str, int] = output.num_scheduled_tokens
        work, decodes, shape = draft.work, draft.decoding, list(draft.pieces)
        # Nobody gets more than its share, so with as many tokens for as many requests each has got it.
        as_written = (output.total_num_scheduled_tokens, len(given)) == (draft.budget - draft.left, len(work))
        if not as_written or len(work) - len(draft.chunks) < len(decodes):
            decodes = [view for view in decodes if view in work and given.get(view.id) == work[view][1]]
            shape = [work[view] for view in decodes]
        others: list[View] = []
        if len(decodes) < len(given):
            there = {view.id for view in decodes}
            others = [self._views[name] for name in given if name not in there]
            shape += [(view.request.num_computed_tokens - given[view.id], given[view.id]) for view in others]
        stalled: list[str] = []
        if len(draft.decoding) > len(decodes):
            stalled = [view.id for view in draft.decoding if view.id not in given]
        samples = [not view.request.is_prefill_chunk for view in others]
        admitted = [view for view in draft.admitted if view.id in given]
        cached = [(view.id, view.request.num_computed_tokens - given[view.id]) for view in admitted]
        preempted, self._preempted = self._preempted, []
        return Iteration(self._step, draft, decodes, others, samples, shape, preempted, stalled, cached)

    def leave(self, scheduler: Any) -> None:
        """Forget the requests that have ended. vLLM names them until it schedules again."""
        for name in scheduler.finished_req_ids:
            view = self._views.pop(name, None)
            if view is not None:
                self._finished.append((view, _reason(view.request)))

    def _offered(self, scheduler: Any, now: float) -> Iterator[View]:
        """The requests that wait for the policy alone, in vLLM's order."""
        for request in islice(scheduler.waiting, MOST_LOOKS):
            view = self._view(request, now)
            if _blocked(scheduler, request):
                self.blocked.append(request)
            elif view.offered_from <= self._drafts:
                view.status, view.num_tokens, view.num_planned = Status.WAITING, request.num_tokens, request.num_computed_tokens
                yield view

    def _cached(self, scheduler: Any, view: View) -> int:
        """Tokens of a waiting request whose KV is there."""
        request = view.request
        if view.looked + LOOKED <= self._drafts:
            view.cached, view.looked = scheduler.kv_cache_manager.get_computed_blocks(request)[1], self._drafts
        return int(request.num_computed_tokens or view.cached)

    def _view(self, request: Any, now: float) -> View:
        """The view of a waiting request; a new one for the next turn of a session, which is a request with the same id."""
        view = self._views.get(request.request_id)
        if view is not None and view.request is request and view.arrival_time == request.arrival_time:
            return view
        if view is not None:
            self._finished.append((view, "stop"))
        return self._meet(request, now)

    def _meet(self, request: Any, now: float) -> View:
        asked = own_targets(request, self.policy.slo)
        kept = None if asked is None else on_the_way(asked)
        view = View(request, now - max(0.0, time.time() - request.arrival_time), kept, asked)
        self._views[view.id] = view
        self._arrived.append(view)
        return view


def _blocked(scheduler: Any, request: Any) -> bool:
    """Whether vLLM could not run a waiting request now: its grammar or KV is not there yet, or a token of it is still in flight."""
    if request.num_stale_output_tokens and not request.drop_stale_output:
        return True
    if not scheduler._is_blocked_waiting_status(request.status) or request.request_id in scheduler.finished_recving_kv_req_ids:
        return False
    if request.status.name != "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR":
        return True
    grammar = request.structured_output_request.grammar
    return grammar is None or isinstance(grammar, Exception)


def _reason(request: Any) -> str:
    reason = str(request.get_finished_reason())
    return "stop" if reason == "repetition" else reason
