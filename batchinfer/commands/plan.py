"""``batchinfer plan``: what a job would take."""

from __future__ import annotations

from batchinfer.commands.frame import AsJson, Overrides, SpecFile, command, emit, say


@command
def plan(spec: SpecFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Rows, tokens, shards, time and price of a job; spends nothing."""
    from batchinfer.jobs.plan import make_plan, plan_values
    from batchinfer.jobs.spec_source import load_spec, located
    from batchinfer.jobs.view import plan_lines

    made = make_plan(located(load_spec(spec, overrides or ())))
    for line in plan_lines(made):
        say(line)
    if as_json:
        emit(plan_values(made))
