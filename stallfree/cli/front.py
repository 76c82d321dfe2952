"""The options of a server that its clients and its operator notice, in groups. It serves nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stallfree.cli import options

if TYPE_CHECKING:
    from stallfree.server.keys import Keys
    from stallfree.server.tls import Tls


@dataclass(frozen=True)
class Front:
    """The options of a server that clients notice."""

    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network of this machine.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.", min=0, max=65535)] = 8000
    api_key: options.ServersKey = None
    api_key_file: options.KeyFile = None
    served_model_name: options.ServedNames = None
    sanitize_control_tokens: options.Sanitize = False
    tool_parser: options.ToolParser = None
    max_queue: Annotated[int, typer.Option(help="Most waiting requests; one more gets status 429.", min=1)] = 1024
    on_late: options.OnLate = "refuse"

    def keys(self) -> Keys:
        """The keys that open the server. Raises ValueError for keys that cannot be read. See `options.keys` for its warnings."""
        return options.keys(self.host, self.api_key, self.api_key_file)


@dataclass(frozen=True)
class Web:
    """The options for who may connect, and how: encryption, and pages of other sites."""

    tls_certificate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Serve https with this certificate (PEM, its chain below it).", show_default="http"),
    ] = None
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The certificate's private key (PEM, not encrypted).", show_default="none"),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let pages of this site call the server from a browser (CORS); * is all. May be given several times.",
            show_default="none",
        ),
    ] = None

    def origins(self) -> list[str]:
        """The sites whose pages may call the server. Raises ValueError for an entry that is no origin."""
        from stallfree.server import origins

        allowed = self.allow_origin or []
        origins.check(allowed)
        return allowed

    def tls(self) -> Tls | None:
        """The certificate and its key, if the server is to use them. Raises ValueError if they cannot be used."""
        from stallfree.server.tls import Tls

        return Tls.of(self.tls_certificate, self.tls_key)


@dataclass(frozen=True)
class Logging:
    """The options of the server's log, which goes to stderr."""

    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log a line for every HTTP request, when it ends.")] = False
    log_format: Annotated[Literal["text", "json"], typer.Option(help="How log lines are written.")] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="The least severe messages that are logged.")
    ] = "warning"

    def configure(self) -> None:
        """Set up the log of this process."""
        from stallfree.server import logs

        logs.configure(self.log_level, self.log_format)
