"""The commands that run what was simulated, with the same policies and limits. Where the hosts are is for the reader to fill in."""

from collections.abc import Iterator

from stallfree.core.slo import Slo
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split

ANYWHERE = "0.0.0.0"
"""What a server listens on that other hosts are to reach."""


def commands(site: Site, deployed: Deployment | Split, slo: Slo) -> list[str]:
    """What to type for `deployed` on `site`, each with how often, if that is not once."""
    if isinstance(deployed, Deployment):
        return [f"stallfree deploy {_engine(site, deployed, slo)} --replicas {deployed.replicas}"]
    prefill, decode = deployed.prefill, deployed.decode
    far = site.nodes > 1
    host, peer_host = (f" --host {ANYWHERE}", f" --peer-host {ANYWHERE}") if far else ("", "")
    lines = ["export STALLFREE_PEER_KEY=...  # one secret, on all hosts"] if far else []
    return [
        *lines,
        f"stallfree serve {_engine(site, prefill, slo)} --role prefill{peer_host} --peer-port 9001  # {_times(prefill)}",
        f"stallfree serve {_engine(site, decode, slo)} --role decode{host} --prefill HOST:9001,...  # {_times(decode)}",
        "stallfree route --decode http://HOST:8000,... --prefill HOST:9001,...",
    ]


def _engine(site: Site, told: Deployment, slo: Slo) -> str:
    return " ".join((site.model or "MODEL", "--executor torch", *_options(site, told), f"--slo {slo}"))


def _options(site: Site, told: Deployment) -> Iterator[str]:
    """What differs from the defaults, which simulated and real engines share."""
    usual = Deployment()
    for name in ("tp", "pp", "policy", "token_budget", "max_tokens", "weights", "kv", "max_model_len"):
        value = getattr(told, name)
        if value != getattr(usual, name):
            yield f"--{name.replace('_', '-')} {value}"
    if told.tp * told.pp > site.per_node:
        yield "--workers ray"


def _times(pool: Deployment) -> str:
    gpus = pool.tp * pool.pp
    return f"{pool.replicas} times, each with {gpus} GPU{'s' if gpus > 1 else ''} of its own (CUDA_VISIBLE_DEVICES) and ports"
