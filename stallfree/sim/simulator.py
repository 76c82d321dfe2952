"""A deployment ready to simulate: its devices priced, its policy calibrated, its limits checked. It can run many times. It combines
`perf`, `policies`, `core` and `workload`, and does not know how results are shown.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from stallfree import policies
from stallfree.core.classes import Classes
from stallfree.core.ledger import Limits
from stallfree.core.plan import Capacity
from stallfree.core.policy import CostModel, Forecasting, Policy, Setup, Tuned
from stallfree.core.record import Run
from stallfree.core.slo import Slo
from stallfree.core.speculation import MOST
from stallfree.metrics.report import Report
from stallfree.metrics.timeline import Timeline
from stallfree.perf import hardware as devices
from stallfree.perf import shape as models
from stallfree.perf.fitted import Fitted, device_shapes
from stallfree.perf.profiled import Profiled
from stallfree.perf.roofline import QUANTUM, Roofline
from stallfree.policies.slo import possible
from stallfree.sim.deployment import Deployment
from stallfree.sim.guesses import Chance
from stallfree.sim.shelf import Shelf, ranks
from stallfree.sim.simulate import Drafts, Simulates, Simulation, simulate
from stallfree.workload.mix import weights
from stallfree.workload.workload import Arrival

DRAFTED = [(512, 1)] * 8
"""The iteration of a draft model that is the time of one guess for each stream."""


class Instance(NamedTuple):
    """The machine of one replica. `cost`: of its iterations; `capacity`: its KV; `dollars`: US dollars per hour, if it has a price;
    `about`: the machine in words; `between_s`: seconds between two iterations; `front_s`: of a request's way to the scheduler and
    its first token's way back. `scatter`: factors, as on a real machine; each iteration's time is multiplied by one at random
    (none: it takes exactly what it costs). `shelf`: its adapters, if there are any.
    """

    cost: CostModel
    capacity: Capacity
    dollars: float | None
    about: str
    between_s: float = 0.0
    front_s: float = 0.0
    scatter: tuple[float, ...] = ()
    shelf: Shelf | None = None


class Simulator(Simulates):
    """A deployment ready to run many times, on the instance `placed`, or else on that of the roofline.

    Raises ValueError for unknown names, limits that do not fit, options that the policy does not take, and impossible targets.
    """

    def __init__(self, deployment: Deployment, placed: Instance | None = None):
        self.deployment = deployment
        self.instance = placed or instance(deployment)
        self.limits = Limits(deployment.max_seqs, deployment.max_tokens, deployment.watermark)
        self.classes = None if deployment.slo is None else Classes.parse(deployment.slo)
        for slo in () if self.classes is None else self.classes.values():
            possible(slo, self.instance.cost)
        self.weights = {} if deployment.tenant_weights is None else weights(deployment.tenant_weights)
        if deployment.prefill_replicas is not None:
            raise ValueError(
                f"policy {deployment.policy} has replicas of one kind; leave out --prefill-replicas, which is for distserve, "
                "splitwise, hybrid, taichi and dynaserve"
            )
        self._own = policies.options(deployment.policy, deployment.token_budget, deployment.policy_option)
        self._prices = calibrated(self.instance).state() if policies.wants_setup(deployment.policy) else None
        policy = self.policy()  # report a mistake before anything is simulated
        if deployment.rank is not None and self.instance.shelf is None:
            raise ValueError(
                f"there are no prices of adapters on {self.instance.about}; leave out --rank, or take hardware of "
                "`stallfree list hardware`"
            )
        self._drafts = None if deployment.draft_acceptance is None else self._guesses(deployment.draft_acceptance)
        if self._drafts is None and deployment.draft_model is not None:
            raise ValueError("--draft-model: say how often its guesses are right, --draft-acceptance 0.7")
        if deployment.on_late not in ("serve", "refuse"):
            raise ValueError(f"--on-late {deployment.on_late!r} is neither serve nor refuse")
        if deployment.on_late == "refuse" and not isinstance(policy, Forecasting):
            raise ValueError(f"policy {deployment.policy!r} forecasts no first tokens, so none can be refused; take policy slo")

    @property
    def targets(self) -> Slo | None:
        """The targets of requests that name no class."""
        return None if self.classes is None else self.classes.default

    @property
    def named(self) -> dict[str, Slo]:
        """The targets of each class that requests can name."""
        return {} if self.classes is None else {name: slo for name, slo in self.classes.items() if name}

    def policy(self) -> Policy:
        """A new policy for one replica. If it wants a cost model, it gets one as calibrated on the instance, which learns."""
        cost = None if self._prices is None else Fitted.from_state(self._prices)
        return policies.load(self.deployment.policy, Setup(cost, self.targets), **self._own)

    @property
    def header(self) -> Run:
        """The run that begins the records of each replica."""
        deployment, policy = self.deployment, self.policy()
        slo, options = (policy.slo, policy.options) if isinstance(policy, Tuned) else (self.targets, {})
        words, options = "" if slo is None else str(slo), self._own | dict(options)
        reuse = deployment.prefix_cache
        return Run(deployment.policy, self.instance.capacity, self.limits, reuse, words, options, self._prices)

    def run(
        self,
        arrivals: Iterable[Arrival],
        *,
        ended: Callable[[Timeline], None] | None = None,
        records: bool = False,
        spans: bool = False,
    ) -> Simulation:
        """Serve `arrivals`. For the arguments and the errors see `simulate`."""
        deployment = self.deployment
        return simulate(
            arrivals,
            self.policy,
            self.instance.cost,
            self.instance.capacity,
            self.limits,
            replicas=deployment.replicas,
            router=deployment.router,
            reuse=deployment.prefix_cache,
            max_tokens=deployment.max_output,
            ended=ended,
            records=records,
            spans=spans,
            between_s=self.instance.between_s,
            front_s=self.instance.front_s,
            scatter=self.instance.scatter,
            classes=self.named,
            weights=self.weights,
            serve_late=deployment.on_late == "serve",
            shelf=self.instance.shelf,
            drafts=self._drafts,
        )

    def _guesses(self, acceptance: float) -> Drafts:
        deployment = self.deployment
        if not 1 <= deployment.draft_tokens <= MOST:
            raise ValueError(f"--draft-tokens {deployment.draft_tokens} is not possible; take 1 to {MOST}")
        draft_s = 0.0
        if deployment.draft_model is not None:
            small = instance(replace(deployment, model=deployment.draft_model, rank=None, max_model_len=None))
            draft_s = small.cost.seconds(DRAFTED)
        return Drafts(Chance(acceptance, draft_s), deployment.draft_tokens, calibrated(self.instance))

    def dollars_per_million(self, report: Report) -> float | None:
        """US dollars for a million output tokens; None if the devices have no price, or if there were no tokens."""
        dollars = self.instance.dollars
        return dollars_per_million(None if dollars is None else dollars * self.deployment.replicas, report)


def dollars_per_million(dollars: float | None, report: Report) -> float | None:
    """US dollars for a million output tokens on devices that cost so much an hour; None if that, or the tokens, are nothing."""
    return None if dollars is None or not report.output_tokens_per_s else dollars / 3600 / report.output_tokens_per_s * 1e6


def instance(deployment: Deployment) -> Instance:
    """The machine of one replica, by the roofline. Raises ValueError for unknown names and for sizes that do not fit."""
    if deployment.model is None:
        raise ValueError(f"which model? It is one of {', '.join(models.names())}, or the path of a config.json")
    if deployment.sp < 1:
        raise ValueError(f"a ring cannot have {deployment.sp} groups; give --sp 1 or more")
    if deployment.sp > 1 and deployment.rank is not None:
        raise ValueError("each group of a ring would hold the adapters, which has no price; leave out --rank, or --sp")
    device, model = devices.load(deployment.hardware), models.load(deployment.model)
    sharded = models.Sharded(model, deployment.tp, deployment.pp, deployment.weights, deployment.kv)
    tokens = deployment.sp * sharded.kv_tokens(device.memory, deployment.gpu_memory_utilization)
    if deployment.block_size < 1:
        raise ValueError(f"a KV block cannot have {deployment.block_size} tokens; give a block size of 1 or more")
    length = model.max_model_len if deployment.max_model_len is None else deployment.max_model_len
    if not 1 < length <= tokens:
        raise ValueError(
            f"a request of {length:,} tokens ({'the context' if deployment.max_model_len is None else '--max-model-len'}) does not "
            f"fit: {tokens:,} tokens of KV fit beside the weights; give a --max-model-len from 2 to {tokens:,}, more devices "
            "(--tp, --pp, --sp), or devices with more memory"
        )
    cost: CostModel
    shelf, front_s = None, 0.0
    if deployment.engine.endswith(".json"):
        if deployment.rank is not None:
            raise ValueError("a fitted engine (.json) has no prices of adapters; leave out --rank, or take another --engine")
        if deployment.sp > 1:
            raise ValueError(
                "a fitted engine (.json) has no prices of sequence parallelism; leave out --sp, or take another --engine"
            )
        cost = Profiled(Path(deployment.engine), model.name, deployment.tp)  # type: ignore[assignment]  # it only prices
    else:
        cost = Roofline(
            device,
            sharded,
            deployment.engine,
            node=deployment.node,
            network=deployment.network,
            adapters=deployment.adapter_modules,
            sp=deployment.sp,
        )
        if deployment.rank is not None:
            shelf = _shelf(deployment.rank, cost, deployment.block_size, tokens // deployment.block_size)
        front_s = cost.front_s
    number = deployment.devices
    return Instance(
        cost,
        Capacity(deployment.block_size, tokens // deployment.block_size, length, depth=deployment.pp),
        device.price * number,
        f"{model.name} on {number} x {device.name}" if number > 1 else f"{model.name} on {device.name}",
        front_s=front_s,
        shelf=shelf,
    )


def _shelf(words: str, cost: Roofline, block_size: int, num_blocks: int) -> Shelf:
    """The adapters of the ranks in `words`. Raises ValueError if one and a token do not fit."""
    largest = max(numbers := ranks(words))
    blocks = cost.adapters.blocks(largest, block_size)
    if blocks >= num_blocks:
        raise ValueError(
            f"an adapter of rank {largest:,} takes {blocks:,} KV blocks, and there are {num_blocks:,}; give a smaller --rank, more "
            "devices (--tp), or devices with more memory"
        )
    return Shelf.of(numbers, cost.adapters, block_size)


def calibrated(instance: Instance) -> Fitted:
    """The cost model that a calibration of `instance` would make: fitted to a few dozen iterations, as on a live machine. It is not
    the exact cost that the simulation uses.
    """
    if isinstance(instance.cost, Fitted):
        return Fitted.from_state(instance.cost.state())
    shapes = device_shapes(instance.capacity.max_model_len)
    if instance.shelf is not None:
        shapes += [[(total, -1), *shape] for shape in shapes for total in (8, 128, 1024)]
    unmet = instance.cost.sharded.model.unmet if isinstance(instance.cost, Roofline) else 0.0
    return Fitted.fit([(shape, instance.cost.seconds(shape)) for shape in shapes], QUANTUM, unmet)
