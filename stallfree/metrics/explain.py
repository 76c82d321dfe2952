"""Tells a recorded run in words: what happened in a step, to a request, or in the whole run, and why.

It repeats what the records and the account of stalls say, and judges nothing itself. Times are seconds since the run's first
arrival.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from statistics import median

from stallfree.core.policy import CostModel
from stallfree.core.record import Arrived, Run, StepRecord
from stallfree.metrics.shares import Shares
from stallfree.metrics.stalls import Stall, StallAccount, Wait

WORST = 5
"""At most so many items of a list are shown."""

VARYING = re.compile(r"until \S+ is due|[0-9]+(\.[0-9]+)?")
"""The parts that differ between reasons of one kind: numbers, and the request that is due."""


class Explained:
    """`run` and `records`, judged by the SLO of the run and by the requests' own targets. `cost`: prices of iterations as the run
    began. They learn from its iterations, and say what an adapter took. Raises ValueError without records."""

    def __init__(self, run: Run, records: Sequence[StepRecord], cost: CostModel | None = None):
        if not records:
            raise ValueError("the record holds no iterations: the engine got no request while it was recorded")
        self.run, self.records = run, records
        self.arrived = {a.id: a for r in records for a in r.arrived}
        self.adapters = {id: key for r in records for id, key, *_ in r.adapters}
        self.ranks = {key: rank for r in records for _, key, _, rank in r.adapters}
        self.heaviest = dict(self._heaviest(cost)) if cost is not None and self.ranks else {}
        """By step: the adapter of the largest rank in it, and the seconds that it took by the prices."""
        account = StallAccount(run.targets)
        self.stalls: list[list[Stall]] = []
        """The stalls of each record, in the records' order."""
        self.waits: list[Wait] = []
        """First tokens with long waits, in their order."""
        self.prefills: list[dict[str, int]] = []
        """The prefill tokens by request, of each record in the records' order; all else in its work are decodes."""
        for r in records:
            self.stalls.append(account.record(r))
            self.waits += account.waits
            self.prefills.append(dict(account.iteration.prefills))
        self.origin = min([records[0].t_plan, *(a.arrival for a in self.arrived.values())])
        self.shares = Shares(run, records, self.origin)

    def on_the_whole(self) -> Iterator[str]:
        """The whole run: what was served, how well, which tokens were late, why, and because of which requests."""
        records, stalls = self.records, [s for of_record in self.stalls for s in of_record]
        seconds = records[-1].t_end - self.origin
        emitted = sum(len(r.emitted) + len(r.sampled_elsewhere) for r in records)
        reasons = Counter(f.reason for r in records for f in r.finished)
        ends = ", ".join(f"{count} by {reason}" for reason, count in reasons.most_common()) or "none"
        yield f"{len(records)} iterations in {seconds:.1f} s under policy {self.run.policy}, {self.run.slo or 'with no SLO'}."
        yield f"{len(self.arrived)} requests arrived and got {emitted} tokens; ended: {ends}."
        yield f"{_of_all(records, 'budget')} tokens of budget an iteration; {_of_all(records, 'num_waiting')} requests waited."
        transfers, recalled = [d for r in records for d in r.delivered], sum(len(r.recalled) for r in records)
        if transfers or recalled:
            parts = sum(d.cut is not None for d in transfers)
            in_part = f", {parts} of them in part" if parts else ""
            computed = f"{_number(len(transfers), 'prompt')} computed by other engines{in_part}"
            yield f"{computed}; {recalled} computed here after a KV transfer failed."
        if shown := sum(len(r.shown) for r in records):
            yield f"{_number(shown, 'token')} of other engines shown while KV was on its way."
        checked, right = map(sum, zip(*(r.drafts for r in records), strict=True))
        if checked:
            yield f"{_number(checked, 'draft')} checked, {right} of them right ({right / checked:.0%})."
        if loads := [load for r in records for load in r.loaded]:
            spread = f"{_ms(median([load.t - load.asked for load in loads]))} at the median"
            asked = f"{len(set(self.adapters.values()))} different ones were asked for"
            yield f"Adapters were loaded {len(loads)} times, {spread}; {asked}."
        margins = [r.margin for r in records if r.margin is not None]
        if margins:
            spread = f"{min(margins):.2f} to {max(margins):.2f}, {median(margins):.2f} at the median"
            yield f"Expected times were multiplied by a margin of {spread}."
        yield from self.shares.forecasts()
        yield from self.shares.refused()
        yield from self.shares.relegations()
        late = [s for s in stalls if s.kind == "late"]
        left_out = len(stalls) - len(late)
        yield f"{_number(left_out, 'ready decode')} left out of iterations, {_number(len(late), 'token')} late."
        for cause, count in Counter(s.cause for s in late).most_common():
            yield f"  {count} late because of {CAUSES[cause]}"
        yield from self.shares.late(late)
        culprits = Counter(id for s in stalls for id, _ in s.culprits)
        for id, count in culprits.most_common(WORST):
            yield f"  the prompt of {id} ({self._prompt(id)}) delayed {_number(count, 'token')}"
        for key, count in Counter(key for s in stalls if (key := self._adapter_at_fault(s)) is not None).most_common(WORST):
            yield f"  the adapter {key} (rank {self.ranks[key]}) delayed {_number(count, 'token')}"
        worst = sorted(stalls, key=lambda s: -s.gap_s)[:WORST]
        if worst:
            yield "The longest waits for a token:"
        for s in worst:
            yield f"  {self._at(s.t)}, step {s.step}: {s.id} waited {_ms(s.gap_s)}; {self._words(s)}"
        if self.waits:
            yield f"{_number(len(self.waits), 'first token')} waited for long. The longest waits:"
        for w in sorted(self.waits, key=lambda w: -w.seconds)[:WORST]:
            yield f"  {self._at(w.t)}, step {w.step}: {w.id} waited {_ms(w.seconds)}; {w.words()}"

    def step(self, number: int) -> Iterator[str]:
        """One iteration: its work, its time, what limited it, and which requests were late. Raises ValueError for a step that is
        not in the record.
        """
        first = self.records[0].step
        index = number - first
        if not 0 <= index < len(self.records):
            raise ValueError(f"step {number} is not in the record; it holds steps {first} to {self.records[-1].step}")
        r = self.records[index]
        prefills = self.prefills[index]
        decoded = [id for id, _, _ in r.work if id not in prefills]
        began = r.t_plan
        if self.run.capacity.overlap and index:  # it was planned ahead, and waited for the step before
            began = max(began, self.records[index - 1].t_end)
        took = r.t_end - began
        yield f"Step {r.step}, {self._at(r.t_plan)}: {_ms(r.t_end - r.t_start)} on the executor, {_ms(took)} with its planning."
        if r.error is not None:
            yield f"It failed: {r.error}. All its requests ended with that error."
        yield f"{_number(len(decoded), 'decode')}{_list(decoded)}."
        if r.drafted:
            yield f"With {_number(r.drafts[0], 'draft')}, {r.drafts[1]} of them right."
        cached = dict(r.cached)
        for id, start, count in r.work:
            if id in prefills:
                chunk = f"{_number(count, 'token')} of prefill of {id}: {start} to {start + count} of {self._length(id)}"
                yield f"{chunk}{self._admission(r, id, cached)}."
        yield f"The budget was {_number(r.budget, 'token')}, {sum(count for _, _, count in r.work)} of them used: {r.reason}."
        if r.limit_s is not None and r.margin is not None:
            verdict = "stayed within it" if took <= r.limit_s else f"took {_ms(took - r.limit_s)} longer"
            expected = f"{_ms(r.limit_s / r.margin)} by the cost model, times the margin {r.margin:.2f}"
            yield f"The limit was {_ms(r.limit_s)}: {expected}. The step {verdict}."
        if r.preempted:
            yield f"Preempted since the step before, because KV blocks ran out{_list(r.preempted)}."
        if r.stalled:
            yield f"Ready, but left out{_list(r.stalled)}."
        for s in self.stalls[index]:
            what = "waited" if s.kind == "left out" else "was late"
            yield f"{s.id} {what}: {_ms(s.gap_s)} since its token before; {self._words(s)}."
        if r.shown:
            yield f"Tokens of other engines shown since the step before{_list([id for id, _ in r.shown])}."
        if r.delivered:
            yield f"KV transfers delivered since the step before{_list([d.id for d in r.delivered])}."
        if r.recalled:
            yield f"KV transfers failed since the step before; these prompts are computed here{_list(r.recalled)}."
        for load in r.loaded:
            since = f"{_ms(load.t - load.asked)} after it was asked for"
            yield f"Adapter {load.key} was loaded into {_number(load.blocks, 'KV block')}, {since}."
        for refusal in r.refused:
            whose = f" of tenant {refusal.tenant}" if refusal.tenant else ""
            yield f"A request{whose} was refused {self._at(refusal.t)}, because: {refusal.why}"
        for f in r.finished:
            yield f"{f.id} ended: {f.reason}."
        yield f"After it {r.num_running} requests were running and {r.num_waiting} waiting; {r.free_blocks} KV blocks were free."

    def request(self, id: str) -> Iterator[str]:
        """One request's life: its waits, its prefill, each stall with its cause, and the requests that it delayed. `id` may be the
        beginning of an id. Raises ValueError if no request begins so, or several do.
        """
        a = self._find(id)
        scheduled = [index for index, r in enumerate(self.records) if any(id == a.id for id, _, _ in r.work)]
        delivered = [d for r in self.records for d in r.delivered if d.id == a.id]
        shown = [t for r in self.records for id, t in r.shown if id == a.id]
        elsewhere = [t for r in self.records for id, t in r.sampled_elsewhere if id == a.id]
        tokens = [*elsewhere, *(r.t_end for r in self.records if a.id in r.emitted)]
        targets = f"{self.shares.whose(a.id)}{f', own targets {a.slo}' if a.slo else ''}"
        yield f"{a.id} arrived {self._at(a.arrival)}: {a.prompt_tokens} prompt tokens, at most {a.max_tokens} of output{targets}."
        yield from self._adapter(a)
        yield from self.shares.fate(a.id)
        if any(a.id in r.recalled for r in self.records):
            yield "Its KV transfer failed, so this engine computed its prompt."
        if shown:
            yield f"Another engine sampled its first {_number(len(shown), 'token')} while KV was on its way."
        if delivered:
            transfer = delivered[0]
            moved = f"{transfer.num_bytes:,} bytes of KV, {_ms(transfer.seconds)} of copying and sending"
            what = (
                "Its prompt was"
                if transfer.cut is None
                else f"The first {_number(transfer.cut, 'token')} of its prompt {'was' if transfer.cut == 1 else 'were'}"
            )
            yield f"{what} computed by another engine, asked {self._at(transfer.asked)}; {moved}."
        elif not scheduled and not shown:
            yield "It was never scheduled."
        elif scheduled:
            yield from self._beginning(a, scheduled)
        if tokens:
            gaps = [y - x for x, y in pairwise(tokens)]
            paces = f"; TBT {_ms(median(gaps))} at the median, {_ms(max(gaps))} at most" if gaps else ""
            first = f"First token {self._at(tokens[0])}, TTFT {_ms(tokens[0] - a.arrival)}"
            yield f"{first}; {_number(len(tokens), 'token')} in all{paces}."
        own = [s for of_record in self.stalls for s in of_record if s.id == a.id]
        yield f"{_number(len(own), 'stalled or late token')}{':' if own else '.'}"
        passed = [s for s in own if s.kind == "left out"]
        if len(passed) > WORST:
            last = next(r for r in reversed(self.records) if r.step == passed[-1].step)
            yield f"  passed over in {len(passed)} iterations, the last one step {last.step}: {last.reason}"
            own = [s for s in own if s.kind == "late"]
        for s in own:
            yield f"  {self._at(s.t)}, step {s.step}: {s.kind}, {_ms(s.gap_s)} since its token before; {self._words(s)}"
        blamed = Counter(s.id for of_record in self.stalls for s in of_record for other, _ in s.culprits if other == a.id)
        if blamed:
            yield f"Its own prompt delayed {_number(blamed.total(), 'token')} of {_number(len(blamed), 'other')}{_list(blamed)}."
        ends = [(r, f) for r in self.records for f in r.finished if f.id == a.id]
        yield (
            f"It ended {self._at(ends[0][0].t_end)}: {ends[0][1].reason}." if ends else "It had not ended when the record ended."
        )

    def _heaviest(self, cost: CostModel) -> Iterator[tuple[int, tuple[str, float]]]:
        """The items of `heaviest`."""
        extra = {id: rows for r in self.records for id, rows in r.extra_rows}
        for r in self.records:
            keys = {self.adapters[id] for id, _, _ in r.work if id in self.adapters}
            rows = sum(extra.get(id, 0) for id, _, _ in r.work)
            pieces = [*((start, count) for _, start, count in r.work), *([(rows, 0)] if rows else [])]
            ranks, seconds = sum(self.ranks[key] for key in keys), r.t_end - r.t_start
            shape = [(ranks, -1), *pieces] if ranks else pieces
            if ranks:
                key = max(keys, key=self.ranks.__getitem__)
                rest = ranks - self.ranks[key]
                without = [(rest, -1), *pieces] if rest else pieces
                yield r.step, (key, seconds * (1 - cost.seconds(without) / cost.seconds(shape)))
            if r.error is None and pieces and seconds > 0:
                cost.learn(shape, seconds)

    def _adapter_at_fault(self, s: Stall) -> str | None:
        """The adapter without which the iteration at fault would have been short enough, by the prices."""
        key, seconds = self.heaviest.get(s.blamed.step, ("", 0.0))
        return key if s.kind == "late" and s.cause in ("prefill", "decodes") and 0 < s.late_s <= seconds else None

    def _words(self, s: Stall) -> str:
        if (key := self._adapter_at_fault(s)) is None:
            return s.words()
        took = _ms(self.heaviest[s.blamed.step][1])
        return f"{s.words()}; the adapter {key} of rank {self.ranks[key]} took about {took} of them, by the prices"

    def _adapter(self, a: Arrived) -> Iterator[str]:
        """The adapter of the request `a`, and the load that it waited for."""
        if (key := self.adapters.get(a.id)) is None:
            return
        scheduled = next((r.t_plan for r in self.records if any(id == a.id for id, _, _ in r.work)), None)
        loads = [load for r in self.records for load in r.loaded if load.key == key and load.t > a.arrival]
        if loads and (scheduled is None or loads[0].t <= scheduled):
            yield f"Its adapter {key} had to be loaded, which ended {_ms(loads[0].t - a.arrival)} after it arrived."
        else:
            yield f"Its adapter {key} was resident."

    def _beginning(self, a: Arrived, scheduled: Sequence[int]) -> Iterator[str]:
        """How the request `a` waited and was prefilled. `scheduled`: the indices of the records with its work."""
        first = self.records[scheduled[0]]
        waited = [index for index, r in enumerate(self.records[: scheduled[0]]) if a.arrival <= r.t_end]
        others = Counter[str]()
        for index in waited:
            others.update(self.prefills[index])
        ahead = (
            f"; meanwhile {sum(others.values())} tokens of prefill of {_number(len(others), 'other')} were computed"
            if others
            else ""
        )
        yield f"It waited {_ms(first.t_plan - a.arrival)}, {_number(len(waited), 'iteration')}, until step {first.step}{ahead}."
        yield from self._withheld(waited)
        cached = [count for r in self.records for id, count in r.cached if id == a.id]
        hit = f", {cached[0]} tokens of it found in the prefix cache" if cached and cached[0] else ""
        chunks = [index for index in scheduled if a.id in self.prefills[index]]
        seconds = self.records[chunks[-1]].t_end - first.t_start if chunks else 0.0
        yield f"Its prompt was computed in {_number(len(chunks), 'chunk')} over {_ms(seconds)}{hit}."
        between = sorted({*range(chunks[0], chunks[-1])} - {*chunks}) if chunks else []
        if between:
            yield f"Between its chunks {_number(len(between), 'iteration')} computed nothing of it."
            yield from self._withheld(between)
        preempted = [r.step for r in self.records if a.id in r.preempted]
        if preempted:
            yield f"It was preempted, because KV blocks ran out, before step{_list(map(str, preempted))}; KV was computed again."

    def _withheld(self, indices: Iterable[int]) -> Iterator[str]:
        """How many of these records held no prefill at all, for each kind of reason that the policy gave."""
        kinds: dict[str, list[StepRecord]] = {}
        for index in indices:
            if not self.prefills[index]:
                r = self.records[index]
                kinds.setdefault(VARYING.sub("", r.reason), []).append(r)
        for alike in sorted(kinds.values(), key=len, reverse=True)[:WORST]:
            last = alike[-1]
            yield f"  {_number(len(alike), 'iteration')} held no prefill at all, the last one step {last.step}: {last.reason}."

    def _find(self, id: str) -> Arrived:
        ids = [a for a in self.arrived if a.startswith(id)]
        if id in self.arrived:
            return self.arrived[id]
        if not ids:
            first = next(iter(self.arrived), "none")
            raise ValueError(f"no request in the record begins with {id!r}; the first is {first}")
        if len(ids) > 1:
            raise ValueError(f"{len(ids)} requests begin with {id!r}: {', '.join(ids[:WORST])}; give more of one id")
        return self.arrived[ids[0]]

    def _length(self, id: str) -> str:
        return f"{self.arrived[id].prompt_tokens}" if id in self.arrived else "an unknown number"

    def _prompt(self, id: str) -> str:
        return f"{self._length(id)} tokens"

    def _admission(self, r: StepRecord, id: str, cached: dict[str, int]) -> str:
        if id not in cached or id not in self.arrived:
            return ""
        hit = f", {cached[id]} found in the prefix cache" if cached[id] else ""
        return f"; admitted here after {_ms(r.t_plan - self.arrived[id].arrival)}{hit}"

    def _at(self, t: float) -> str:
        return f"at {t - self.origin:.3f} s"


CAUSES = {
    "prefill": "a prefill beside them",
    "decodes": "the decodes alone",
    "left out": "an earlier step that left them out",
    "preempted": "preemption",
    "unexpected": "time between iterations",
}


def _of_all(records: Sequence[StepRecord], field: str) -> str:
    values = [getattr(r, field) for r in records]
    return f"{min(values)} to {max(values)} (median {median(values):g})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _list(ids: Iterable[str]) -> str:
    ids = list(ids)
    more = f" and {len(ids) - WORST} more" if len(ids) > WORST else ""
    return f": {', '.join(ids[:WORST])}{more}" if ids else ""
