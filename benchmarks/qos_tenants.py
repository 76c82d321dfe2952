"""How evenly is a machine shared? The experiments of VTC (OSDI'24, arXiv 2401.00588), simulated: Llama-2-7B on an A10G with room
for 10,000 tokens of KV, prompts and answers of 256 tokens, service counted as prompt tokens + 2 x answer tokens.

The prices are those of a roofline by hand: 13.5 GB of weights at 480 GB/s, 14 GFLOP a token at 44 TFLOP/s, 524 KB of KV a token.
`fcfs` and `vtc` have a token budget of 512; `slo` has its default target. `largest gap`: of the service since the beginning,
between the two tenants; `while both wait`: how much this gap changes after the first minute, when both have requests waiting all
the time. The artifact's own figures: largest gap 7,934 (FCFS over 600 s: 263,228), mean TTFT 124 and 353 s, 893 tokens/s; weights
1:2:3:4 were served 1 : 2.00 : 3.00 : 4.01; light tenants' TTFT 4.8 and 4.9 s beside one of 124 s.

    python benchmarks/qos_tenants.py
"""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any

from harness import machine, parser, show

from stallfree import policies
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import Setup
from stallfree.metrics.timeline import Timeline
from stallfree.perf.fitted import Fitted
from stallfree.sim.simulate import simulate
from stallfree.workload.workload import Arrival

PRICES = (0.028, 0.032, 0.0108, 0.0108, 0.0006, 0.0)
CAPACITY = Capacity(16, 625, 4096)
TOKENS = 256
WARM_S = 60.0
POLICIES: Mapping[str, Mapping[str, object]] = {"fcfs": {"token_budget": 512}, "vtc": {"token_budget": 512}, "slo": {}}


def serve(policy: str, rates: Mapping[str, float], seconds: float, weights: Mapping[str, float]) -> list[Timeline]:
    arrivals = [Arrival(n / rate, TOKENS, TOKENS, tenant=t) for t, rate in rates.items() for n in range(int(rate * seconds))]
    arrivals.sort(key=lambda arrival: arrival.at)
    make = partial(policies.load, policy, Setup(Fitted(PRICES)), **POLICIES[policy])
    return simulate(arrivals, make, Fitted(PRICES), CAPACITY, Limits(), weights=weights).lines


def service(lines: Sequence[Timeline], tenant: str, since: float, until: float) -> list[tuple[float, float]]:
    """When a tenant was served how much."""
    own = [line for line in lines if line.tenant == tenant and line.tokens]
    served = [(line.tokens[0], float(line.prompt_tokens)) for line in own] + [(t, 2.0) for line in own for t in line.tokens]
    return sorted((t, tokens) for t, tokens in served if since <= t <= until)


def gaps(lines: Sequence[Timeline], until: float) -> tuple[float, float]:
    """The largest gap between a and b, and how much it changes after `WARM_S`."""
    gap, before, after = 0.0, [0.0], []
    for t, tokens in sorted(service(lines, "a", 0, until) + [(t, -tokens) for t, tokens in service(lines, "b", 0, until)]):
        gap += tokens
        (before if t < WARM_S else after).append(gap)
    return max(map(abs, before + after)), max(after) - min(after)


def tokens_per_s(lines: Sequence[Timeline], until: float) -> float:
    prompts = sum(line.prompt_tokens for line in lines if line.tokens and line.tokens[0] <= until)
    return (prompts + sum(t <= until for line in lines for t in line.tokens)) / until


def ttft(lines: Sequence[Timeline], tenant: str) -> float:
    return mean(line.tokens[0] - line.arrival for line in lines if line.tenant == tenant)


def main() -> None:
    args = parser(__doc__).parse_args()
    seconds = 120.0 if args.quick else 360.0
    two: list[dict[str, Any]] = []
    weighted: list[dict[str, Any]] = []
    light: list[dict[str, Any]] = []
    for policy in POLICIES:
        lines = serve(policy, {"a": 1.5, "b": 3.0}, seconds, {})
        largest, change = gaps(lines, seconds)
        two.append(
            {"policy": policy, "largest gap": largest, "while both wait": change}
            | {"TTFT a, s": ttft(lines, "a"), "TTFT b, s": ttft(lines, "b"), "tokens/s": tokens_per_s(lines, seconds)}
        )
        weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
        lines = serve(policy, dict.fromkeys(weights, 3.0), 2 * seconds, weights)
        served = {t: sum(tokens for _, tokens in service(lines, t, WARM_S, 2 * seconds)) for t in weights}
        weighted.append({"policy": policy} | {f"weight {w:g}": served[t] / served["a"] for t, w in weights.items()})
        rates = {"a": 0.25, "b": 0.5, "c": 1.5}
        lines = serve(policy, rates, seconds, {})
        light.append({"policy": policy} | {f"TTFT at {rate:g}/s, s": ttft(lines, t) for t, rate in rates.items()})
    facts = machine()
    show("Two tenants that ask for too much, 1.5 and 3 requests/s", two, facts, args.json)
    show("Four tenants with weights, all at 3 requests/s: service relative to the first, after a minute", weighted, facts, None)
    show("Three tenants, of which two ask for less than their share", light, facts, None)


if __name__ == "__main__":
    main()
