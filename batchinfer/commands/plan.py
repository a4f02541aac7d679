"""``batchinfer plan``: what a job would take."""

from __future__ import annotations

from typing import Annotated

import typer

from batchinfer.commands.frame import AsJson, Overrides, SpecFile, command, emit, say

PilotRows = Annotated[
    int | None,
    typer.Option("--pilot", metavar="ROWS", help="Answer so many rows first, and predict from them."),
]


@command
def plan(
    spec: SpecFile,
    pilot: PilotRows = None,
    seed: Annotated[int, typer.Option(help="Chooses the pilot's rows.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Workers to plan for: workers.count.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Rows, tokens, shards, time and price of a job; spends nothing but a pilot's time on this machine."""
    from batchinfer.jobs.pilot import check_rows
    from batchinfer.jobs.plan import make_plan, plan_values
    from batchinfer.jobs.plan_view import plan_lines
    from batchinfer.jobs.prediction import predict_by_pilot, prediction_values
    from batchinfer.jobs.spec_source import load_spec, located

    check_rows(pilot)
    changes = list(overrides or ())
    if workers is not None:
        changes.append(f"workers.count={workers}")
    made = make_plan(located(load_spec(spec, changes)))
    prediction = None if pilot is None else predict_by_pilot(made, pilot, seed)
    for line in plan_lines(made, prediction):
        say(line)
    if as_json:
        predicted = None if prediction is None else prediction_values(prediction)
        emit({**plan_values(made), "prediction": predicted})
