"""`stallfree models`: lists cached models; `stallfree models pull` fetches one. `checkpoint.fetch` knows the cache."""

import json
from typing import Annotated

import typer

from stallfree.cli import options

app = typer.Typer(invoke_without_command=True, help="List the cached models, or pull one.", rich_markup_mode=None)


@app.callback()
def models(context: typer.Context, as_json: options.Json = False) -> None:
    """List the models that are cached on this machine."""
    if context.invoked_subcommand is not None:
        return
    from stallfree.checkpoint.fetch import cached

    models = cached()
    if as_json:
        typer.echo(json.dumps([{"name": c.name, "bytes": c.bytes, "path": str(c.path)} for c in models]))
        return
    if not models:
        typer.echo("no model is cached; `stallfree models pull` fetches the embedded one")
        return
    from stallfree.cli.measuring import print_grid

    print_grid([("model", "size", "path"), *((c.name, f"{c.bytes / 1e6:.0f} MB", str(c.path)) for c in models)], numbers=False)


@app.command()
def pull(
    model: Annotated[str | None, typer.Argument(help="Hub id. Without one: the embedded model.")] = None,
    as_json: options.Json = False,
) -> None:
    """Fetch a model into the cache, and print its path."""
    from stallfree.checkpoint.fetch import locate

    path = locate(model, lambda line: typer.echo(line, err=True))
    typer.echo(json.dumps({"path": str(path)}) if as_json else path)
