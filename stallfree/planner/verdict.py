"""What the search found, in words: who wins, by how much, what keeps the winner from more, what it costs and how to run it."""

from dataclasses import dataclass, replace

from stallfree.core.slo import Slo
from stallfree.planner.search import Answer, Ranked
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.simulator import Simulator
from stallfree.sim.split import Handed, SplitSimulator
from stallfree.workload.traffic import Traffic

CLOSE = 0.12
"""A lead below this is no lead: the cost model's own error on the ratios between policies (docs/fidelity.md)."""
BUSY = 0.1
"""A pool that idles less than this is what the others wait for."""


@dataclass(frozen=True)
class Verdict:
    """`headline`: whether to disaggregate; `margin`: the best split deployment over the best co-located one, less 1 (None if there
    is only one kind); `binds`: the constraint that keeps the winner from more; `dollars`: a million output tokens at capacity, if
    devices have a price; `commands` that run it.
    """

    headline: str
    margin: float | None
    binds: str
    dollars: float | None
    commands: list[str]


def verdict(site: Site, answer: Answer, traffic: Traffic, slo: Slo) -> Verdict:
    best = answer.best
    co_located = next((one for one in answer.whole if isinstance(one.deployed, Deployment)), None)
    split = next((one for one in answer.whole if isinstance(one.deployed, Split)), None)
    margin = split.rate / co_located.rate - 1 if split and co_located and co_located.rate else None
    price = _dollars(best)
    report = best.at
    dollars = None if price is None or report is None else price / 3600 / report.output_tokens_per_s * 1e6
    return Verdict(
        _headline(site, co_located, split, margin), margin, _binds(best, traffic, slo), dollars, _commands(site, best, slo)
    )


def _headline(site: Site, co_located: Ranked | None, split: Ranked | None, margin: float | None) -> str:
    def told(one: Ranked) -> str:
        number = "" if isinstance(one.deployed, Split) else f"{one.deployed.replicas} x "
        return f"{number}{one.name} ({one.rate:.3g} requests/s, {one.rate / site.gpus:.3g} a GPU)"

    if co_located is None or not co_located.rate:
        return f"Disaggregate: only {told(split)} meets the targets." if split else "Nothing meets the targets."
    if split is None or margin is None or not split.rate:
        return f"Do not disaggregate: no two pools meet the targets, {told(co_located)} does."
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


def _binds(best: Ranked, traffic: Traffic, slo: Slo) -> str:
    """What the winner runs into, from a run at its capacity and from why it failed above."""
    missed = "; ".join(best.why) or "nothing that was tried"
    if isinstance(best.deployed, Deployment):
        words = "decodes, and the chunks beside them, take longer than the target allows"
        if _ttft(best):
            words = "prompts wait: they get what the targets of the decodes leave them"
        return f"Beyond that it misses: {missed}: {words}."
    made: Handed = SplitSimulator(best.deployed).run(traffic.lasting(30.0, best.rate).stream(best.rate, traffic.seed))
    moved = made.moved
    wait = moved.exposed_s / max(1, moved.handed)
    idle = f"{made.prefill_idle:.0%} of the time, the decode pool {made.decode_idle:.0%}"
    pools = f"at capacity the prefill pool idles {idle}"
    share = moved.exposed_s / max(moved.decode_s, 1e-9)
    kv = f"a hand-over takes {1000 * wait:.0f} ms after the first token, {share:.1%} of decode time"
    pace = slo.tbt or slo.tpot
    if _ttft(best):
        words = "the prefill pool is full" if made.prefill_idle < BUSY else "prompts queue behind each other in bursts"
    elif pace is not None and wait > pace.seconds:
        words = "KV waits for the link, or for room in the decode pool"
    else:
        words = "the decode pool is full" if made.decode_idle < BUSY else "decode iterations are too long"
    return f"Beyond that it misses: {missed}: {words}; {pools}; {kv}."


def _ttft(one: Ranked) -> bool:
    return any("ttft" in why.lower() or "scheduling" in why for why in one.why)


def _dollars(one: Ranked) -> float | None:
    """The price of an hour."""
    if isinstance(one.deployed, Split):
        return SplitSimulator(one.deployed).dollars
    each = Simulator(replace(one.deployed, replicas=1)).instance.dollars
    return None if each is None else each * one.deployed.replicas


def _commands(site: Site, one: Ranked, slo: Slo) -> list[str]:
    def engine(told: Deployment) -> str:
        return f"{site.model} --executor torch --tp {told.tp} --pp {told.pp} --slo {slo}"

    if isinstance(one.deployed, Deployment):
        told = one.deployed
        policy = "" if told.policy == "slo" else f" --policy {told.policy} --token-budget {told.token_budget}"
        return [f"stallfree deploy {engine(told)} --replicas {told.replicas}{policy}"]
    prefill, decode = one.deployed.prefill, one.deployed.decode
    return [
        f"stallfree serve {engine(prefill)} --role prefill  # {prefill.replicas} times",
        f"stallfree serve {engine(decode)} --role decode  # {decode.replicas} times",
        "stallfree route  # in front of them",
    ]
