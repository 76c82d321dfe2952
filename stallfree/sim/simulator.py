"""A deployment made ready: its devices priced, its policy calibrated, its limits checked; then run, as often as wanted. It puts
together what `perf`, `policies`, `core` and `workload` know, and knows nothing itself of how the results are shown.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from stallfree import policies
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import CostModel, Policy, Setup, Tuned
from stallfree.core.record import Run
from stallfree.core.slo import Slo
from stallfree.metrics.report import Report, Tally
from stallfree.metrics.timeline import Timeline
from stallfree.perf import hardware as devices
from stallfree.perf import shape as models
from stallfree.perf.fitted import Fitted
from stallfree.perf.profiled import Profiled
from stallfree.perf.roofline import QUANTUM, Roofline
from stallfree.policies.slo import possible
from stallfree.sim.deployment import Deployment
from stallfree.sim.simulate import Simulation, simulate
from stallfree.workload.traffic import Traffic
from stallfree.workload.workload import Arrival


class Instance(NamedTuple):
    """What one replica runs on: what an iteration costs there, the KV that it holds, and the price of an hour in US dollars, if it
    has one. `about` it in words. `between_s`: what passes between two iterations beside that. `scatter`: factors of which each
    iteration's time gets one at random, as a real machine's do (none: each takes just what it costs).
    """

    cost: CostModel
    capacity: Capacity
    dollars: float | None
    about: str
    between_s: float = 0.0
    scatter: tuple[float, ...] = ()


class Simulator:
    """A deployment made ready, to be run many times: on the instance `placed`, or on that of the roofline.

    Raises ValueError for what is not known, does not fit, is not taken by the policy, or cannot be promised.
    """

    def __init__(self, deployment: Deployment, placed: Instance | None = None):
        self.deployment = deployment
        self.instance = placed or instance(deployment)
        self.limits = Limits(deployment.max_seqs, deployment.max_tokens, deployment.watermark)
        self.targets = None if deployment.slo is None else Slo.parse(deployment.slo)
        if self.targets is not None:
            possible(self.targets, self.instance.cost)
        self._own = policies.options(deployment.policy, deployment.token_budget, deployment.policy_option)
        self._prices = calibrated(self.instance).state() if policies.wants_setup(deployment.policy) else None
        self.policy()  # a mistake is to be told before anything is simulated

    def policy(self) -> Policy:
        """A policy for one replica. One that wants a cost model gets what a calibration of the instance would find, and learns."""
        cost = None if self._prices is None else Fitted.from_state(self._prices)
        return policies.load(self.deployment.policy, Setup(cost, self.targets), **self._own)

    @property
    def header(self) -> Run:
        """What the records of a replica have in common."""
        told, policy = self.deployment, self.policy()
        slo, options = (policy.slo, policy.options) if isinstance(policy, Tuned) else (self.targets, {})
        options = self._own | dict(options)
        words = "" if slo is None else str(slo)
        return Run(told.policy, self.instance.capacity, self.limits, told.prefix_cache, words, options, self._prices)

    def run(
        self,
        arrivals: Iterable[Arrival],
        *,
        ended: Callable[[Timeline], None] | None = None,
        records: bool = False,
        spans: bool = False,
    ) -> Simulation:
        """Serve `arrivals`: see `simulate`, and for the errors too."""
        told = self.deployment
        return simulate(
            arrivals,
            self.policy,
            self.instance.cost,
            self.instance.capacity,
            self.limits,
            replicas=told.replicas,
            router=told.router,
            reuse=told.prefix_cache,
            max_tokens=told.max_output,
            ended=ended,
            records=records,
            spans=spans,
            between_s=self.instance.between_s,
            scatter=self.instance.scatter,
        )

    def trial(self, traffic: Traffic, rate: float | None, seed: int, slo: Slo) -> Report:
        """What becomes of `traffic` at `rate`, drawn with `seed`, and how it stands to `slo`."""
        tally = Tally(slo)
        self.run(traffic.stream(rate, seed), ended=tally.add)
        return tally.report(rate)

    def dollars_per_million(self, report: Report) -> float | None:
        """US dollars for a million output tokens, if the devices have a price."""
        if self.instance.dollars is None or not report.output_tokens_per_s:
            return None
        return self.instance.dollars * self.deployment.replicas / 3600 / report.output_tokens_per_s * 1e6


def instance(told: Deployment) -> Instance:
    """The machine of one replica, by the roofline. Raises ValueError for what is not known or does not fit."""
    if told.model is None:
        raise ValueError(f"which model? It is one of {', '.join(models.names())}, or the path of a config.json")
    device, model = devices.load(told.hardware), models.load(told.model)
    sharded = models.Sharded(model, told.tp, told.pp, told.weights, told.kv)
    tokens = sharded.kv_tokens(device.memory, told.gpu_memory_utilization)
    if told.block_size < 1:
        raise ValueError(f"KV in blocks of {told.block_size} tokens cannot be; give 1 or more")
    length = model.max_model_len if told.max_model_len is None else told.max_model_len
    if not 1 < length <= tokens:
        raise ValueError(
            f"a request of {length:,} tokens cannot be ({'the context' if told.max_model_len is None else 'max_model_len'}): "
            f"{tokens:,} tokens of KV fit beside the weights; give a max_model_len from 2 to {tokens:,}, more devices "
            "(tp, pp), or devices with more memory"
        )
    cost: CostModel
    if told.engine.endswith(".json"):
        cost = Profiled(Path(told.engine), model.name, told.tp)  # type: ignore[assignment]  # prices, and neither room nor learning
    else:
        cost = Roofline(device, sharded, told.engine, node=told.node, network=told.network)
    number = told.tp * told.pp
    return Instance(
        cost,
        Capacity(told.block_size, tokens // told.block_size, length, depth=told.pp),
        device.price * number,
        f"{model.name} on {number} x {device.name}" if number > 1 else f"{model.name} on {device.name}",
    )


def calibrated(instance: Instance) -> Fitted:
    """The cost model that a calibration of `instance` would make: fitted to some dozen iterations, as on a live machine, and not
    the truth that the simulation knows.
    """
    if isinstance(instance.cost, Fitted):
        return Fitted.from_state(instance.cost.state())
    longest = instance.capacity.max_model_len
    contexts = sorted({16, min(1024, longest // 2), min(4096, longest // 2)})
    shapes = [[(context, 1)] * batch for context in contexts for batch in (1, 8, 32, 64, 128)]
    for start in contexts:
        for count in (64, 128, 256, 512, 1024, 2048):
            if start + count <= longest:
                shapes += [[(start, count)], [(contexts[1], 1)] * 32 + [(start, count)]]
    return Fitted.fit([(shape, instance.cost.seconds(shape)) for shape in shapes], QUANTUM)
