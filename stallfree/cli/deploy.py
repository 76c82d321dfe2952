"""`stallfree deploy`: replicas of the server on a Ray cluster, as many as their load needs. It knows no route."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stallfree.cli import options, words


@words.spread()
def deploy(
    served: options.Served,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of a node.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    api_key: options.ServersKey = None,
    api_key_file: options.KeyFile = None,
    tenants: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Tenants with keys, weights, classes and limits for each replica (TOML); read at the start.",
            show_default=False,
        ),
    ] = None,
    share_prefixes: options.SharePrefixes = False,
    served_model_name: options.ServedNames = None,
    sanitize_control_tokens: options.Sanitize = False,
    replicas: Annotated[str, typer.Option(help="How many, such as 2; or the fewest and the most, such as 1-4.")] = "1",
    max_queue: Annotated[int, typer.Option(help="Most waiting requests at a replica; one more gets status 429.", min=1)] = 1024,
    on_late: options.OnLate = "refuse",
) -> None:
    """Serve a model with replicas on a Ray cluster (RAY_ADDRESS, or this machine), at one address, until Ctrl-C.

    The number of replicas, within --replicas, keeps each replica at 70 % of what its latency targets allow.
    """
    from stallfree import extra

    try:
        from ray import serve

        from stallfree.server.ray_serve import application
    except ImportError as error:
        raise ValueError(f"deploy needs {error.name}, which is not installed: {extra('ray')}") from None
    from stallfree import policies
    from stallfree.checkpoint.fetch import named
    from stallfree.engine.adapters import folders
    from stallfree.engine.assemble import Options

    folders(served.adapter or (), served.adapters)  # report a mistake before anything starts
    least, most = bounds(replicas)
    policies.options(served.policy, served.token_budget, served.policy_option)
    if served.executor != "simulated":
        named(served.model)
    keys = options.keys(host, api_key, api_key_file, tenants=tenants)
    names = options.names(served_model_name)
    sharing = options.tenants(tenants, keys, served.slo, share_prefixes=share_prefixes)
    serve.start(http_options={"host": host, "port": port})
    typer.echo(f"http://{host}:{port}/v1, {replicas} replicas; Ctrl-C ends them", err=True)
    late = on_late == "serve"
    app = application(Options(**vars(served)), names, least, most, max_queue, sharing, sanitize_control_tokens, serve_late=late)
    serve.run(app, blocking=True)


def bounds(text: str) -> tuple[int, int]:
    """The fewest and the most replicas in "2" or "1-4". Raises ValueError for other text."""
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash)):
        raise ValueError(f"--replicas {text!r} is not a number of replicas; write 2, or 1-4 for as many as the load needs")
    least, most = int(low), int(high or low)
    if not 1 <= least <= most:
        raise ValueError(f"--replicas {text} is invalid; write numbers from 1 on, the smaller one first")
    return least, most
