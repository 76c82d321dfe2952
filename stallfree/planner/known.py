"""How much of an answer is known: which of its inputs were measured, which are assumed, and what was simulated. It quotes the
sources that the devices' and engines' files name, and judges none.
"""

from stallfree.perf import hardware as devices
from stallfree.perf.roofline import ENGINES
from stallfree.planner.search import Answer
from stallfree.planner.site import Site, counted
from stallfree.planner.verdict import CLOSE
from stallfree.workload.traffic import Traffic

BORROWED = "as the "
"""A source in a device's file begins so if it names another device, whose figures were taken."""


def known(site: Site, answer: Answer, traffic: Traffic) -> dict[str, str]:
    """What the answer rests on, by name, in words."""
    device = devices.load(site.hardware)
    facts = {}
    if site.engine in ENGINES:
        engine = ENGINES[site.engine]
        source = device.kernels(engine.libraries).source
        facts[f"kernels, {'assumed' if source.startswith(BORROWED) else 'measured'}"] = source
        facts["engine"] = f"{site.engine}: {engine.about}"
        facts["links between GPUs"] = device.sources.get("links", "no source")
    else:
        facts["iterations, measured"] = f"the times fitted to an engine in {site.engine}"
    if site.nodes > 1:
        facts["links between nodes, assumed"] = f"{site.link} at its nominal rate, shared evenly by all transfers of a node"
    if site.rank is not None:
        facts["adapters, assumed"] = "the bandwidth of their kernels, and PCIe 4.0 from the host's memory"
    facts["price"] = device.sources.get("price", "no source")
    facts["load"] = _load(answer, traffic)
    whole = sum(ranked.whole for ranked in answer.ranked)
    facts["simulated"] = f"{whole} of {counted(len(answer.ranked), 'deployment')} as one cluster, the others as one unit of several"
    facts["error"] = f"{CLOSE:.0%} of a ratio of two rates, the median against published ratios (docs/fidelity.md), not of this one"
    return facts


def _load(answer: Answer, traffic: Traffic) -> str:
    draws = len(answer.best.draws)
    if traffic.arrivals != "trace":
        return f"assumed, drawn {draws} times"
    parts = f"; the intervals are of {draws} parts of it" if draws > 1 else ""
    return f"measured: {traffic.requests} requests of the trace, stretched to each rate, so that bursts stay bursts{parts}"
