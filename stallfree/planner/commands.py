"""Writes the commands that run a simulated deployment, with the same policies and limits. It does not know the hosts' addresses."""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from stallfree.core.slo import Slo
from stallfree.metrics.report import Targets
from stallfree.perf.shape import load, repository
from stallfree.planner.site import Site
from stallfree.sim.deployment import Deployment, Split
from stallfree.sim.pairings import PAIRINGS

SYSTEMS = {
    **{"a100-80g": "a100_sxm", "a100-80g-pcie": "a100_pcie", "l40s": "l40s"},
    **{"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm"},
}
"""Names of devices in aiconfigurator (NVIDIA, PyPI, 0.12), by their names here."""
ANYWHERE = "0.0.0.0"
"""The address to listen on for servers that other hosts must reach."""


def commands(site: Site, deployed: Deployment | Split, slo: Targets) -> list[str]:
    """The commands for `deployed` on `site`, with how often to run each; or a comment that the engine cannot serve the model."""
    model = load(site.model or "")
    if model.positions:
        return [f"# no command: this engine does not serve {model.name}, whose positions are learned; it can only be simulated"]
    if site.weights == "fp8-block":
        return ["# no command: this engine has no products in fp8 with block scales; they can only be simulated. fp8 has one"]
    if site.kv in ("u8", "u4"):
        return [f"# no command: executor torch has no KV in {site.kv}; it can only be simulated. fp8 has one"]
    if isinstance(deployed, Deployment):
        return [f"stallfree deploy {_engine(site, deployed, slo)} --replicas {deployed.replicas}"]
    prefill, decode = deployed.prefill, deployed.decode
    far = site.nodes > 1
    host, peer_host = (f" --host {ANYWHERE}", f" --peer-host {ANYWHERE}") if far else ("", "")
    lines = ["export STALLFREE_PEER_KEY=...  # one secret, on all hosts"] if far else []
    spill = getattr(PAIRINGS[deployed.pairing], "spill", None)
    more = "" if spill is None else f" --spill {spill}"
    prefills, decodes = (f"stallfree serve {_engine(site, pool, slo)}" for pool in (prefill, decode))
    lines += [
        f"{prefills} --port 8001 --role prefill{peer_host} --peer-port 9001  # {_times(prefill)}",
        f"{decodes} --port 8002 --role decode{host} --prefill HOST:9001,...  # {_times(decode)}",
        f"stallfree route --decode http://HOST:8002,... --prefill HOST:9001,...{more}",
    ]
    if spill is not None:
        lines.append("# simulated, but not done by these servers: a prefill engine keeps requests while decode engines are full")
    return lines


def cross_check(site: Site, prompt: float, output: float, slo: Slo) -> str | None:
    """The command by which aiconfigurator answers the same question from kernels of its own, for mean tokens of `prompt` and
    `output`; it knows means, no bursts and no percentiles. None if it does not know the device, or if the model is a file.
    """
    model, pace = repository(site.model or ""), slo.tpot or slo.tbt
    if site.hardware not in SYSTEMS or model.count("/") != 1 or Path(model).exists():
        return None
    targets = "".join(f" --{name} {1000 * t.seconds:.0f}" for name, t in (("ttft", slo.ttft), ("tpot", pace)) if t is not None)
    load = f"--isl {prompt:.0f} --osl {output:.0f}{targets}"
    where = f"--total-gpus {site.gpus} --system {SYSTEMS[site.hardware]} --backend vllm"
    return f"aiconfigurator cli default --model {model} {where} {load}"


def _engine(site: Site, deployment: Deployment, slo: Targets) -> str:
    model = Path(site.model or "")
    served = str(model.parent if model.suffix == ".json" else repository(site.model or ""))
    return " ".join((served, "--executor torch", *_options(site, deployment), f"--slo {quote(str(slo))}"))


def _options(site: Site, deployment: Deployment) -> Iterator[str]:
    """The options that differ from the defaults, which simulated and real engines share."""
    usual = Deployment()
    for name in ("tp", "pp", "sp", "policy", "token_budget", "max_tokens", "weights", "kv", "max_model_len"):
        value = getattr(deployment, name)
        if value != getattr(usual, name):
            yield f"--{name.replace('_', '-')} {value}"
    if deployment.devices > site.per_node:
        yield "--workers ray"


def _times(pool: Deployment) -> str:
    gpus = pool.devices
    often = "once, with" if pool.replicas == 1 else f"{pool.replicas} times, each with its own ports and"
    return f"{often} {gpus} GPU{'s' if gpus > 1 else ''} of its own (CUDA_VISIBLE_DEVICES)"
