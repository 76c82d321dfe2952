"""The torch executor: any supported model, on a processor or GPUs, in one process or several. Needs the extra `torch`.

One process needs only torch. The messages between several processes, and msgpack for them, are imported on demand.
"""

from typing import TYPE_CHECKING

import torch

from stallfree import extra
from stallfree.executors.torch.executor import TorchExecutor
from stallfree.executors.torch.runner import Options

if TYPE_CHECKING:
    from stallfree.executors.torch.driver import ParallelExecutor, Workers
    from stallfree.executors.torch.elastic import Cluster

__all__ = ["Cluster", "Options", "ParallelExecutor", "TorchExecutor", "device_name", "usual_device", "workers"]

PLACES = ("local", "ray")


def usual_device() -> str:
    """cuda if there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """The name of the GPU, or else `device`: it decides the speed."""
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device


def workers(place: str) -> "Workers":
    """The `Workers` that place ranks, by name. Raises ValueError if the name is unknown or its package is not installed."""
    if place not in PLACES:
        raise ValueError(f"workers {place!r} are unknown; known are {', '.join(PLACES)}")
    try:
        if place == "local":
            from stallfree.executors.torch.driver import Local

            return Local()
        from stallfree.executors.torch.ray_workers import RayWorkers

        return RayWorkers()
    except ImportError as error:
        needed = "ray" if place == "ray" else "torch"
        raise ValueError(f"workers {place} need {error.name}, which is not installed: {extra(needed)}") from None


def __getattr__(name: str) -> object:
    if name == "ParallelExecutor":
        from stallfree.executors.torch.driver import ParallelExecutor

        return ParallelExecutor
    if name == "Cluster":
        from stallfree.executors.torch.elastic import Cluster

        return Cluster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
