"""Sampling where the logits are, so that a token a row comes to the host and not a vocabulary; and without waiting for it, so that
the next iteration can be prepared meanwhile. Same promise as on the host: a token depends on the request's seed and its position
alone.

Requests with penalties, biases or log-probabilities are sampled on the host, from their rows alone.
"""

from collections.abc import Sequence
from functools import cached_property

import torch

from stallfree.core.plan import Work
from stallfree.executors import sampling
from stallfree.executors.sampling import GREEDY, Sampling, TokenLogprob, uniform
from stallfree.executors.torch.batch import upload

Sampled = tuple[dict[str, tuple[int, ...]], dict[str, TokenLogprob], dict[str, str]]


def sample(logits: torch.Tensor, works: Sequence[Work]) -> Sampled:
    """As `executors.sampling.sample`, of logits [rows, vocabulary] float32 on any device."""
    return Draw(logits, works).result


class Draw:
    """The tokens of an iteration, from when its logits are asked for: row i of `logits` [rows, vocabulary] float32, on any device,
    belongs to `works[i]`. `logits` may be written over by what the device does later.
    """

    def __init__(self, logits: torch.Tensor, works: Sequence[Work]):
        hows = [w.sampling if isinstance(w.sampling, Sampling) else GREEDY for w in works]
        own = [how.plain and how.logprobs is None for how in hows]
        here, others = ([row for row, is_own in enumerate(own) if is_own == wanted] for wanted in (True, False))
        self._here, self._others = [works[row] for row in here], [works[row] for row in others]
        self.ids = frozenset(work.id for work in works)
        """The requests that have a row."""
        self._device = logits.device
        self._rows = logits[upload(others, self._device)] if others else None
        self._tokens = self._found = self._came = None
        if here:
            rows = logits[upload(here, self._device)] if others else logits
            tokens, peaks = _sampled(rows, self._here, [hows[row] for row in here])
            fine = torch.isfinite(peaks)  # NaN is the largest of any row that it is in
            self._tokens = tokens.where(fine, 0)
            self._found = torch.stack((self._tokens, fine.to(tokens.dtype))).to("cpu", non_blocking=True)
            if logits.is_cuda:
                self._came = torch.cuda.Event()
                self._came.record()

    @cached_property
    def result(self) -> Sampled:
        """Waits for them. The outputs of its requests have to be there up to the tokens that are sampled."""
        found: Sampled = {}, {}, {}
        if self._rows is not None:
            found = sampling.sample(self._rows.cpu().numpy(), self._others)
            self._rows = None
        if self._found is not None:
            if self._came is not None:
                self._came.synchronize()
            for work, token, fine in zip(self._here, *self._found.tolist(), strict=True):
                if fine:
                    found[0][work.id] = (token,)
                else:
                    found[2][work.id] = sampling.not_finite(work)
        return found

    def tokens(self, ids: Sequence[str]) -> torch.Tensor:
        """The tokens of these requests [ids], on the device; waits only for what is sampled on the host. 0 for a request that has
        none, since its logits are not finite. All of `ids` are among `self.ids`.
        """
        here = {work.id: place for place, work in enumerate(self._here)}
        if self._tokens is not None and here.keys() >= set(ids):
            return self._tokens[upload([here[id] for id in ids], self._device)]
        return upload([self.result[0].get(id, (0,))[0] for id in ids], self._device)


def _sampled(logits: torch.Tensor, works: Sequence[Work], hows: Sequence[Sampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, and the largest logit of each row."""
    peaks, tokens = logits.max(-1)
    # Those that are sorted go by themselves: which token a number means depends on the order, and is not to depend on neighbours.
    for is_sorted in (True, False):
        rows = [row for row, how in enumerate(hows) if how.temperature > 0 and (how.top_k > 0 or how.top_p < 1) == is_sorted]
        if rows:
            at = upload(rows, logits.device)
            own = logits[at] if len(rows) < len(hows) else logits
            tokens = tokens.index_copy(0, at, _drawn(own, [works[row] for row in rows], [hows[row] for row in rows]))
    return tokens, peaks


def _drawn(logits: torch.Tensor, works: Sequence[Work], hows: Sequence[Sampling]) -> torch.Tensor:
    """Tokens at the places where the cumulative share passes each request's number."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return upload(values, logits.device, torch.float64)[:, None]

    temperature = column([max(how.temperature, 1e-6) for how in hows]).float()
    weights = torch.exp((logits - logits.amax(-1, keepdim=True)) / temperature)
    order = None
    if any(how.top_k or how.top_p < 1 for how in hows):
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        most = column([min(how.top_k, logits.shape[-1]) or logits.shape[-1] for how in hows])
        weights = weights.where(torch.arange(logits.shape[-1], device=logits.device) < most, 0.0)
        before = weights.double().cumsum(-1) - weights
        top_p = column([how.top_p for how in hows])
        weights = weights.where((before < top_p * weights.double().sum(-1, keepdim=True)) | (top_p >= 1), 0.0)
    if any(how.min_p for how in hows):
        weights = weights.where(weights >= column([how.min_p for how in hows]), 0.0)  # the largest weight is 1
    sums = weights.double().cumsum(-1)
    numbers = column([uniform(how.seed, work.start + work.count) for how, work in zip(hows, works, strict=True)])
    # Rounding may leave a sum short of what is wanted: then the last weight above 0 is meant.
    whole = sums[:, -1:].contiguous()
    last = torch.searchsorted(sums, whole)
    places = torch.searchsorted(sums, numbers * whole, right=True).minimum(last)
    return (places if order is None else order.gather(-1, places)).squeeze(-1)
