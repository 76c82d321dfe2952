"""What the search found, in words: who wins, by how much, what keeps the winner from more, what it costs and how to run it."""

from dataclasses import dataclass, replace

from stallfree.core.slo import Slo
from stallfree.planner.commands import commands
from stallfree.planner.search import SECONDS, Answer, Ranked
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import PoolsResult, SplitSimulator
from stallfree.workload.traffic import Traffic

CLOSE = 0.12
"""A lead below this is no lead: the cost model's own error on the ratios between policies (docs/fidelity.md)."""
BUSY = 0.1
"""A pool that idles less than this is what the others wait for."""

DELAY = 0.3
"""KV transfers bind when they take more than this share of the target for first tokens."""


@dataclass(frozen=True)
class Verdict:
    """`headline`: whether to disaggregate; `margin`: the best split deployment over the best co-located one, less 1 (None if there
    is only one kind); `binds`: the constraint that keeps the one to take from more; `dollars`: its price of a million output tokens
    at capacity, if devices have one; `commands` that run it. `pools`: of the best split deployment at its capacity, the share of
    time that each pool idles, seconds that a KV transfer delays first tokens on average, and their share of decode time.
    """

    headline: str
    margin: float | None
    binds: str
    dollars: float | None
    commands: list[str]
    pools: dict[str, float] | None


def verdict(site: Site, answer: Answer, traffic: Traffic, slo: Slo) -> Verdict:
    """What `answer` comes to. The simpler co-located deployment is the one to take unless two pools lead by more than `CLOSE`."""
    co_located = next((one for one in answer.whole if isinstance(one.deployed, Deployment) and one.rate), None)
    split = next((one for one in answer.whole if isinstance(one.deployed, Split) and one.rate), None)
    margin = split.rate / co_located.rate - 1 if split and co_located else None
    take = co_located if co_located and (margin is None or margin <= CLOSE) else split
    if take is None:
        return Verdict("Nothing meets the targets on all devices together.", None, "", None, [], None)
    price = _dollars(take)
    dollars = None if price is None or take.at is None else price / 3600 / take.at.output_tokens_per_s * 1e6
    pools = None if split is None else _pools(split, traffic)
    binds = _binds(take, pools, slo)
    return Verdict(_headline(site, co_located, split, margin), margin, binds, dollars, commands(site, take.deployed, slo), pools)


def _pools(split: Ranked, traffic: Traffic) -> dict[str, float]:
    """From one more run at its capacity."""
    assert isinstance(split.deployed, Split)
    made: PoolsResult = SplitSimulator(split.deployed).run(traffic.lasting(SECONDS, split.rate).stream(split.rate, traffic.seed))
    transfers = made.transfers
    return {
        "prefill_idle": made.prefill_idle,
        "decode_idle": made.decode_idle,
        "transfer_s": transfers.exposed_s / max(1, transfers.transferred),
        "transfer_share_of_decode": transfers.exposed_s / transfers.decode_s if transfers.decode_s else 0.0,
        "kv_bytes": transfers.bytes,
        "not_transferred": float(transfers.local),
    }


def _headline(site: Site, co_located: Ranked | None, split: Ranked | None, margin: float | None) -> str:
    def told(one: Ranked) -> str:
        number = "" if isinstance(one.deployed, Split) else f"{one.deployed.replicas} x "
        return f"{number}{one.name} ({one.rate:.3g} requests/s, {one.rate / site.gpus:.3g} a GPU)"

    if co_located is None or split is None or margin is None:
        only = co_located or split
        if only is None:
            return "Nothing meets the targets."
        if site.gpus == 1:
            return f"One GPU cannot be two pools: {told(only)}."
        return f"{'Do not disaggregate' if only is co_located else 'Disaggregate'}: only {told(only)} meets the targets."
    if margin > CLOSE:
        return f"Disaggregate: {told(split)} serves {margin:.0%} more than the best co-located, {told(co_located)}."
    if margin < -CLOSE:
        lead = 1 / (1 + margin) - 1
        return f"Do not disaggregate: {told(co_located)} serves {lead:.0%} more than the best two pools, {told(split)}."
    more = f"{abs(margin):.0%} {'more' if margin > 0 else 'less'}"
    return (
        f"Do not disaggregate for this: {told(split)} serves {more} than {told(co_located)}, too close to call "
        f"(within {CLOSE:.0%}, the error of such a comparison), and co-location is the simpler one."
    )


def _binds(take: Ranked, pools: dict[str, float] | None, slo: Slo) -> str:
    """What it runs into, from why it failed above its capacity."""
    missed = "; ".join(take.why) or "nothing that was tried"
    if isinstance(take.deployed, Deployment) or pools is None:
        words = "decodes, and what is computed beside them, take longer than the target allows"
        if _ttft(take):
            words = "prompts wait: they get what the targets of the decodes leave them"
        return f"Beyond that it misses: {missed}: {words}."
    wait = pools["transfer_s"]
    idle = f"{pools['prefill_idle']:.0%} of the time, the decode pool {pools['decode_idle']:.0%}"
    kv = f"a KV transfer delays the first token by {1000 * wait:.0f} ms, {pools['transfer_share_of_decode']:.1%} of decode time"
    if not _ttft(take):
        words = "the decode pool is full" if pools["decode_idle"] < BUSY else "decode iterations are too long"
    elif slo.ttft is not None and wait > DELAY * slo.ttft.seconds:
        words = "KV waits for the link, or for room in the decode pool"
    else:
        words = "the prefill pool is full" if pools["prefill_idle"] < BUSY else "prompts queue behind each other in bursts"
    return f"Beyond that it misses: {missed}: {words}; at capacity the prefill pool idles {idle}; {kv}."


def _ttft(one: Ranked) -> bool:
    return any("ttft" in why.lower() or "scheduling" in why for why in one.why)


def _dollars(one: Ranked) -> float | None:
    """The price of an hour."""
    if isinstance(one.deployed, Split):
        return SplitSimulator(one.deployed).dollars
    each = Simulator(replace(one.deployed, replicas=1)).instance.dollars
    return None if each is None else each * one.deployed.replicas
