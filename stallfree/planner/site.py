"""The devices to deploy on, in words that fit on a command line. `candidates` knows the deployments that fit them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Site:
    """`gpus` devices of `hardware`, evenly on `nodes` nodes that `link` joins (`perf.links`). The other fields say what is served
    there, as in `sim.deployment.Deployment`.
    """

    model: str | None = None
    hardware: str = "a100-80g"
    gpus: int = 8
    nodes: int = 1
    link: str = "ib-200g"
    weights: str = "fp16"
    kv: str = "fp16"
    engine: str = "vllm-2026"
    max_model_len: int | None = None
    tenant_weights: str | None = None
    rank: str | None = None
    adapter_modules: str = "attention"

    @property
    def per_node(self) -> int:
        return self.gpus // self.nodes


def counted(number: int, noun: str) -> str:
    """A number of things, such as 1 node or 2 nodes."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
