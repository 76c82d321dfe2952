"""The `stallfree` command: one file per command here, and one place where errors become a line for the user.

Commands import what they need when they run, so that `--help` is quick.
"""

import sys

import typer

from stallfree.cli import (
    bench,
    calibrate,
    chat,
    demo,
    deploy,
    explain,
    generate,
    listing,
    models,
    perf,
    plan,
    replay,
    reproduce,
    route,
    serve,
    simulate,
)

app = typer.Typer(
    help="An LLM serving engine whose token streams never stall behind someone else's prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("serve")(serve.serve)
app.command("route")(route.route)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.add_typer(models.app, name="models")
app.command("calibrate")(calibrate.calibrate)
app.command("explain")(explain.explain)
app.command("replay")(replay.replay)
app.add_typer(bench.app, name="bench")
app.add_typer(perf.app, name="perf")
app.command("simulate")(simulate.simulate)
app.command("capacity")(simulate.capacity)
app.command("compare")(simulate.compare)
app.command("plan")(plan.plan)
app.add_typer(reproduce.app, name="reproduce")
app.command("deploy")(deploy.deploy)
app.command("demo")(demo.demo)
app.command("list")(listing.listing)


def main() -> None:
    """Run the command line. What the user can mend ends in one line on standard error and exit code 1; a bug in a traceback."""
    try:
        app()
    except (ValueError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
