"""Sampling on the device that has the logits. So one token per row comes to the host, not a vocabulary, and the host need not wait
for it before it prepares the next iteration. As on the host, a token depends only on the request's seed and its position.

Requests with penalties, biases or log-probabilities are sampled on the host, from their own rows. The masks of constrained requests
go to the device. It knows no model.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, islice, pairwise, takewhile
from math import inf

import numpy as np
import torch

from stallfree.core.plan import Work
from stallfree.core.uniform import uniform
from stallfree.executors.sampling import (
    GREEDY,
    Sampled,
    Sampling,
    mask_after,
    no_token,
    not_finite,
    positions,
    sampled_before,
)
from stallfree.executors.sampling import sample as sample_on_host
from stallfree.executors.torch.batch import upload


def sample(logits: torch.Tensor, works: Sequence[Work]) -> Sampled:
    """As `executors.sampling.sample`, for logits [rows, vocabulary] float32 on any device."""
    return Draw(logits, works).result


class Draw:
    """The tokens of an iteration, perhaps still to be computed, from `logits` [rows, vocabulary] float32, on any device: one row
    for each of `works`, and one more for each of its drafts. Later work of the device may write over `logits`.
    """

    def __init__(self, logits: torch.Tensor, works: Sequence[Work]):
        begins = list(accumulate([1 + len(work.drafts) for work in works], initial=0))
        own = {work.id: range(*ends) for work, ends in zip(works, pairwise(begins), strict=True)}
        samplings = {w.id: w.sampling if isinstance(w.sampling, Sampling) else GREEDY for w in works}
        simple = {id: sampling.plain and sampling.logprobs is None for id, sampling in samplings.items()}
        self._works = [work for work in works if simple[work.id]]
        self._on_host = [work for work in works if not simple[work.id]]
        on_device, on_host = ([row for work in of for row in own[work.id]] for of in (self._works, self._on_host))
        self._on_device = [at for work in self._works for at in positions(work)]
        self.ids = frozenset(work.id for work in works)
        """The requests that have a row."""
        self._device = logits.device
        self._rows = logits[upload(on_host, self._device)] if on_host else None
        self._tokens = self._copied = self._copy_ended = None
        self._refused: dict[str, str] = {}
        if on_device:
            rows = logits[upload(on_device, self._device)] if on_host else logits
            tokens, peaks = _sampled(self._masked(rows), self._on_device, [samplings[at.id] for at in self._on_device])
            fine = torch.isfinite(peaks)  # if a row has NaN, this is its largest
            self._tokens = tokens.where(fine, 0)
            self._copied = torch.stack((self._tokens, fine.to(tokens.dtype))).to("cpu", non_blocking=True)
            if logits.is_cuda:
                self._copy_ended = torch.cuda.Event()
                self._copy_ended.record()

    @cached_property
    def result(self) -> Sampled:
        """The result of `sample`; waits for the device. The requests' outputs must have all tokens before the sampled ones."""
        sampled: Sampled = {}, {}, {}
        if self._rows is not None:
            sampled = sample_on_host(self._rows.cpu().numpy(), self._on_host)
            self._rows = None
        if self._copied is not None:
            if self._copy_ended is not None:
                self._copy_ended.synchronize()
            rows = zip(*self._copied.tolist(), strict=True)
            for work in self._works:
                own = list(islice(rows, 1 + len(work.drafts)))
                tokens = work.verified(token for token, _ in takewhile(lambda row: row[1], own))
                if tokens:
                    sampled[0][work.id] = tokens
                else:
                    sampled[2][work.id] = self._refused.get(work.id) or not_finite(work)
        return sampled

    def _masked(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows sampled on the device, with -inf for tokens that constraints leave out. A request that may get no token at all
        has such a row, and its reason in `_refused`."""
        places, masks = [], []
        for place, work in enumerate(self._on_device):
            if isinstance(work.sampling, Sampling) and work.sampling.constraint is not None:
                try:
                    mask = mask_after(sampled_before(work), work.sampling, rows.shape[-1])
                except ValueError as error:  # at a draft, it is of no account: the draft is wrong
                    self._refused.setdefault(work.id, no_token(error))
                    mask = np.full(rows.shape[-1], -inf, np.float32)
                if mask is not None:
                    places.append(place)
                    masks.append(mask)
        if not places:
            return rows
        at = upload(places, self._device)
        return rows.index_copy(0, at, rows[at] + torch.from_numpy(np.stack(masks)).to(self._device))

    def tokens(self, ids: Sequence[str]) -> torch.Tensor:
        """The tokens of these requests [ids], on the device. Waits only if one is sampled on the host. 0 for a request that has no
        token, because its logits are not finite. All of `ids` are in `self.ids`.
        """
        places = {work.id: place for place, work in enumerate(self._on_device)}  # none of `ids` has drafts
        if self._tokens is not None and places.keys() >= set(ids):
            return self._tokens[upload([places[id] for id in ids], self._device)]
        return upload([self.result[0].get(id, (0,))[0] for id in ids], self._device)


def _sampled(logits: torch.Tensor, works: Sequence[Work], samplings: Sequence[Sampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, and the largest logit of each row."""
    peaks, tokens = logits.max(-1)
    # Rows that are sorted go apart: a number's token depends on the order of its row, which must not depend on other requests.
    for is_sorted in (True, False):
        rows = [row for row, s in enumerate(samplings) if s.temperature > 0 and (s.top_k > 0 or s.top_p < 1) == is_sorted]
        if rows:
            at = upload(rows, logits.device)
            own = logits[at] if len(rows) < len(samplings) else logits
            tokens = tokens.index_copy(0, at, _drawn(own, [works[row] for row in rows], [samplings[row] for row in rows]))
    return tokens, peaks


def _drawn(logits: torch.Tensor, works: Sequence[Work], samplings: Sequence[Sampling]) -> torch.Tensor:
    """For each row, the token at which the cumulative share passes the request's random number."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return upload(values, logits.device, torch.float64)[:, None]

    temperature = column([max(s.temperature, 1e-6) for s in samplings]).float()
    weights = torch.exp((logits - logits.amax(-1, keepdim=True)) / temperature)
    order = None
    if any(s.top_k or s.top_p < 1 for s in samplings):
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        most = column([min(s.top_k, logits.shape[-1]) or logits.shape[-1] for s in samplings])
        weights = weights.where(torch.arange(logits.shape[-1], device=logits.device) < most, 0.0)
        before = weights.double().cumsum(-1) - weights
        top_p = column([s.top_p for s in samplings])
        weights = weights.where((before < top_p * weights.double().sum(-1, keepdim=True)) | (top_p >= 1), 0.0)
    if any(s.min_p for s in samplings):
        weights = weights.where(weights >= column([s.min_p for s in samplings]), 0.0)  # the largest weight is 1
    sums = weights.double().cumsum(-1)
    numbers = column([uniform(s.seed, work.start + work.count) for s, work in zip(samplings, works, strict=True)])
    # Rounding may leave a sum just below the wanted share: then the last weight above 0 is meant.
    whole = sums[:, -1:].contiguous()
    last = torch.searchsorted(sums, whole)
    places = torch.searchsorted(sums, numbers * whole, right=True).minimum(last)
    return (places if order is None else order.gather(-1, places)).squeeze(-1)
