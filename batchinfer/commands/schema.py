"""``batchinfer schema``: the job spec's JSON Schema."""

from __future__ import annotations

import json

from batchinfer.commands.frame import AsJson, command, emit


@command
def schema(as_json: AsJson = False) -> None:
    """The job spec's JSON Schema."""
    from batchinfer.jobs.spec import JobSpec

    document = JobSpec.model_json_schema()
    if as_json:
        emit(document)
    else:
        print(json.dumps(document, indent=2))
