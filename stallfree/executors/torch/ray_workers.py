"""Ranks placed by Ray: one bundle of a placement group for each pipeline stage. So all ranks of a stage are on one node, and stages
go where resources is room. Plans do not pass through Ray: an actor runs the same loop as a local process. It knows no model.
"""

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PLACED_S = 60.0
"""Seconds within which Ray must find room."""


class RayWorkers:
    """Actors of the cluster at `RAY_ADDRESS`. If resources is none, it starts a cluster on this machine alone."""

    def __init__(self) -> None:
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=True)
        self.host = ray.util.get_node_ip_address()
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._runs: list[Any] = []

    def start(self, each: int, pp: int, device: str, port: int, token: str) -> None:
        needs = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        bundle = {name: each * number for name, number in needs.items()}
        self._group = placement_group([bundle] * pp, strategy="PACK")
        if not self._group.wait(PLACED_S):
            resources = {name: int(ray.cluster_resources().get(name, 0)) for name in needs}
            wanted = " and ".join(f"{int(number)} {name}" for name, number in bundle.items())
            self.stop()
            raise RuntimeError(
                f"Ray found no room within {PLACED_S:g} s for {pp} stages of {wanted}, each on one node; "
                f"the cluster has {resources} in all; lower --tp, --sp or --pp, or add nodes"
            )
        actor = ray.remote(num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=0)(_Worker)
        for rank in range(each * pp):
            where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank // each)
            self._actors.append(actor.options(scheduling_strategy=where).remote())
            self._runs.append(self._actors[-1].work.remote(self.host, port, token, rank))

    def alive(self) -> bool:
        return not ray.wait(self._runs, timeout=0)[0]

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        self._group, self._actors, self._runs = None, [], []


class _Worker:
    """An actor: the process of one rank."""

    def work(self, host: str, port: int, token: str, rank: int) -> None:
        from stallfree.executors.torch.worker import work

        work(host, port, token, rank, 0)  # Ray shows each actor only its own GPU
