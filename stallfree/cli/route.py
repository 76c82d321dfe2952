"""`stallfree route`: one address for several servers. It chooses each request's server and prefill engine, and has no engine."""

from typing import Annotated

import typer

from stallfree.cli import options


def route(
    decode: Annotated[str, typer.Option(metavar="URL,...", help="Servers that get the requests: of role decode, or any.")],
    prefill: Annotated[
        str | None, typer.Option(metavar="HOST:PORT,...", help="Prefill engines; each decode server must have them as --prefill.")
    ] = None,
    spill: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="While every prefill engine has more prompt tokens than this to compute, decode servers compute prompts.",
            min=0,
            show_default="never",
        ),
    ] = None,
    share_prefixes: Annotated[
        bool, typer.Option("--share-prefixes", help="The servers have this option too: a key's prompts may be cached for others.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.", min=0, max=65535)] = 8000,
    drain_timeout: Annotated[float, typer.Option(help="Seconds that requests get to finish after SIGTERM.", min=0)] = 30,
) -> None:
    """Pass each request on to the server that forecasts the earliest first token, until SIGTERM or Ctrl-C.

    Servers without a forecast get requests by how few they have. The servers check API keys.
    """
    from stallfree.server.route import Router, create_router
    from stallfree.server.run import bind, run
    from stallfree.transfer.terms import address

    peers = [] if prefill is None else options.addresses(prefill, "--prefill")
    if spill is not None and not peers:
        raise ValueError("--spill needs prefill engines; give them as --prefill HOST:PORT")
    if host not in options.LOOPBACK:
        warning = f"all who can reach --host {host} can use the servers; start these with an API key, which they check"
        typer.echo(f"warning: {warning}", err=True)
    router = Router(decode.split(","), [address(*peer) for peer in peers], spill, share_prefixes=share_prefixes)
    sock = bind(host, port)
    typer.echo(f"http://{address(*sock.getsockname()[:2])}/v1 -> {decode}; prefill: {prefill or 'theirs'}")
    run(create_router(router), router, sock, drain_timeout_s=drain_timeout)
