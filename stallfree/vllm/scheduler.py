"""vLLM's scheduler with the `slo` policy: before each iteration the policy says whose prompt may have how many tokens in it, and
who has to wait. Everything else stays vLLM's: KV blocks, prefix cache, preemption, speculation, grammars, adapters.

`pacer.py` asks the policy. Here vLLM's own `schedule` follows the answer, through the queue of waiting requests and through
`_reserve_prefill_lookahead`: every request's number of tokens passes through this method last.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing import parent_process
from typing import Any

from stallfree.vllm import contract

contract.check()  # before the imports that would fail with another version

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.interface import PauseState  # noqa: E402
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402

from stallfree.vllm.draft import VllmDraft  # noqa: E402
from stallfree.vllm.pacer import Pacer  # noqa: E402

_OURS, _THEIRS = logging.getLogger("stallfree"), logging.getLogger("vllm")
_OURS.handlers, _OURS.level, _OURS.propagate = _THEIRS.handlers, _THEIRS.level, _THEIRS.propagate
"""What this project logs goes where vLLM's log goes."""


class _Paced:
    """The methods that both of vLLM's schedulers get."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        try:
            self.pacer = Pacer.of(self)
        except ValueError as error:
            if parent_process() is None:
                raise
            raise SystemExit(f"error: {error}") from None  # in a process of vLLM's: this line instead of two tracebacks

    def schedule(self: Any, throttle_prefills: bool = False) -> Any:
        if self.pause_state is PauseState.PAUSED_ALL:
            self.pacer.leave(self)  # vLLM forgets who has ended
            return super().schedule(throttle_prefills)
        draft = self.pacer.draft(self, waiting=self.pause_state is PauseState.UNPAUSED)
        with self._following(draft):
            output = super().schedule(throttle_prefills)
        self.pacer.scheduled(draft, output)
        return output

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        self.pacer.ran(scheduler_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.pacer.applied(self)
        return outputs

    def get_grammar_bitmask(self: Any, scheduler_output: Any) -> Any:
        """vLLM calls this while the iteration runs: the time to tell of the one before."""
        self.pacer.tell()
        return super().get_grammar_bitmask(scheduler_output)

    def shutdown(self: Any) -> None:
        self.pacer.close()
        super().shutdown()

    @contextmanager
    def _following(self: Any, draft: VllmDraft) -> Iterator[None]:
        """While `schedule` runs: shares as in the draft, and of the waiting requests only those that it admits, in its order, and
        those that wait for something else, so that vLLM can look whether that has come."""
        queue, most, blocked = self.waiting, self.max_num_scheduled_tokens, self.pacer.blocked
        caps = draft.caps | {request.request_id: 0 for request in blocked}
        if self.need_mamba_block_aligned_split:  # only vLLM chooses where chunks end, within the tokens of all shares together
            self.max_num_scheduled_tokens = draft.budget - draft.left if draft.work else most
        elif caps:
            self._reserve_prefill_lookahead = partial(_capped, super()._reserve_prefill_lookahead, caps)
        offered = [view.request for view in draft.admitted] + blocked
        # One of these without a share would end vLLM's search for requests to admit.
        holding = [request for request in self.kv_holding_waiting if caps.get(request.request_id) == 0]
        if holding:
            self.kv_holding_waiting.remove_requests(holding)
        if queue:
            self.waiting = create_request_queue(SchedulingPolicy.FCFS)
            if offered:
                queue.remove_requests(offered)
                self.waiting.extend(offered)
        try:
            yield
        finally:
            self.max_num_scheduled_tokens = most
            vars(self).pop("_reserve_prefill_lookahead", None)
            if holding:
                self.kv_holding_waiting.prepend_requests(reversed(holding))
            if queue is not self.waiting:
                left, self.waiting = list(self.waiting), queue
                if left:
                    queue.prepend_requests(reversed(left))


def _capped(
    reserve: Callable[[Any, int, int], int], caps: Mapping[str, int], request: Any, num_computed_tokens: int, num_new_tokens: int
) -> int:
    """vLLM's last word on a request's number of tokens, `reserve`, after the policy's share. A request that needs no more than its
    share is left alone: vLLM may have filled its tokens up with speculated ones."""
    cap = caps.get(request.request_id)
    if cap is not None and (not cap or request.num_tokens - num_computed_tokens > cap):
        num_new_tokens = min(num_new_tokens, cap)
    return reserve(request, num_computed_tokens, num_new_tokens)


class _Sync(_Paced, Scheduler):
    """Where vLLM schedules an iteration after the one before has ended."""


class SloScheduler(_Paced, AsyncScheduler):
    """Where vLLM schedules an iteration while the one before runs. If it does not, this makes the other one instead."""

    def __new__(cls, vllm_config: Any, *arguments: Any, **options: Any) -> Any:
        if vllm_config.scheduler_config.async_scheduling:
            return super().__new__(cls)
        return _Sync(vllm_config, *arguments, **options)
