"""Dynamic SplitFuse against vLLM of then, simulated beside what DeepSpeed-FastGen's authors published in November 2023 (arXiv
2401.08671, section 4): Llama-2-70B on four A100 80 GB, prompts of 2,600 tokens.

As in their benchmark (microsoft/DeepSpeedExamples, benchmarks/inference/mii): 1 to 32 clients in a closed loop send 512 requests.
Lengths are normal with a standard deviation of 30 %, and prompts have at most 4,000 tokens. The latency is the mean over requests,
the rate is clients / latency. They published 1.36 against 0.67 requests/s at 9 s, and 7 s against 14 s at 1.2 requests/s, but not
for which outputs, 60 or 128 tokens. Between two numbers of clients the curves are straight lines here.

    policies    both policies on each engine of those years, and each on the engine that is nearest to its own
    points      the four published points, whose rate and latency give the number of clients, beside the latency for as many
    curves      latency and rate by clients, for the engines nearest to their own

    python benchmarks/splitfuse.py policies points curves
"""

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from harness import machine, parser, show

from stallfree.sim.closed import closed_loop
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulator import Simulator

PUBLISHED_RATES = {"splitfuse": 1.36, "prefill-first": 0.67}
"""Requests/s at `LATENCY_S`."""
PUBLISHED_LATENCIES = {"splitfuse": 7.0, "prefill-first": 14.0}
"""Seconds at `RATE`."""
LATENCY_S, RATE = 9.0, 1.2
CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)
REQUESTS, PROMPT, LONGEST, SPREAD = 512, 2600, 4000, 0.3
CONTEXT = 4096
OUTPUTS = (60, 128)
LIMITS = {"splitfuse": 768, "prefill-first": 4096}
"""The most tokens in an iteration: DeepSpeed-MII's ragged batch, and vLLM's default for a context of 4,096."""
ENGINES = (("vllm-2023", "vllm-2023"), ("graph", "graph"), ("graph", "vllm-2023"), ("fused", "vllm-2023"))
"""Those of `splitfuse` and of `prefill-first`. DeepSpeed's is not measured here. `graph` is nearest to it: its kernels skip the
mask, and their launches do not limit them. `fused` is the quickest of 2023."""
NEAREST = ("graph", "vllm-2023")

Curve = list[tuple[int, float, float]]
"""Clients, the mean latency in seconds, and requests/s."""


def sizes(output: int, number: int) -> list[tuple[int, int]]:
    """The prompt and output tokens of `number` requests; the context ends the longest outputs."""
    rng = np.random.default_rng(42)
    prompts, outputs = (rng.normal(mean, SPREAD * mean, number).astype(int) for mean in (PROMPT, output))
    prompts = prompts.clip(1, LONGEST)
    return [(int(p), int(o)) for p, o in zip(prompts, outputs.clip(1, CONTEXT - prompts), strict=True)]


@cache
def curve(policy: str, engine: str, output: int, requests: int) -> Curve:
    simulator = Simulator(
        Deployment(
            model="llama2-70b", hardware="a100-80g", tp=4, engine=engine, policy=policy, max_model_len=CONTEXT,
            max_tokens=LIMITS[policy], watermark=0.01 if policy == "prefill-first" else 0.0,
        )
    )  # fmt: skip
    found = []
    for clients in CLIENTS:
        lines = closed_loop(simulator, sizes(output, requests), clients)
        latency = sum(line.tokens[-1] - line.arrival for line in lines) / len(lines)
        found.append((clients, latency, clients / latency))
    return found


def between(known: list[tuple[float, float]], x: float) -> float | None:
    """The y at `x` on straight lines between `known` points, where they first reach it; None if they do not."""
    for (x0, y0), (x1, y1) in pairwise(known):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def policies(requests: int) -> list[dict[str, Any]]:
    rows = []
    published = PUBLISHED_RATES["splitfuse"] / PUBLISHED_RATES["prefill-first"]
    for output in OUTPUTS:
        for engines in ENGINES:
            rates, latencies, most = {}, {}, {}
            for policy, engine in zip(PUBLISHED_RATES, engines, strict=True):
                known = curve(policy, engine, output, requests)
                rates[policy] = between([(latency, rate) for _, latency, rate in known], LATENCY_S)
                latencies[policy] = between([(rate, latency) for _, latency, rate in known], RATE)
                most[policy] = max(rate for _, _, rate in known)
            ratio = over(*rates.values())
            rows.append(
                {"outputs": output, "engines": " / ".join(engines)}
                | {f"{policy}, requests/s": rate for policy, rate in rates.items()}
                | {"ratio": ratio, "published": published, "error": None if ratio is None else ratio / published - 1}
                | {f"{policy} at {RATE:g}/s, s": latency for policy, latency in latencies.items()}
                | {f"{policy}, most": rate for policy, rate in most.items()}
            )
    rows.append(
        {"outputs": "-", "engines": "published"}
        | {f"{policy}, requests/s": rate for policy, rate in PUBLISHED_RATES.items()}
        | {"ratio": published, "published": published, "error": 0.0}
        | {f"{policy} at {RATE:g}/s, s": latency for policy, latency in PUBLISHED_LATENCIES.items()}
        | dict.fromkeys([f"{policy}, most" for policy in PUBLISHED_RATES])
    )
    return rows


def points(requests: int) -> list[dict[str, Any]]:
    rows = []
    at_latency = [(policy, LATENCY_S, rate) for policy, rate in PUBLISHED_RATES.items()]
    at_rate = [(policy, latency, RATE) for policy, latency in PUBLISHED_LATENCIES.items()]
    for policy, latency, rate in (*at_latency, *at_rate):
        clients = latency * rate
        row = {"policy": policy, "requests/s": rate, "clients": clients, "published, s": latency}
        engine = NEAREST[list(PUBLISHED_RATES).index(policy)]
        for output in OUTPUTS:
            known = [(float(number), seconds) for number, seconds, _ in curve(policy, engine, output, requests)]
            simulated = between(known, clients)
            row |= {f"{output} tokens, s": simulated, f"{output} tokens / published": over(simulated, latency)}
        rows.append(row)
    return rows


def curves(requests: int) -> list[dict[str, Any]]:
    rows = []
    for output in OUTPUTS:
        pair = [curve(policy, engine, output, requests) for policy, engine in zip(PUBLISHED_RATES, NEAREST, strict=True)]
        for (clients, ours, rate), (_, theirs, other) in zip(*pair, strict=True):
            rows.append(
                {"outputs": output, "clients": clients, "splitfuse, s": ours, "requests/s": rate}
                | {"prefill-first, s": theirs, "requests/s ": other}
            )
    return rows


PARTS = {"policies": policies, "points": points, "curves": curves}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("part", choices=PARTS, nargs="+", help="what to simulate")
    args = arguments.parse_args()
    facts = machine()
    for part in args.part:
        show(f"SplitFuse: {part}", PARTS[part](64 if args.quick else REQUESTS), facts, args.json)


if __name__ == "__main__":
    main()
