"""The time of attention whose tokens are spread over several tensor-parallel groups, which pass their KV around a ring.

Of N groups each has every N-th token of each prompt, so that all have the same part of the causal mask (striped attention, arXiv
2311.09431). A group's queries meet each group's KV in turn, and while they do, the next KV is on its way (ring attention, arXiv
2310.01889). It does not know who holds which request, nor how groups are formed.
"""

from dataclasses import replace
from typing import Any

from stallfree.perf.hardware import Link
from stallfree.perf.kernels import Attention, Chunks, Cost, send

PASS = 1.12
"""The time of a pass over that of the same pairs in one kernel: partial results are merged. Fitted to LoongServe's prefill of
500,000 tokens (arXiv 2404.09526; Llama-2-7B on 8 A800, SP4 TP2), nine tenths of which is attention."""


class Striped(Attention):
    """`Attention` of one layer on one device of `sp` groups that `link` joins; the `shape` arguments are those of `Attention`."""

    def __init__(self, sp: int, link: Link, heads: int, head_dim: int, **shape: Any):
        super().__init__(heads=heads, head_dim=head_dim, **shape)
        self._sp, self._link, self._row_bytes = sp, link, 2.0 * heads * head_dim

    def chunks(self, sums: Chunks) -> float:
        """Seconds of all passes. A group's own KV is there; each other group's comes while the pass before runs."""
        tokens, cached, pairs, tiles, longest, split = sums
        sp = self._sp
        share = Chunks(-(-tokens // sp), -(-cached // sp), pairs / sp**2, -(-tiles // sp), longest / sp, split)
        one = PASS * super().chunks(share)
        return one + (sp - 1) * max(one, self._kv(sums).seconds)

    def decodes(self, requests: int, context: int) -> float:
        """Seconds of decodes whose KV all groups hold in equal parts. Each group sends the queries of its own decodes to the others
        and gets their partial results. Not held against a measurement."""
        exchanged = send(self._link, -(-requests // self._sp) * self._row_bytes).seconds
        return super().decodes(requests, -(-context // self._sp)) + 2 * (self._sp - 1) * exchanged

    def cost_of_chunks(self, sums: Chunks) -> Cost:
        cost = super().cost_of_chunks(sums)
        return replace(cost, compute_s=cost.compute_s / self._sp, link_s=(self._sp - 1) * self._kv(sums).link_s)

    def cost_of_decodes(self, requests: int, context: int) -> Cost:
        cost = super().cost_of_decodes(requests, context)
        return replace(cost, compute_s=cost.compute_s / self._sp, bandwidth_s=cost.bandwidth_s / self._sp)

    def _kv(self, sums: Chunks) -> Cost:
        """What a group sends to the next in each pass."""
        return send(self._link, (sums.tokens + sums.cached) / self._sp * self._kv_bytes)
