"""`stallfree deploy`: replicas of the server on a Ray cluster, as many as their load asks for."""

from __future__ import annotations

from typing import Annotated

import typer

from stallfree.cli import options, words


@words.spread()
def deploy(
    served: options.Served,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of a node.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    api_key: options.ServersKey = None,
    served_name: options.ServedName = None,
    sanitize_control_tokens: options.Sanitize = False,
    replicas: Annotated[str, typer.Option(help="How many, or from how many to how many, as 1-4.")] = "1",
    max_queue: Annotated[int, typer.Option(help="Most requests waiting at a replica; one more gets 429.", min=1)] = 1024,
) -> None:
    """Serve a model by replicas on a Ray cluster (RAY_ADDRESS, or this machine), behind one address, until Ctrl-C.

    Between the bounds of --replicas there are as many as keep each used to 70 % of what its latency targets allow.
    """
    from stallfree import extra

    try:
        from ray import serve

        from stallfree.server.ray_serve import application
    except ImportError as error:
        raise ValueError(f"deploy needs {error.name}, which is not installed: {extra('ray')}") from None
    from stallfree import policies
    from stallfree.checkpoint.fetch import named
    from stallfree.core.slo import Slo as Targets
    from stallfree.engine.assemble import Options

    least, most = bounds(replicas)
    policies.options(served.policy, served.token_budget, served.policy_option)
    if served.executor != "simulated":
        named(served.model)
    if served.slo is not None:
        Targets.parse(served.slo)
    options.warn_if_open(host, api_key)
    serve.start(http_options={"host": host, "port": port})
    typer.echo(f"http://{host}:{port}/v1, {replicas} replicas; Ctrl-C ends them", err=True)
    app = application(Options(**vars(served)), served_name, least, most, max_queue, api_key, sanitize_control_tokens)
    serve.run(app, blocking=True)


def bounds(text: str) -> tuple[int, int]:
    """ "2" or "1-4" as the fewest and the most. Raises ValueError for what is neither."""
    low, dash, high = text.partition("-")
    if not (low.isdecimal() and (high.isdecimal() or not dash)):
        raise ValueError(f"--replicas {text!r} is no number of replicas; write 2, or 1-4 for as many as are needed")
    least, most = int(low), int(high or low)
    if not 1 <= least <= most:
        raise ValueError(f"--replicas {text} cannot be; write a number from 1 on, or the smaller one first")
    return least, most
