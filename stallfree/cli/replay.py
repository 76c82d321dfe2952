"""`stallfree replay`: a recorded run through the scheduler again, unchanged or with another policy, SLO or budget."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from stallfree.cli import options


def replay(
    file: options.Recorded,
    policy: Annotated[str | None, typer.Option(help="What if it had been this policy?", show_default="the recorded one")] = None,
    slo: Annotated[str | None, typer.Option(help="What if these had been the targets?", show_default="the recorded ones")] = None,
    token_budget: Annotated[int | None, typer.Option(help="What if this had been the budget?", show_default="the policy's")] = None,
    policy_option: options.PolicyOption = None,
    as_json: options.Json = False,
) -> None:
    """Replay a recorded run. Without options: whether the scheduler would decide the same in every iteration; exit code 1 if not.

    With options: what would have become of the same requests, in virtual time, with iterations that take what a model fitted to
    the record says. Beside it stand the recorded run itself and, to see how far the model can be believed, its simulation.
    """

    from stallfree import policies
    from stallfree.cli.measuring import print_grid
    from stallfree.core.slo import Slo
    from stallfree.engine.recording import load
    from stallfree.metrics.report import report, table
    from stallfree.metrics.timeline import timelines
    from stallfree.sim.replay import Machine, difference, policy_of, what_if

    run, records = load(file)
    if not records:
        raise ValueError(f"{file} holds no iterations; nothing was asked of the engine while it was written")
    if policy is None and slo is None and token_budget is None and not policy_option:
        found = difference(run, records)
        if as_json:
            typer.echo(json.dumps({"iterations": len(records), "identical": found is None, "difference": found and asdict(found)}))
        elif found is None:
            typer.echo(f"{len(records)} iterations under policy {run.policy}: identical decisions in each")
        if found is not None:
            raise ValueError(f"{found}; the policy, or the scheduler, is not the one that was recorded")
        return
    machine = Machine(records, overlap=run.capacity.overlap)
    targets = Slo.parse(slo) if slo is not None else run.targets
    own = {} if policy is not None else dict(run.options or {})
    if slo is not None:
        own.pop("follow", None)  # as the default target does
    given = own | policies.options(policy or run.policy, token_budget, policy_option)
    runs = {
        "recorded": records,
        "the same, simulated": what_if(run, records, machine, run.policy, getattr(policy_of(run), "slo", None), run.options or {}),
        "what if": what_if(run, records, machine, policy or run.policy, targets, given),
    }
    reports = {name: report(timelines(made).values(), targets) for name, made in runs.items()}
    median, p90 = machine.errors.median, machine.errors.p90
    if as_json:
        typer.echo(json.dumps({"model_error": {"median": median, "p90": p90}, "runs": {n: asdict(r) for n, r in reports.items()}}))
        return
    typer.echo(f"what if: policy {policy or run.policy}, {targets or 'no SLO'}{f', {token_budget} tokens' if token_budget else ''}")
    print_grid(table(reports))
    typer.echo(f"iteration times: a model fitted to the record, error {median:.1%} at the median, {p90:.1%} at p90")
