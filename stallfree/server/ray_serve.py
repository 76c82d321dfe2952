"""Replicas of the server under Ray Serve's HTTP proxy. Each is an engine with the app of `stallfree serve`; their utilisation
decides their number. It knows Ray Serve, and nothing of how a replica serves.

Utilisation is the share of time that a replica spends in iterations, each weighted by the share of its limit that it used. If the
oldest waiting request has waited for a larger share of the target for TTFT, utilisation is that share. A replica that can admit no
more prefill within its targets is full: its utilisation is at least 1. `n` replicas with a mean utilisation `u` become
n x u / `TARGET` replicas.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from stallfree.core.record import StepRecord
from stallfree.engine.assemble import Options, assemble
from stallfree.metrics.capacity import MEDIAN_TTFT_S
from stallfree.metrics.stalls import StallAccount
from stallfree.server.app import create_app
from stallfree.server.service import Service
from stallfree.server.tenants import Tenants

TARGET = 0.7
"""Mean utilisation that scaling aims at."""
WINDOW_S = 10.0
"""Seconds between two measurements of a replica's utilisation."""


class Utilisation:
    """A replica's utilisation, from its iterations. The engine's thread calls `record`."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._since, self._used = clock(), 0.0

    def record(self, step: StepRecord, account: StallAccount) -> None:
        seconds = step.t_end - step.t_start
        self._used += seconds * (min(1.0, seconds / step.limit_s) if step.limit_s else 1.0)

    def read(self, oldest_s: float, ttft_s: float, room_s: float | None = None) -> float:
        """The utilisation since the last call. `oldest_s`: how long the oldest waiting request has waited. `room_s`: seconds of
        prefill that can still be admitted within the targets; None if the policy does not forecast."""
        now = self._clock()
        share = self._used / max(now - self._since, 1e-9)
        self._since, self._used = now, 0.0
        full = 1.0 if room_s is not None and room_s <= 0 else 0.0
        return max(share, oldest_s / ttft_s, full)


def wanted(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many replicas Ray Serve's controller should run."""
    used = (context.aggregated_metrics or {}).get("utilisation") or {}
    mean = sum(used.values()) / len(used) if used else TARGET
    return max(1, math.ceil(context.current_num_replicas * mean / TARGET - 0.05)), {}


def application(
    options: Options,
    names: Sequence[str],
    least: int,
    most: int,
    max_queue: int,
    tenants: Tenants,
    sanitize_control_tokens: bool = False,
    *,
    serve_late: bool = False,
) -> serve.Application:
    """The application for `serve.run`: from `least` to `most` replicas of an engine made of `options`, under `names` (none: the
    model's own). Each replica has its own copy of `tenants`: their keys open it, and their limits are those of one replica.
    `serve_late`: see `Service`. A replica is healthy until its engine fails, or an iteration is overdue.
    """
    parts: dict[str, Any] = {}

    def app() -> FastAPI:
        """Ray Serve calls this once in each replica's process."""
        assembled = assemble(options, say=print)
        served_as = names or (assembled.name,)
        service = Service(
            assembled.engine,
            served_as[0],
            policy=options.policy,
            slo=assembled.slo,
            classes=assembled.classes,
            tenants=tenants,
            max_queue=max_queue,
            serve_late=serve_late,
            library=assembled.library,
            sanitize_control_tokens=sanitize_control_tokens,
            aliases=served_as[1:],
        )
        service.start_helpers()
        parts.update(service=service, utilisation=Utilisation(assembled.engine.clock), slo=assembled.slo)
        service.observers.append(parts["utilisation"].record)
        return create_app(service, keys=tenants)

    class Replica:
        def record_autoscaling_stats(self) -> dict[str, float]:
            thread, engine, slo = parts["service"].thread, parts["service"].engine, parts["slo"]
            head = engine.scheduler.ledger.queue.head()
            oldest = 0.0 if head is None else engine.clock() - head[2].arrival
            ttft = slo.ttft.seconds if slo is not None and slo.ttft is not None else MEDIAN_TTFT_S
            if thread.forecast is None:
                return {"utilisation": parts["utilisation"].read(oldest, ttft)}
            room = thread.forecast.room
            return {"utilisation": parts["utilisation"].read(oldest, ttft, room), "prefill_room": room}

        def check_health(self) -> None:
            service = parts["service"]
            if (fault := service.thread.failure or service.watchdog.look()) is not None:
                raise RuntimeError(fault)

    scaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        policy=AutoscalingPolicy(policy_function=wanted),
        metrics_interval_s=WINDOW_S,
        look_back_period_s=3 * WINDOW_S,
    )
    gpus = options.ranks if options.executor == "torch" and options.device == "cuda" and options.workers == "local" else 0
    deployment = serve.deployment(
        name="stallfree",
        autoscaling_config=scaling,
        max_ongoing_requests=max_queue + options.max_seqs,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )(serve.ingress(app)(Replica))
    return deployment.bind()
