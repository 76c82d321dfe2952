"""The torch executor: any supported model, on a processor or GPUs, in one process or several. Needs the extra `torch`."""

import torch

from stallfree import extra
from stallfree.executors.torch.driver import Local, ParallelExecutor, Workers
from stallfree.executors.torch.executor import TorchExecutor
from stallfree.executors.torch.runner import Options

__all__ = ["Options", "ParallelExecutor", "TorchExecutor", "device_name", "usual_device", "workers"]

PLACES = ("local", "ray")


def usual_device() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    """What the speed of `device` depends on."""
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device


def workers(place: str) -> Workers:
    """Who places ranks, by name. Raises ValueError for one that is not known, or not installed."""
    if place == "local":
        return Local()
    if place == "ray":
        try:
            from stallfree.executors.torch.ray_workers import RayWorkers
        except ImportError as error:
            raise ValueError(f"workers ray need {error.name}, which is not installed: {extra('ray')}") from None
        return RayWorkers()
    raise ValueError(f"workers {place!r} are unknown; known are {', '.join(PLACES)}")
