"""A search's result in words: the winner, its lead, its bottleneck, its price, and the commands that run it. It ranks
nothing."""

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
"""A lead of this share or less is too close to call: it is the cost model's error of ratios between policies (docs/fidelity.md)."""
BUSY = 0.1
"""A pool that idles less than this share of time is full."""
DELAY = 0.3
"""KV transfers are the limit if they take more than this share of the target for TTFT."""


@dataclass(frozen=True)
class Verdict:
    """The advice. `headline`: whether to disaggregate. `margin`: the rate of the best split deployment over that of the best
    co-located one, less 1 (None with one kind only). `binds`: the limit of the chosen one. `dollars`: its price of a million output
    tokens at capacity, if the devices have one. `commands`: they run it. `pools`: for the best split deployment at capacity, the
    share of time that each pool idles, the mean seconds that a KV transfer delays first tokens, and their share of decode time.
    """

    headline: str
    margin: float | None
    binds: str
    dollars: float | None
    commands: list[str]
    pools: dict[str, float] | None


def verdict(site: Site, answer: Answer, traffic: Traffic, slo: Slo) -> Verdict:
    """The advice that follows from `answer`: co-location, which is simpler, unless two pools lead by more than `CLOSE`."""
    co_located = next((each for each in answer.whole if isinstance(each.deployed, Deployment) and each.rate), None)
    split = next((each for each in answer.whole if isinstance(each.deployed, Split) and each.rate), None)
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
    """Figures of both pools, from one more run at capacity."""
    assert isinstance(split.deployed, Split)
    result: PoolsResult = SplitSimulator(split.deployed).run(traffic.lasting(SECONDS, split.rate).stream(split.rate, traffic.seed))
    transfers = result.transfers
    return {
        "prefill_idle": result.prefill_idle,
        "decode_idle": result.decode_idle,
        "transfer_s": transfers.exposed_s / max(1, transfers.transferred),
        "transfer_share_of_decode": transfers.exposed_s / transfers.decode_s if transfers.decode_s else 0.0,
        "kv_bytes": transfers.bytes,
        "not_transferred": float(transfers.local),
    }


def _headline(site: Site, co_located: Ranked | None, split: Ranked | None, margin: float | None) -> str:
    def words(ranked: Ranked) -> str:
        number = "" if isinstance(ranked.deployed, Split) else f"{ranked.deployed.replicas} x "
        return f"{number}{ranked.name} ({ranked.rate:.3g} requests/s, {ranked.rate / site.gpus:.3g} a GPU)"

    if co_located is None or split is None or margin is None:
        only = co_located or split
        if only is None:
            return "Nothing meets the targets."
        if site.gpus == 1:
            return f"One GPU cannot be two pools: {words(only)}."
        return f"{'Do not disaggregate' if only is co_located else 'Disaggregate'}: only {words(only)} meets the targets."
    if margin > CLOSE:
        return f"Disaggregate: {words(split)} serves {margin:.0%} more than the best co-located, {words(co_located)}."
    if margin < -CLOSE:
        lead = 1 / (1 + margin) - 1
        return f"Do not disaggregate: {words(co_located)} serves {lead:.0%} more than the best two pools, {words(split)}."
    more = f"{abs(margin):.0%} {'more' if margin > 0 else 'less'}"
    return (
        f"Do not disaggregate: it is too close to call, and co-location is simpler. {words(split)} serves {more} than "
        f"{words(co_located)}; the error of such a comparison is {CLOSE:.0%}."
    )


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
