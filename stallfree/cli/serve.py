"""`stallfree serve`: a model behind an OpenAI-compatible HTTP server."""

import json
from pathlib import Path
from typing import Annotated

import typer

from stallfree.cli import options, words


@words.spread()
def serve(
    served: options.Served,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="STALLFREE_API_KEY", help="Clients must send it as a bearer token.", show_envvar=True)
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the model in the API.", show_default="its own")] = None,
    max_queue: Annotated[int, typer.Option(help="Most requests waiting; one more gets 429.", min=1)] = 1024,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get to finish after SIGTERM.", min=0)] = 30,
    record: Annotated[Path | None, typer.Option(help="Write a JSON line for every iteration to this file.")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector that gets a trace of every request, as http://127.0.0.1:4318.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible, until SIGTERM or Ctrl-C."""
    from stallfree.core.record import StepRecord
    from stallfree.engine.assemble import Options, assemble
    from stallfree.engine.recording import RecordFile
    from stallfree.engine.thread import EngineThread
    from stallfree.server.app import create_app
    from stallfree.server.live import Live
    from stallfree.server.metrics import Metrics
    from stallfree.server.run import bind, run
    from stallfree.server.traces import Traces, exporter_to

    sock = bind(host, port)  # first: a port in use should not cost the loading of a model
    exporter = None if otlp_endpoint is None else exporter_to(otlp_endpoint)
    file = None if record is None else RecordFile(record)

    def each_step(step: StepRecord) -> None:
        account = metrics.record(step)
        if traces is not None:
            traces.record(account)
        live.record(step, account)
        if file is not None:
            file.write(step)

    assembled = assemble(
        Options(**vars(served)),
        record=each_step,
        fingerprints=file is not None,
        say=lambda line: typer.echo(line, err=True),
        progress=options.progress("calibrating"),
    )
    name = served_name or assembled.name
    live, metrics = Live(served.policy, assembled.slo), Metrics(name, assembled.slo)
    traces = None if exporter is None else Traces(name, assembled.engine.clock, exporter)
    if file is not None:
        file.begin(assembled.run)
    engine_thread = EngineThread(assembled.engine, max_queue)
    capacity = assembled.engine.executor.capacity
    budget = getattr(assembled.engine.scheduler.policy, "token_budget", None)
    address, at = sock.getsockname()[:2]
    card = {
        "model": name,
        "weights": assembled.weights,
        "kv_blocks": capacity.num_blocks,
        "block_size": capacity.block_size,
        "max_model_len": assembled.engine.scheduler.max_len,
        "policy": served.policy,
        "slo": None if assembled.slo is None else str(assembled.slo),
        "token_budget": budget,
        "url": f"http://{f'[{address}]' if ':' in address else address}:{at}",
    }
    _print_card(card, as_json)
    app = create_app(engine_thread, model=name, metrics=metrics, live=live, traces=traces, api_key=api_key)
    run(app, engine_thread, sock, drain_timeout_s=drain_timeout)
    if traces is not None:
        traces.close()
    if file is not None:
        file.close()


def _print_card(card: dict[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(card), flush=True)
        return
    from rich.console import Console
    from rich.panel import Panel

    kv = f"{card['kv_blocks']:,} blocks of {card['block_size']} tokens; a sequence has at most {card['max_model_len']:,}"
    budget = "" if card["token_budget"] is None else f", {card['token_budget']} tokens an iteration"
    slo = "" if card["slo"] is None else f", {card['slo']}"
    lines = {
        "model": f"{card['model']} ({card['weights']})",
        "KV cache": kv,
        "policy": f"{card['policy']}{budget}{slo}",
        "URL": f"{card['url']}/v1",
        "live page": f"{card['url']}/",
    }
    body = "\n".join(f"[bold]{key:<11}[/bold]{value}" for key, value in lines.items())
    Console().print(Panel(body, title="stallfree", title_align="left", expand=False))
