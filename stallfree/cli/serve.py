"""`stallfree serve`: a model behind an OpenAI-compatible HTTP server."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stallfree.cli import options, words

Role = Literal["both", "prefill", "decode"]
ROLES = {"prefill": "asked at", "decode": "asks"}


@words.spread()
def serve(
    served: options.Served,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.", min=0, max=65535)] = 8000,
    api_key: options.ServersKey = None,
    served_name: options.ServedName = None,
    sanitize_control_tokens: Annotated[
        bool, typer.Option("--sanitize-control-tokens", help="Take control tokens that clients write as text (<|im_start|>).")
    ] = False,
    max_queue: Annotated[int, typer.Option(help="Most requests waiting; one more gets 429.", min=1)] = 1024,
    role: Annotated[Role, typer.Option(help="Prefill for other engines, have others prefill, or both oneself.")] = "both",
    prefill: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,...", help="Prefill engines that an engine of role decode asks, in turns.")
    ] = None,
    peer_port: Annotated[
        int | None,
        typer.Option(help="Port at which decode engines ask one of role prefill; 0 is any.", min=0, max=65535),
    ] = None,
    peer_host: Annotated[str, typer.Option(help="Address of that port; any but 127.0.0.1 needs a --peer-key.")] = "127.0.0.1",
    peer_key: Annotated[
        str, typer.Option(envvar="STALLFREE_PEER_KEY", help="Secret that engines prove to each other.", show_envvar=True)
    ] = "",
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get to finish after SIGTERM.", min=0)] = 30,
    record: Annotated[Path | None, typer.Option(help="Write a JSON line for every iteration to this file.")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector that gets a trace of every request, as http://127.0.0.1:4318.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible, until SIGTERM or Ctrl-C."""
    from stallfree.cli import outputs
    from stallfree.core.record import StepRecord
    from stallfree.engine.assemble import Options, assemble
    from stallfree.engine.recording import RecordFile
    from stallfree.engine.thread import EngineThread
    from stallfree.handoff.asking import Asking
    from stallfree.handoff.serving import Serving
    from stallfree.handoff.terms import Terms, address
    from stallfree.server.app import RECOMMENDED, create_app
    from stallfree.server.live import Live
    from stallfree.server.metrics import Metrics
    from stallfree.server.run import PortError, bind, run
    from stallfree.server.traces import Traces, exporter_to

    peers = check_role(role, prefill, peer_port, peer_host, peer_key)
    outputs.check(record, "--record")
    options.warn_if_open(host, api_key)
    sock = bind(host, port)  # first: a port in use should not cost the loading of a model
    try:
        peer_sock = None if peer_port is None else bind(peer_host, peer_port, "peer-")
    except PortError:
        sock.close()
        raise
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
    asking = serving = None
    if role != "both":
        terms = Terms.of(assembled.engine.executor, assembled.identity)
        asking = Asking(engine_thread, terms, peers, peer_key) if peers else None
        serving = None if peer_sock is None else Serving(engine_thread, terms, peer_sock, peer_key)
    if asking is not None:
        asking.check()
    capacity = assembled.engine.executor.capacity
    budget = getattr(assembled.engine.scheduler.policy, "token_budget", None)
    card = {
        "model": name,
        "weights": assembled.weights,
        "kv_blocks": capacity.num_blocks,
        "block_size": capacity.block_size,
        "max_model_len": assembled.engine.scheduler.max_len,
        "policy": served.policy,
        "slo": None if assembled.slo is None else str(assembled.slo),
        "slo_basis": assembled.slo_basis or None,
        "sampling": {name: getattr(assembled.engine.sampling, name) for name in RECOMMENDED},
        "token_budget": budget,
        "url": f"http://{address(*sock.getsockname()[:2])}",
        "role": role,
        "peers": prefill if peer_sock is None else address(*peer_sock.getsockname()[:2]),
    }
    _print_card(card, as_json)
    app = create_app(
        engine_thread,
        model=name,
        metrics=metrics,
        live=live,
        traces=traces,
        asking=asking,
        serving=serving,
        api_key=api_key,
        sanitize_control_tokens=sanitize_control_tokens,
    )
    app.state.reader.start()
    try:
        run(app, engine_thread, sock, drain_timeout_s=drain_timeout)
    finally:
        if traces is not None:
            traces.close()
        if file is not None:
            file.close()
    if engine_thread.failure is not None:
        raise typer.Exit(1)


def check_role(role: Role, prefill: str | None, port: int | None, host: str, key: str) -> list[tuple[str, int]]:
    """The addresses in `prefill`, if what is given of other engines makes sense. Raises ValueError."""
    if role == "decode" and prefill is None:
        raise ValueError("--role decode needs the prefill engines that it asks; give --prefill HOST:PORT")
    if role == "prefill" and port is None:
        raise ValueError("--role prefill needs a port at which decode engines ask it; give --peer-port 9000")
    if role != "decode" and prefill is not None:
        raise ValueError(f"--prefill is for --role decode, not {role}")
    if role != "prefill" and port is not None:
        raise ValueError(f"--peer-port is for --role prefill, not {role}")
    if host not in options.LOOPBACK and not key:
        raise ValueError(f"--peer-host {host} lets others than this machine's engines in; set STALLFREE_PEER_KEY (or --peer-key)")
    return [] if prefill is None else options.addresses(prefill, "--prefill")


def _print_card(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(card), flush=True)
        return
    from rich.console import Console
    from rich.panel import Panel

    from stallfree.executors.sampling import Sampling

    kv = f"{card['kv_blocks']:,} blocks of {card['block_size']} tokens; a sequence has at most {card['max_model_len']:,}"
    budget = "" if card["token_budget"] is None else f", {card['token_budget']} tokens an iteration"
    slo = "" if card["slo"] is None else f", {card['slo']}"
    sampling = ", ".join(f"{name} {value:g}" for name, value in card["sampling"].items() if value != getattr(Sampling(), name))
    lines = {
        "model": f"{card['model']} ({card['weights']})",
        "KV cache": kv,
        "policy": f"{card['policy']}{budget}{slo}",
        **({} if card["slo_basis"] is None else {"target": str(card["slo_basis"])}),
        **({"sampling": f"{sampling}, unless a request says otherwise"} if sampling else {}),
        **({} if card["role"] == "both" else {"role": f"{card['role']}, {ROLES[str(card['role'])]} {card['peers']}"}),
        "URL": f"{card['url']}/v1",
        "live page": f"{card['url']}/",
    }
    body = "\n".join(f"[bold]{key:<11}[/bold]{value}" for key, value in lines.items())
    console = Console()
    if not console.is_terminal:  # what reads a pipe finds each line whole
        console.width = max(console.width, 16 + max(map(len, lines.values())))
    console.print(Panel(body, title="stallfree", title_align="left", expand=False))
