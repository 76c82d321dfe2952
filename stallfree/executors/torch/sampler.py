"""Sampling where the logits are, so that a token a row comes to the host and not a vocabulary. Same promise as on the host: a token
depends on the request's seed and its position alone.

Requests with penalties, biases or log-probabilities are sampled on the host, from their rows alone.
"""

from collections.abc import Sequence

import torch

from stallfree.core.plan import Work
from stallfree.executors import sampling
from stallfree.executors.sampling import GREEDY, Sampling, TokenLogprob, uniform

Sampled = tuple[dict[str, tuple[int, ...]], dict[str, TokenLogprob], dict[str, str]]


def sample(logits: torch.Tensor, works: Sequence[Work]) -> Sampled:
    """As `executors.sampling.sample`, of logits [rows, vocabulary] float32 on any device."""
    hows = [w.sampling if isinstance(w.sampling, Sampling) else GREEDY for w in works]
    here = [row for row, how in enumerate(hows) if how.plain and how.logprobs is None]
    others = [row for row in range(len(works)) if row not in set(here)]
    result: Sampled = {}, {}, {}
    if others:
        result = sampling.sample(logits[others].cpu().numpy(), [works[row] for row in others])
    if here:
        tokens, finite = _sampled(
            logits if len(here) == len(works) else logits[here], [works[i] for i in here], [hows[i] for i in here]
        )
        for row, token, fine in zip(here, tokens, finite, strict=True):
            if fine:
                result[0][works[row].id] = (token,)
            else:
                result[2][works[row].id] = sampling.not_finite(works[row])
    return result


def _sampled(logits: torch.Tensor, works: Sequence[Work], hows: Sequence[Sampling]) -> tuple[list[int], list[bool]]:
    """The tokens, and whether the logits that they are from are finite at their largest."""
    peaks, tokens = logits.max(-1)
    drawn = [row for row, how in enumerate(hows) if how.temperature > 0]
    if drawn:
        rows = logits if len(drawn) == len(hows) else logits[drawn]
        tokens[drawn] = _drawn(rows, [works[row] for row in drawn], [hows[row] for row in drawn])
    # NaN is the largest of any row that it is in.
    both = torch.stack((tokens, torch.isfinite(peaks).to(tokens.dtype))).tolist()
    return both[0], [bool(fine) for fine in both[1]]


def _drawn(logits: torch.Tensor, works: Sequence[Work], hows: Sequence[Sampling]) -> torch.Tensor:
    """Tokens at the places where the cumulative share passes each request's number."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).to(logits.device)[:, None]

    temperature = column([max(how.temperature, 1e-6) for how in hows]).float()
    weights = torch.exp((logits - logits.amax(-1, keepdim=True)) / temperature)
    order = None
    if any(how.top_k or how.top_p < 1 for how in hows):
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        most = column([how.top_k or logits.shape[-1] for how in hows])
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
