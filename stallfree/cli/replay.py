"""`stallfree replay`: runs a recorded run through the scheduler again, unchanged or with another policy, SLO or budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.cli import options

if TYPE_CHECKING:
    from stallfree.core.classes import Classes
    from stallfree.core.record import StepRecord
    from stallfree.core.slo import Slo


def replay(
    file: options.Recorded,
    policy: Annotated[str | None, typer.Option(help="What if the policy had been this?", show_default="the recorded one")] = None,
    slo: Annotated[str | None, typer.Option(help="What if these had been the targets?", show_default="the recorded ones")] = None,
    token_budget: Annotated[int | None, typer.Option(help="What if this had been the budget?", show_default="the policy's")] = None,
    policy_option: options.PolicyOption = None,
    as_json: options.Json = False,
) -> None:
    """Replay a recorded run. Without options: check that the scheduler decides the same in every iteration; exit code 1 if not.

    With options: simulate the same requests in virtual time. A model fitted to the record gives the times of iterations. The table
    also shows the recorded run and its simulation, whose difference is the model's error.
    """

    from stallfree import policies
    from stallfree.cli.measuring import print_reports
    from stallfree.core.slo import Slo
    from stallfree.engine.recording import load
    from stallfree.metrics.report import report
    from stallfree.metrics.timeline import timelines
    from stallfree.sim.replay import Machine, difference, policy_of, what_if

    run, records = load(file)
    if not records:
        raise ValueError(f"{file} holds no iterations: the engine got no request while it was recorded")
    if policy is None and slo is None and token_budget is None and not policy_option:
        first = difference(run, records)
        if as_json:
            typer.echo(json.dumps({"iterations": len(records), "identical": first is None, "difference": first and asdict(first)}))
        elif first is None:
            typer.echo(f"{len(records)} iterations under policy {run.policy}: identical decisions in each")
        if first is not None:
            raise ValueError(f"{first}; the policy, or the scheduler, is not the one that was recorded")
        return
    machine = Machine(records, overlap=run.capacity.overlap)
    targets = Slo.parse(slo) if slo is not None else run.targets
    changed = {} if policy is not None else dict(run.options or {})
    if slo is not None:
        changed.pop("follow", None)  # only a default target follows
    changed |= policies.options(policy or run.policy, token_budget, policy_option)
    runs = {
        "recorded": records,
        "the same, simulated": what_if(run, records, machine, run.policy, getattr(policy_of(run), "slo", None), run.options or {}),
        "what if": what_if(run, records, machine, policy or run.policy, targets, changed),
    }
    judged_by = _classes(targets, records)
    reports = {name: report(timelines(steps).values(), judged_by) for name, steps in runs.items()}
    median, p90 = machine.errors.median, machine.errors.p90
    if as_json:
        typer.echo(json.dumps({"model_error": {"median": median, "p90": p90}, "runs": {n: asdict(r) for n, r in reports.items()}}))
        return
    typer.echo(f"what if: policy {policy or run.policy}, {targets or 'no SLO'}{f', {token_budget} tokens' if token_budget else ''}")
    print_reports(reports)
    typer.echo(f"iteration times: a model fitted to the record, error {median:.1%} at the median, {p90:.1%} at p90")


def _classes(targets: Slo | None, records: Sequence[StepRecord]) -> Classes:
    """What requests are judged by: `targets`, or those of their class as recorded."""
    from stallfree.core.classes import Classes
    from stallfree.core.slo import Slo

    own = {arrived.id: arrived.slo for step in records for arrived in step.arrived}
    named = {name: Slo.parse(own[id]) for step in records for id, name in step.classes if own[id]}
    return Classes({"": targets or Slo()} | named)
