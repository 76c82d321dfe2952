"""`stallfree explain`: a recorded run in words."""

from typing import Annotated

import typer

from stallfree.cli import options


def explain(
    file: options.Recorded,
    step: Annotated[int | None, typer.Option(help="Explain this iteration.", show_default=False)] = None,
    request: Annotated[
        str | None, typer.Option(help="Explain this request's life; its answer's id, or the beginning of it.", show_default=False)
    ] = None,
) -> None:
    """Say what the scheduler did and why: on the whole, in one step, or to one request."""
    from stallfree.engine.recording import load
    from stallfree.metrics.explain import Explained

    if step is not None and request is not None:
        raise ValueError("--step and --request ask for two explanations; give one of them")
    explained = Explained(*load(file))
    lines = (
        explained.step(step)
        if step is not None
        else explained.request(request.rpartition("cmpl-")[2])  # as answers give it: chatcmpl-... or cmpl-...
        if request is not None
        else explained.on_the_whole()
    )
    for line in lines:
        typer.echo(line)
