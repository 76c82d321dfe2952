"""A search's result in words: the winner, its lead, its bottleneck, its price, and the commands that run it. It ranks
nothing."""

from dataclasses import dataclass, replace

from stallfree.core.slo import Slo
from stallfree.metrics.report import Targets, by_class
from stallfree.planner.candidates import kind
from stallfree.planner.capacities import LOWEST, SECONDS
from stallfree.planner.commands import commands
from stallfree.planner.search import Answer, Ranked
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import PoolsResult, SplitSimulator
from stallfree.workload.traffic import Traffic

CLOSE = 0.12
"""A lead of this share or less is too close to call: it is the cost model's error of ratios between policies (docs/fidelity.md)."""
TIMES, NOTHING = 2.0, 10.0
"""From these ratios on, a lead is said in times instead of per cent, and the other side is said to serve next to nothing."""
BUSY = 0.1
"""A pool that idles less than this share of time is full."""
DELAY = 0.3
"""KV transfers are the limit if they take more than this share of the target for TTFT."""


@dataclass(frozen=True)
class Verdict:
    """The advice. `headline`: whether to disaggregate. `moved`: what the best deployment whose requests are cut, move or are spread
    would serve; None if none meets the targets. `margin`: the rate of the best split deployment over that of the best co-located
    one, less 1 (None with one kind only). `margins`: the least and the largest of that over the draws of the load. `sure`: whether
    the order is called; see `verdict`. `binds`: the limit of the chosen one. `dollars`: its price of a million output tokens at
    capacity, if the devices have one. `commands`: they run it. `pools`: for the best split deployment at capacity, the share of
    time that each pool idles, the mean seconds that a KV transfer delays first tokens, and their share of decode time.
    """

    headline: str
    moved: str | None
    margin: float | None
    margins: tuple[float, float] | None
    sure: bool
    binds: str
    dollars: float | None
    commands: list[str]
    pools: dict[str, float] | None


def verdict(site: Site, answer: Answer, traffic: Traffic, slo: Targets) -> Verdict:
    """The advice that follows from `answer`: co-location, which is simpler, unless two pools surely lead.

    A lead is sure if it is larger than `CLOSE`, and if the same kind leads in every draw of the load. Both kinds get the same
    draws, so a draw that is hard for both is no reason for doubt. Of five draws, a kind that is no better leads in all with a
    probability of 1/32.
    """
    best = {kind(each.deployed): each for each in answer.whole}
    co_located, split = best.get("co-located"), best.get("pools")
    take = co_located or split
    if take is None:
        raise ValueError("an answer without a deployment has no verdict; `search` raises an error instead")
    margin, margins, sure = None, None, True
    if co_located is not None and split is not None:
        margin = _over(split.rate, co_located.rate)
        by_draw = [_over(a, b) for a, b in zip(split.draws, co_located.draws, strict=True)]
        margins = min(by_draw), max(by_draw)
        pools_lead = margin > CLOSE and margins[0] > 0
        sure = pools_lead or (_over(co_located.rate, split.rate) > CLOSE and margins[1] < 0)
        take = split if pools_lead else co_located
    price = _dollars(take)
    dollars = None if price is None or take.at is None else price / 3600 / take.at.output_tokens_per_s * 1e6
    pools = None if split is None or not split.rate else _pools(split, traffic)
    drawn = f"{len(take.draws)} {'parts of the trace' if traffic.arrivals == 'trace' else 'draws of the load'}"
    if len(take.draws) == 1:
        drawn = "the whole trace, which is too short for parts"
    headline = _headline(site, co_located, split, sure, drawn) if co_located and split else _alone(site, take, drawn)
    binds = _binds(take, pools, by_class(slo).default)
    first = take.rate if traffic.arrivals == "trace" else take.draws[0]
    moved = None if answer.moved is None else _moved(site, answer.moved, first)
    return Verdict(headline, moved, margin, margins, sure, binds, dollars, commands(site, take.deployed, slo), pools)


def _over(rate: float, other: float) -> float:
    """A rate over another, less 1. A rate of 0 counts as the lowest that is tried, so that the result is a number."""
    return max(rate, LOWEST) / max(other, LOWEST) - 1


def _pools(split: Ranked, traffic: Traffic) -> dict[str, float]:
    """Figures of both pools, from one more run at capacity."""
    assert isinstance(split.deployed, Split)
    result: PoolsResult = SplitSimulator(split.deployed).run(traffic.lasting(SECONDS, split.rate).stream(split.rate, split.seed))
    transfers = result.transfers
    return {
        "prefill_idle": result.prefill_idle,
        "decode_idle": result.decode_idle,
        "transfer_s": transfers.exposed_s / max(1, transfers.transferred),
        "transfer_share_of_decode": transfers.exposed_s / transfers.decode_s if transfers.decode_s else 0.0,
        "kv_bytes": transfers.bytes,
        "not_transferred": float(transfers.local),
    }


def _alone(site: Site, only: Ranked, drawn: str) -> str:
    """The headline if one kind meets the targets."""
    if site.gpus == 1:
        return f"One GPU cannot be two pools: {_words(site, only, drawn)}."
    advice = "Do not disaggregate" if isinstance(only.deployed, Deployment) else "Disaggregate"
    return f"{advice}: only {_words(site, only, drawn)} meets the targets."


def _headline(site: Site, co_located: Ranked, split: Ranked, sure: bool, drawn: str) -> str:
    first, second = sorted((co_located, split), key=lambda each: -each.rate)
    words, other = _words(site, first, drawn), _words(site, second, drawn)
    ratio = 1 + _over(first.rate, second.rate)
    lead = f"{ratio - 1:.0%} more than" if ratio < TIMES else f"{ratio:.1f} times as much as"
    if not sure:
        reason = f"; the error of such a comparison is {CLOSE:.0%}."
        if ratio - 1 > CLOSE:
            behind = sum(a <= b for a, b in zip(first.draws, second.draws, strict=True))
            reason = f", but not in {behind} of {drawn}."
        return f"Do not disaggregate: it is too close to call, and co-location is simpler. {words} serves {lead} {other}{reason}"
    advice, kind = ("Disaggregate", "best co-located") if first is split else ("Do not disaggregate", "best two pools")
    if ratio < NOTHING:
        return f"{advice}: {words} serves {lead} the {kind}, {other}."
    missed = f"; at higher rates it misses: {'; '.join(second.why)}" if second.why else ""
    return f"{advice}: {words}. The {kind}, {other}, serves next to nothing{missed}."


def _moved(site: Site, moved: Ranked, rate: float) -> str:
    """What the best deployment whose requests are cut, move or are spread would serve, beside the one that is advised, which served
    so many requests per second of the same load."""
    lead = _over(moved.rate, rate)
    beside = "as much as that, within the error" if abs(lead) <= CLOSE else f"{abs(lead):.0%} {'more' if lead > 0 else 'less'}"
    words = f"{moved.title} ({moved.rate:.3g} requests/s; {moved.rate / site.gpus:.3g} a GPU)"
    how = "With requests that are cut, move or are spread over groups of instances, simulated only, in the first draw"
    return f"{how}: {words}, {beside}."


def _words(site: Site, ranked: Ranked, drawn: str) -> str:
    """A finalist with its rate, and the interval of its rates in what was `drawn`."""
    least, most = min(ranked.draws), max(ranked.draws)
    interval = f"{least:.3g} to {most:.3g} in {drawn}" if len(ranked.draws) > 1 else f"in {drawn}"
    return f"{ranked.title} ({ranked.rate:.3g} requests/s, {interval}; {ranked.rate / site.gpus:.3g} a GPU)"


def _binds(take: Ranked, pools: dict[str, float] | None, slo: Slo) -> str:
    """The limit of the deployment `take`, from the reasons why it failed above its capacity."""
    missed = "; ".join(take.why) or "nothing that was tried"
    if isinstance(take.deployed, Deployment) or pools is None:
        words = "decodes, and the prefill beside them, take longer than the target allows"
        if _ttft(take):
            words = "prompts wait for the time that the decodes' targets leave"
        return f"At higher rates it misses: {missed}. Reason: {words}."
    wait = pools["transfer_s"]
    idle = f"{pools['prefill_idle']:.0%} of the time, the decode pool {pools['decode_idle']:.0%}"
    kv = f"a KV transfer delays the first token by {1000 * wait:.0f} ms, {pools['transfer_share_of_decode']:.1%} of decode time"
    if not _ttft(take):
        words = "the decode pool is full" if pools["decode_idle"] < BUSY else "decode iterations are too long"
    elif slo.ttft is not None and wait > DELAY * slo.ttft.seconds:
        words = "KV waits for the link, or for room in the decode pool"
    else:
        words = "the prefill pool is full" if pools["prefill_idle"] < BUSY else "prompts queue in bursts"
    return f"At higher rates it misses: {missed}. Reason: {words}. At capacity the prefill pool idles {idle}; {kv}."


def _ttft(ranked: Ranked) -> bool:
    return any("ttft" in why.lower() or "scheduling" in why for why in ranked.why)


def _dollars(ranked: Ranked) -> float | None:
    """The price of an hour of the deployment."""
    if isinstance(ranked.deployed, Split):
        return SplitSimulator(ranked.deployed).dollars
    each = Simulator(replace(ranked.deployed, replicas=1)).instance.dollars
    return None if each is None else each * ranked.deployed.replicas
