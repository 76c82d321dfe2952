"""The `stallfree` command. Each command has a file in this folder; errors become one line for the user here.

Commands import what they need when they run, so that `--help` is quick. This module does not know what they do.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stallfree import __version__
from stallfree.cli import (
    bench,
    calibrate,
    chat,
    demo,
    deploy,
    doctor,
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
    vllm,
    words,
)


class Commands(TyperGroup):
    """The group of all commands. It adds the value to an error about an option's value."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            from pydantic import ValidationError

            if isinstance(error.__cause__, ValidationError):
                value = repr(error.__cause__.errors()[0]["input"])
                error.message += "" if value in error.message else f", not {value}"
            raise


app = typer.Typer(
    cls=Commands,
    help="An LLM serving engine whose token streams never stall behind someone else's prompt.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text wraps at any width; boxes cut names that do not fit
    context_settings={"max_content_width": 120},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stallfree {__version__}")
        raise typer.Exit


@app.callback()
def stallfree(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.", show_default=False)
    ] = False,
) -> None:
    pass


COMMANDS: dict[str, tuple[Any, str]] = {
    "serve": (serve.serve, "Serve a model over HTTP, OpenAI-compatible."),
    "vllm": (vllm.app, "vLLM, with the slo policy as its scheduler."),
    "route": (route.route, "One address in front of several servers."),
    "chat": (chat.chat, "Talk to a model in the terminal."),
    "generate": (generate.generate, "Complete one prompt."),
    "models": (models.app, "List the cached models, or fetch one."),
    "calibrate": (calibrate.calibrate, "Time what iterations cost on this machine."),
    "doctor": (doctor.doctor, "What this machine is, what is chosen on it, and why."),
    "explain": (explain.explain, "A recorded run in words: what was late, and why."),
    "replay": (replay.replay, "Replay a recorded run, unchanged or changed."),
    "bench": (bench.app, "Measure servers under load."),
    "perf": (perf.app, "The price of an iteration on GPUs."),
    "simulate": (simulate.simulate, "Simulate a load on GPUs that you need not have."),
    "capacity": (simulate.capacity, "The highest rate of each configuration, simulated."),
    "compare": (simulate.compare, "Configurations side by side, simulated."),
    "plan": (plan.plan, "Co-locate or disaggregate, for your load."),
    "reproduce": (reproduce.app, "Simulate a paper's evaluation beside its results."),
    "deploy": (deploy.deploy, "Replicas on a Ray cluster."),
    "demo": (demo.demo, "A burst against a fixed budget and a target, live."),
    "list": (listing.listing, "Policies, executors, hardware, models."),
}
"""Each command, or group of commands, with its line in the list of all commands."""

for name, (command, line) in COMMANDS.items():
    if isinstance(command, typer.Typer):
        for each in command.registered_commands:
            each.callback = words.everywhere(each.callback)  # type: ignore[arg-type]  # a command has one
        alone = command.registered_callback
        if alone is not None and alone.callback is not None and command.info.invoke_without_command is True:
            alone.callback = words.everywhere(alone.callback)
        app.add_typer(command, name=name, short_help=line)
    else:
        app.command(name, short_help=line)(words.everywhere(command))


def main() -> None:
    """Run the command line. An error that the user can mend becomes one line and exit code 1; a bug, a traceback."""
    try:
        app()
    except (ValueError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
