"""What does guessing tokens bring, live, on the embedded model? Tokens per second with and without it, and streams under load.

`rates`: one engine without guesses and one with `ngram`, in one process, which take turns at the same prompts; greedy, 192 tokens
an answer. `edit`: a file of code, then the same file again with one name changed, of which the first lines are there already.
`quote`: a text, and the wish to have it word for word. `free`: stories, sampled at temperature 0.7. Tokens per second count from
the moment at which all streams have a first token until the last stream ends. The ratio is the median over rounds of the ratios
within a round.

`load`: requests of all kinds arrive at random for a minute at `RATE` per second with the target tbt=`TARGET`; the share of late
tokens, P99 of the time between iterations' ends that a stream sees, and seconds to the end of an answer, with and without guesses.

`llama.cpp`: the same file and prompts, alone, with and without its own prompt lookup of as many tokens (llama-cpp-python).

    python benchmarks/speculation.py --llama-python PATH
"""

import json
import random
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import machine, parser, show
from step_time import WORKERS, interpreter

from stallfree.checkpoint.fetch import locate
from stallfree.core.record import StepRecord
from stallfree.core.request import Request
from stallfree.core.slo import Slo
from stallfree.engine.assemble import Assembled, Options, assemble
from stallfree.engine.engine import Engine
from stallfree.executors.sampling import Sampling
from stallfree.metrics.report import Tally
from stallfree.metrics.timeline import timelines

TOKENS = 192
BEGUN = 14
"""Lines of the edited code that are there already: the first function. With four, this small model wanders off and writes something
else."""
CASES = (("edit", 1), ("quote", 1), ("edit", 4), ("free", 1), ("free", 4), ("free", 16), ("edit", 16))
"""What the streams write, and how many there are."""
RATE, TARGET, SECONDS = 1.2, "100ms", 60.0
GUESSES = 7

CODE = '''def read_samples(path, limit):
    """Read at most `limit` samples from a file, one on each line."""
    samples = []
    with open(path) as lines:
        for number, line in enumerate(lines):
            if number >= limit:
                break
            name, _, value = line.partition(",")
            samples.append((name.strip(), float(value)))
    return samples


def mean_of_samples(samples):
    """The mean of the values, or 0 if there are none."""
    if not samples:
        return 0.0
    return sum(value for _, value in samples) / len(samples)


def largest_sample(samples):
    """The sample with the largest value. Raises ValueError if there are none."""
    if not samples:
        raise ValueError("there are no samples")
    return max(samples, key=lambda sample: sample[1])
'''
TEXT = (
    "The harbour of the old town was built in three parts. The first part, on the northern side, was used by fishing boats, "
    "which left before dawn and came back in the late morning. The second part held the ships that carried salt, timber and "
    "wool to the islands. The third part was closed to everybody but the pilots, whose small grey boats waited there for "
    "ships that did not know the channel. In the year of the great storm the wall between the second and the third part fell,"
    " and it was never built again. Since then the pilots have shared their water with the salt ships, and there is a quarrel"
    " about it every spring, when the tides are high and the wind blows from the west."
)
NAMES = ("records", "rows", "points", "entries", "values", "measures", "readings", "lines_read")


def prompts(engine: Engine, kind: str, number: int) -> list[list[int]]:
    """Token ids of `number` different prompts."""
    text, found = engine.text, []
    for index in range(number):
        if kind == "edit":
            name = NAMES[index % len(NAMES)] + "_" * (index // len(NAMES))
            again = CODE.replace("samples", name).splitlines(keepends=True)
            found.append(text.encode(f"# samples.py\n{CODE}\n\n# {name}.py\n{''.join(again[:BEGUN])}"))
        elif kind == "quote":
            wish = f"{index + 1}. Copy the following text word for word.\n\n{TEXT}"
            found.append([*text.chat([{"role": "user", "content": wish}]), *text.encode(TEXT[:60], special=False)])
        else:
            found.append(text.chat([{"role": "user", "content": f"Tell a story of {index + 3} friends who find an old map."}]))
    return found


def sampling(kind: str, seed: int) -> Sampling:
    return Sampling(temperature=0.7, seed=seed) if kind == "free" else Sampling(temperature=0.0)


def tokens_per_s(side: Assembled, kind: str, number: int, again: int) -> float:
    """Tokens per second of all streams together, from the moment at which each has its first one."""
    engine = side.engine
    requests = [
        Request(f"{kind}-{again}-{index}", prompt, TOKENS, sampling=sampling(kind, 100 * again + index))
        for index, prompt in enumerate(prompts(engine, kind, number))
    ]
    for request in requests:
        engine.submit(request)
    while not all(request.output for request in requests):
        engine.step()
    before, began = sum(len(request.output) for request in requests), engine.clock()
    while engine.busy:
        engine.step()
    return (sum(len(request.output) for request in requests) - before) / (engine.clock() - began)


def rates(sides: dict[str, Assembled], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for kind, number in CASES:
        taken: dict[str, list[float]] = {name: [] for name in sides}
        speculation = sides["ngram"].engine.scheduler.speculation
        checked, right = speculation.drafted, speculation.accepted
        for again in range(rounds + 1):
            for name, side in sides.items():
                rate = tokens_per_s(side, kind, number, again)
                if again:  # the first round warms up
                    taken[name].append(rate)
        checked, right = speculation.drafted - checked, speculation.accepted - right
        ratios = [b / a for a, b in zip(*taken.values(), strict=True)]
        rows.append(
            {
                "answers": kind,
                "streams": number,
                **{f"{name}, tokens/s": statistics.median(values) for name, values in taken.items()},
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "checked": checked,
                "right": f"{right / checked:.0%}" if checked else "-",
            }
        )
    return rows


def loaded(side: Assembled, seconds: float) -> dict[str, Any]:
    """Serve a mixture of all kinds, as it arrives."""
    engine, rng, records = side.engine, random.Random(5), list[StepRecord]()
    engine.record = records.append
    pools = {kind: prompts(engine, kind, 16) for kind in ("edit", "quote", "free")}
    arrivals, at = [], 0.0
    while (at := at + rng.expovariate(RATE)) < seconds:
        kind = rng.choice(list(pools))
        arrivals.append((at, kind, rng.choice(pools[kind])))
    origin, coming = engine.clock(), list(arrivals)
    while coming or engine.busy:
        while coming and origin + coming[0][0] <= engine.clock():
            at, kind, prompt = coming.pop(0)
            request = Request(f"load-{len(coming)}", prompt, TOKENS, arrival=origin + at, sampling=sampling(kind, len(coming)))
            engine.submit(request)
        if engine.busy:
            engine.step()
    engine.record = None
    tally = Tally(Slo.parse(f"tbt={TARGET}"))
    lines = timelines(records).values()
    for line in lines:
        tally.add(line)
    report = tally.report(RATE)
    late, all_tokens = report.slo_attainment["tbt"], sum(max(0, len(line.tokens) - 1) for line in lines)
    # Tokens that come together count once here: the gap that a reader sees.
    gaps = sorted(gap for line in lines for gap in line.gaps if gap > 0)
    return {
        "requests": len(arrivals),
        "in time": f"{late.in_time:.2%}" if late.in_time is not None else "-",
        "P99 between iterations, ms": 1e3 * gaps[int(0.99 * len(gaps))],
        "TTFT p50, s": report.ttft_s.p50 if report.ttft_s else None,
        "answer p50, s": report.e2e_s.p50 if report.e2e_s else None,
        "tokens": all_tokens,
    }


def llama(python: str, cases: Sequence[tuple[str, int]], engine: Engine, rounds: int) -> dict[tuple[str, int], tuple[float, float]]:
    """llama.cpp's tokens per second without and with its own lookup, for cases of one stream."""
    job = {
        "model": str(locate()),
        "rounds": rounds,
        "tokens": TOKENS,
        "guesses": GUESSES,
        "prompts": {kind: prompts(engine, kind, 1)[0] for kind, number in cases if number == 1},
    }
    run = subprocess.run(
        [python, str(WORKERS / "run_llama_lookup.py")], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    return {(answer["kind"], 1): (answer["plain"], answer["lookup"]) for answer in answers if "kind" in answer}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument(
        "--llama-python", type=interpreter, metavar="PATH", help="python of an environment with llama-cpp-python"
    )
    args = arguments.parse_args()
    rounds = 1 if args.quick else 6
    sides = {
        "none": assemble(Options(policy="slo", slo=f"tbt={TARGET}", kv_memory=1 << 29)),
        "ngram": assemble(Options(policy="slo", slo=f"tbt={TARGET}", kv_memory=1 << 29, speculate="ngram", draft_tokens=GUESSES)),
    }
    rows = rates(sides, rounds)
    if args.llama_python:
        peers = llama(args.llama_python, CASES, sides["none"].engine, rounds)
        for row in rows:
            plain, lookup = peers.get((row["answers"], row["streams"]), (None, None))
            row |= {"llama.cpp": plain, "its lookup": lookup, "its ratio": None if not plain else lookup / plain}
    show("Tokens per second, all streams together", rows, machine(), args.json)
    seconds = 15.0 if args.quick else SECONDS
    loads = [{"guesses": name} | loaded(side, seconds) for name, side in sides.items()]
    show(f"Under load: {RATE} requests/s of all kinds, tbt={TARGET}", loads, machine(), args.json and Path(f"{args.json}.load"))


if __name__ == "__main__":
    main()
