"""What an engine needs to run groups of instances: the options that they have, and what they cost on this machine. That is a
calibration for each number of instances, remembered as that of a lone engine is, and the time in which KV moves, measured at each
start. It does not know how a policy uses them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from stallfree.core.plan import GroupPlan, Shape, Work
from stallfree.engine import calibrate
from stallfree.executors.base import RunsGroups
from stallfree.perf.fitted import Fitted

if TYPE_CHECKING:
    from stallfree.engine.assemble import Options

MOVED, TURNS = 256, 3
"""Tokens whose KV is moved to time it, at most, and how often."""


@dataclass(frozen=True)
class Measured:
    """The prices of groups (`elastic.policy.Prices`): a cost model for each number of instances, and seconds for each token whose
    KV moves."""

    costs: Sequence[Fitted]
    token_s: float

    def seconds(self, degree: int, shape: Shape) -> float:
        return self.costs[degree - 1].seconds(shape)

    def moving(self, tokens: int) -> float:
        return tokens * self.token_s


def check(options: "Options") -> None:
    """Raises ValueError for options that groups of instances do not have."""
    policy = f"policy {options.policy}"
    if options.executor != "torch" or options.sp < 2:
        raise ValueError(f"{policy} forms groups of instances; give --executor torch --sp 2 or more")
    if options.pp > 1:
        raise ValueError(f"{policy} has no pipeline stages; leave out --pp {options.pp}")
    given = {
        "--token-budget": ("token budget", options.token_budget),
        "--policy-option": ("options", options.policy_option),
        "--speculate": ("drafts", options.speculate),
        "--kv-host-memory": ("host memory for KV", options.kv_host_memory),
        "--adapter": ("adapters", options.adapter),
        "--adapters": ("adapters", options.adapters),
    }
    for name, (what, value) in given.items():
        if value:
            raise ValueError(f"{policy} has no {what}; leave out {name}, or take policy slo")


def of(key: Mapping[str, object], instances: int, degree: int) -> dict[str, object]:
    """What the times of iterations of `degree` out of so many `instances` depend on. `key`: what any engine's do."""
    return {**key, "instances": instances, "degree": degree}


def prices(
    cluster: RunsGroups, key: Mapping[str, object], folder: Path, say: Callable[[str], None], progress: calibrate.Progress
) -> Measured:
    """The prices of an idle `cluster`: cost models that `folder` remembers for `key`, or else new ones, which are then remembered.
    Overwrites the KV."""
    costs = []
    for degree in range(1, len(cluster.rooms) + 1):
        own = of(key, len(cluster.rooms), degree)
        model = calibrate.remembered(own, folder)
        if model is None:
            ring = cluster.ring(degree)
            say(f"calibrating: timing iterations on {degree} of {len(cluster.rooms)} instances, once on this machine")
            model, errors = calibrate.calibrate(ring, progress)
            calibrate.remember(model, errors, own, folder, ring.capacity)
        costs.append(model)
    return Measured(costs, _token_s(cluster))


def _token_s(cluster: RunsGroups) -> float:
    """Seconds for each token whose KV moves from one instance to another."""
    tokens = min(MOVED, cluster.rooms[0] // 2, cluster.capacity.max_model_len // 2)
    at, home = 0, 0

    def run(count: int) -> float:
        """Compute so many more tokens at home. Returns when that has ended (s)."""
        nonlocal at
        work = Work("calibration", at, count, True, False, (0,) * count, (), None, "", (0,) * (at + count), ())
        cluster.submit(GroupPlan(0, 0.0, (work,), members=(home,), kept=({home: count},)))
        cluster.collect()
        at += count
        return time.perf_counter()

    run(tokens)
    stays, moves = [], []
    for _ in range(TURNS):
        begin = time.perf_counter()
        middle = run(1)
        home = 1 - home
        cluster.move("calibration", home)
        stays.append(middle - begin)
        moves.append(run(1) - middle)
    cluster.drop("calibration")
    return max(0.0, median(moves) - median(stays)) / tokens
