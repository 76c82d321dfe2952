"""`stallfree explain`: prints a recorded run in words. `metrics.explain` writes the words."""

from typing import Annotated

import typer

from stallfree.cli import options


def explain(
    file: options.Recorded,
    step: Annotated[int | None, typer.Option(help="Explain this iteration.", show_default=False)] = None,
    request: Annotated[
        str | None, typer.Option(help="Explain this request: the id of its answer, or the beginning of the id.", show_default=False)
    ] = None,
) -> None:
    """Tell what the scheduler did and why: in the whole run, in one step, or to one request."""
    from stallfree.engine.recording import load
    from stallfree.metrics.explain import Explained
    from stallfree.perf.fitted import Fitted

    if step is not None and request is not None:
        raise ValueError("--step and --request ask for two explanations; give one of them")
    run, records = load(file)
    explained = Explained(run, records, None if run.cost is None else Fitted.from_state(run.cost))
    lines = (
        explained.step(step)
        if step is not None
        else explained.request(request.rpartition("cmpl-")[2])  # answers have chatcmpl-... or cmpl-...
        if request is not None
        else explained.on_the_whole()
    )
    for line in lines:
        typer.echo(line)
