"""`stallfree serve`: a model behind an OpenAI-compatible HTTP server."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from stallfree.cli import options


def serve(
    model: options.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="STALLFREE_API_KEY", help="Clients must send it as a bearer token.")] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the model in the API.", show_default="its own")] = None,
    policy: options.Policy = "sarathi",
    token_budget: options.TokenBudget = None,
    executor: options.Executor = "openvino",
    weights: options.Weights = "int8",
    kv: options.Kv = "u8",
    kv_memory: options.KvMemory = None,
    max_model_len: options.MaxModelLen = None,
    max_seqs: options.MaxSeqs = 256,
    max_tokens: options.MaxTokens = 8192,
    max_queue: Annotated[int, typer.Option(help="Most requests waiting; one more gets 429.", min=1)] = 1024,
    prefix_cache: options.PrefixCache = True,
    threads: options.Threads = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get to finish after SIGTERM.", min=0)] = 30,
    record: Annotated[Path | None, typer.Option(help="Write a JSON line for every iteration to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible, until SIGTERM or Ctrl-C."""
    from stallfree.engine.assemble import Options, assemble
    from stallfree.engine.record_file import RecordFile
    from stallfree.server import Metrics, Server, bind

    socket = bind(host, port)  # first: a port in use should not cost the loading of a model
    metrics = Metrics()
    recorders: list[Any] = [metrics.record]
    if record is not None:
        recorders.append(RecordFile(record).write)
    assembled = assemble(
        Options(
            model, executor, policy, token_budget, weights, kv, kv_memory, max_model_len, max_seqs, max_tokens, prefix_cache, threads
        ),
        record=lambda step: [r(step) for r in recorders],
        say=lambda line: typer.echo(line, err=True),
    )
