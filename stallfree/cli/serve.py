"""`stallfree serve`: puts a server together from its options. It knows no routes and no scheduling."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from stallfree.cli import options, words
from stallfree.cli.front import Front, Logging, Web

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from stallfree.engine.assemble import Assembled
    from stallfree.server.service import Service
    from stallfree.server.tenants import Tenants

Role = Literal["both", "prefill", "decode"]
MOST_SHOWN = 5
"""Adapters whose names are on the card."""
ROLES = {"prefill": "asked at", "decode": "asks"}


@dataclass(frozen=True)
class Peering:
    """The options for KV transfers with other engines."""

    role: Annotated[Role, typer.Option(help="Prefill for others, let others prefill (decode), or neither (both).")] = "both"
    prefill: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,...", help="Prefill engines that an engine of role decode asks, in turn.")
    ] = None
    transfer_kv: Annotated[
        Literal["same", "u8", "u4"],
        typer.Option(help="KV on its way from prefill to decode: as it is, or with 8 or 4 bits a number; the same on both sides."),
    ] = "same"
    peer_port: Annotated[
        int | None,
        typer.Option(help="Port at which decode engines ask an engine of role prefill; 0 is any free one.", min=0, max=65535),
    ] = None
    peer_host: Annotated[str, typer.Option(help="Address of --peer-port; any but 127.0.0.1 needs a --peer-key.")] = "127.0.0.1"
    peer_key: Annotated[
        str, typer.Option(envvar="STALLFREE_PEER_KEY", help="Secret that engines must share.", show_envvar=True)
    ] = ""

    def addresses(self) -> list[tuple[str, int]]:
        """The addresses of the prefill engines to ask. Raises ValueError for options that contradict each other."""
        if self.role == "decode" and self.prefill is None:
            raise ValueError("--role decode needs the prefill engines that it asks; give --prefill HOST:PORT")
        if self.role == "prefill" and self.peer_port is None:
            raise ValueError("--role prefill needs a port at which decode engines ask it; give --peer-port 9000")
        if self.role != "decode" and self.prefill is not None:
            raise ValueError(f"--prefill is for --role decode, not {self.role}")
        if self.role != "prefill" and self.peer_port is not None:
            raise ValueError(f"--peer-port is for --role prefill, not {self.role}")
        if self.role == "both" and self.transfer_kv != "same":
            raise ValueError("--transfer-kv is for --role prefill or decode, not both")
        if self.peer_host not in options.LOOPBACK and not self.peer_key:
            remedy = "set STALLFREE_PEER_KEY (or --peer-key)"
            raise ValueError(f"--peer-host {self.peer_host} lets in engines of other machines; {remedy}")
        return [] if self.prefill is None else options.addresses(self.prefill, "--prefill")


@words.spread()
def serve(
    served: options.Served,
    front: Front,
    peering: Peering,
    web: Web,
    logging: Logging,
    tenants: options.TenantsFile = None,
    share_prefixes: options.SharePrefixes = False,
    admin_key: options.AdminKey = None,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get to finish after SIGTERM.", min=0)] = 30,
    kv_save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep cached prefixes over a restart: read from this file at the start, and written to it at the end.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Write a JSON line for every iteration to this file.")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="OpenTelemetry collector that gets a trace of every request, such as http://127.0.0.1:4318.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Serve a model over HTTP, OpenAI-compatible, until SIGTERM or Ctrl-C."""
    from stallfree.cli import outputs
    from stallfree.engine.assemble import Options, assemble
    from stallfree.engine.recording import RecordFile
    from stallfree.engine.saved_kv import check
    from stallfree.parsers import formats
    from stallfree.server.app import create_app
    from stallfree.server.keys import Keys
    from stallfree.server.run import Hangups, run
    from stallfree.server.traces import exporter_to
    from stallfree.transfer.terms import address

    addresses = peering.addresses()
    outputs.check(record, "--record")
    if kv_save is not None:
        check(kv_save)
    names, origins, tls = options.names(front.served_model_name), web.origins(), web.tls()
    keys = options.keys(front.host, front.api_key, front.api_key_file, tenants=tenants)
    sharing = options.tenants(tenants, keys, served.slo, share_prefixes=share_prefixes)
    admin = Keys.of(admin_key)
    if front.tool_parser is not None:
        formats.named(front.tool_parser)
    logging.configure()
    sock, peer_sock = _bound(front, peering)  # before the model loads, so that a port in use costs no time
    exporter = None if otlp_endpoint is None else exporter_to(otlp_endpoint)
    with ExitStack() as stack:
        hangups = None if tenants is None else stack.enter_context(Hangups(sharing.reload))
        file = None if record is None else stack.enter_context(closing(RecordFile(record)))
        assembled = assemble(
            Options(**vars(served)),
            fingerprints=file is not None,
            say=lambda line: typer.echo(line, err=True),
            progress=options.progress,
        )
        service = _service(assembled, front, sharing, names or (assembled.name,), served.policy, exporter)
        if service.traces is not None:
            stack.enter_context(closing(service.traces))
        saved_blocks = 0 if kv_save is None else _keep(assembled, kv_save)
        if file is not None:
            file.begin(replace(assembled.run, saved_blocks=saved_blocks))
            service.observers.append(lambda step, _: file.write(step))
        _peer(service, assembled, addresses, peer_sock, peering)
        url = f"{'http' if tls is None else 'https'}://{address(*sock.getsockname()[:2])}"
        _print_card(_card(assembled, service, peering, url, peer_sock), as_json)
        service.start_helpers()
        app = create_app(service, keys=sharing, admin=admin, allow_origins=origins, log_requests=logging.log_requests)
        run(app, service.thread, sock, drain_timeout_s=drain_timeout, tls=tls, hangups=hangups)
    if service.thread.failure is not None:
        raise typer.Exit(1)


def _service(
    assembled: Assembled, front: Front, tenants: Tenants, names: tuple[str, ...], policy: str, exporter: SpanExporter | None
) -> Service:
    from stallfree.server.service import Service

    return Service(
        assembled.engine,
        names[0],
        policy=policy,
        slo=assembled.slo,
        classes=assembled.classes,
        tenants=tenants,
        max_queue=front.max_queue,
        serve_late=front.on_late == "serve",
        exporter=exporter,
        sanitize_control_tokens=front.sanitize_control_tokens,
        aliases=names[1:],
        tool_format=front.tool_parser,
        library=assembled.library,
    )


def _keep(assembled: Assembled, file: Path) -> int:
    """Let cached prefixes come back from `file`, and be written to it at the end. Returns the number of blocks that are back."""
    from stallfree.engine.saved_kv import SavedKV

    saved = SavedKV(file, assembled.engine, assembled.identity)
    restored = saved.restore()
    typer.echo(restored.note, err=True)
    assembled.engine.closing = saved.close
    return restored.blocks


def _peer(
    service: Service, assembled: Assembled, addresses: list[tuple[str, int]], peer_sock: socket.socket | None, peering: Peering
) -> None:
    """Let the engines at `addresses` prefill, or prefill for the engines that connect to `peer_sock`."""
    from stallfree.transfer.terms import Terms

    if peering.role == "both":
        return
    terms = Terms.of(assembled.engine.executor, assembled.identity, peering.transfer_kv)
    if addresses:
        service.ask(addresses, terms, peering.peer_key)
    if peer_sock is not None:
        service.serve(peer_sock, terms, peering.peer_key)


def _bound(front: Front, peering: Peering) -> tuple[socket.socket, socket.socket | None]:
    """The socket for clients, and one for other engines if this one prefills for them."""
    from stallfree.server.run import PortError, bind

    sock = bind(front.host, front.port)
    try:
        return sock, None if peering.peer_port is None else bind(peering.peer_host, peering.peer_port, "peer-")
    except PortError:
        sock.close()
        raise


def _card(assembled: Assembled, service: Service, peering: Peering, url: str, peer_sock: socket.socket | None) -> dict[str, Any]:
    """Facts about a server, which it prints when it starts."""
    from stallfree.transfer.terms import address

    capacity, ledger = service.engine.executor.capacity, service.engine.scheduler.ledger
    return {
        "model": service.name,
        "names": list(service.names),
        "weights": assembled.weights,
        "kv_blocks": capacity.num_blocks,
        "block_size": capacity.block_size,
        "host_kv_blocks": assembled.run.host_blocks,
        "max_model_len": ledger.max_len,
        "policy": service.live.policy,
        "slo": None if assembled.slo is None else str(assembled.slo),
        "slo_basis": assembled.slo_basis or None,
        "classes": {name: str(slo) for name, slo in service.classes.items() if name},
        "sampling": service.sampling,
        "adapters": list(assembled.library.named),
        "speculation": assembled.speculation or None,
        "token_budget": getattr(service.engine.scheduler.policy, "token_budget", None),
        "url": url,
        "role": peering.role,
        "peers": peering.prefill if peer_sock is None else address(*peer_sock.getsockname()[:2]),
    }


def _shortened(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    shown, more = names[:MOST_SHOWN], len(names) - MOST_SHOWN
    return ", ".join(shown) + (f" and {more:,} more" if more > 0 else "")


def _print_card(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(card), flush=True)
        return
    from rich.console import Console
    from rich.panel import Panel

    from stallfree.executors.sampling import Sampling

    held = f"{card['kv_blocks']:,} " + ("tokens" if card["block_size"] == 1 else f"blocks of {card['block_size']} tokens")
    kv = f"{held}; a sequence has at most {card['max_model_len']:,}"
    budget = "" if card["token_budget"] is None else f", {card['token_budget']} tokens an iteration"
    slo = "" if card["slo"] is None else f", {card['slo']}"
    sampling = ", ".join(f"{name} {value:g}" for name, value in card["sampling"].items() if value != getattr(Sampling(), name))
    lines = {
        "model": f"{card['model']} ({card['weights']})",
        **({"also named": ", ".join(card["names"][1:])} if card["names"][1:] else {}),
        "KV cache": kv,
        **({"host memory": f"{card['host_kv_blocks']:,} more blocks of cached prefixes"} if card["host_kv_blocks"] else {}),
        "policy": f"{card['policy']}{budget}{slo}",
        **({"classes": "; ".join(f"{name}: {slo}" for name, slo in card["classes"].items())} if card["classes"] else {}),
        **({} if card["slo_basis"] is None else {"target": str(card["slo_basis"])}),
        **({"sampling": f"{sampling}, unless a request says otherwise"} if sampling else {}),
        **({"adapters": _shortened(card["adapters"])} if card["adapters"] else {}),
        **({} if card["speculation"] is None else {"guesses": card["speculation"]}),
        **({} if card["role"] == "both" else {"role": f"{card['role']}, {ROLES[str(card['role'])]} {card['peers']}"}),
        "URL": f"{card['url']}/v1",
        "live page": f"{card['url']}/",
    }
    body = "\n".join(f"[bold]{key:<11}[/bold]{value}" for key, value in lines.items())
    console = Console()
    if not console.is_terminal:  # a program that reads a pipe gets unbroken lines
        console.width = max(console.width, 16 + max(map(len, lines.values())))
    console.print(Panel(body, title="stallfree", title_align="left", expand=False))
