"""`stallfree list`: the names that options can have. It has no list of its own: each package knows its names."""

import json
from enum import StrEnum

import typer

from stallfree.cli import options


class What(StrEnum):
    policies = "policies"
    executors = "executors"
    hardware = "hardware"
    models = "models"


def listing(what: What, as_json: options.Json = False) -> None:
    """List policies, executors, or the hardware and models that `stallfree perf` can price, each with a description."""
    if what is What.policies:
        import importlib

        from stallfree import policies
        from stallfree.elastic.policies import POLICIES
        from stallfree.sim import systems

        rows = {
            n: _first_sentence(importlib.import_module(f"stallfree.policies.{n.replace('-', '_')}").__doc__)
            for n in policies.names()
        }
        rows |= {n: f"{about}; with --sp" for n, about in POLICIES.items()}
        rows |= {n: f"{about}; in `compare` and `capacity` with --replicas" for n, about in systems.SYSTEMS.items()}
    elif what is What.hardware:
        from stallfree.perf import hardware

        rows = {name: hardware.load(name).about for name in hardware.names()}
    elif what is What.models:
        from stallfree.perf import shape

        built_in = {name: shape.load(name) for name in shape.names()}
        rows = {n: f"{m.parameters / 1e9:.1f} billion parameters, {m.num_layers} layers" for n, m in built_in.items()}
    else:
        from stallfree.engine.assemble import EXECUTORS

        rows = EXECUTORS
    if as_json:
        typer.echo(json.dumps([{"name": name, "what": what} for name, what in rows.items()]))
        return
    from stallfree.cli.measuring import print_grid

    print_grid([("name", "what"), *rows.items()], numbers=False)


def _first_sentence(doc: str | None) -> str:
    return " ".join((doc or "").split()).partition(". ")[0].rstrip(".")
