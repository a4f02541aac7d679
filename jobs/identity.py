"""What makes two submits the same job, and what differs when they are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from batchinfer.connectors.types import InputFile
from batchinfer.jobs.records import Control
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.types import JobError

# Parts of a spec that may differ between submits of one job; what they change goes to its control.
CHANGEABLE = frozenset({"workers", "price", "budget", "failures"})


def check_same_job(uri: str, stored: JobSpec, asked: JobSpec) -> None:
    """Raise JobError, naming what differs, unless ``asked`` is the job that ``uri`` holds."""
    differences = list(_differences(stored.model_dump(mode="json"), asked.model_dump(mode="json")))
    if differences:
        path, before, now = differences[0]
        more = f" (and {', '.join(path for path, _, _ in differences[1:])})" if differences[1:] else ""
        raise JobError(
            f"{uri} holds another job: there {path} is {_short(before)}, here it is {_short(now)}{more}; "
            "choose another output.uri, or submit what was submitted before"
        )


def check_same_model(uri: str, stored: str, found: str, source: str) -> None:
    """Raise JobError where the model's content is no longer what the job was begun with."""
    if stored != found:
        raise JobError(
            f"{uri} holds a job begun with another content of the model {source} (fingerprint {stored}, "
            f"now {found}): bring that model back, or choose another output.uri"
        )


def check_same_input(uri: str, planned: Sequence[InputFile], found: Sequence[InputFile]) -> None:
    """Raise JobError, naming the file, where the input is no longer what was planned."""
    before = {file.uri: file for file in planned}
    now = {file.uri: file for file in found}
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            problem = f"{name} is gone"
        elif name not in before:
            problem = f"{name} was added"
        elif (before[name].size, before[name].etag) != (now[name].size, now[name].etag):
            problem = f"{name} was changed"
        else:
            continue
        raise JobError(
            f"the input is not what the job in {uri} was planned for: {problem} since; bring the input "
            "back, or choose another output.uri for a new job"
        )


def check_same_budget(uri: str, stored: JobSpec, control: Control, asked: JobSpec) -> None:
    """Raise JobError for a change of the budget by which it could no longer be kept: USD are counted by
    the price that the job began with, and a budget is never forgotten by mistake."""
    forgotten = all(value is None for _, value in asked.budget)
    for name, before in stored.budget:
        now = getattr(asked.budget, name)
        if forgotten and before is None:
            before = getattr(control, name)
        if now is not None and name == "max_usd" and stored.price.usd_per_hour is None:
            raise JobError(
                f"budget.max_usd is {now}, but the job at {uri} began without price.usd_per_hour: change "
                "budget.max_worker_hours instead"
            )
        if now is None and before is not None:
            raise JobError(
                f"budget.{name} is not set, but that of the job at {uri} is {before}: give a number, "
                "however large"
            )


def _differences(
    stored: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Paths whose values differ, with both values."""
    for key in dict.fromkeys((*stored, *asked)):
        path = f"{prefix}{key}"
        if path in CHANGEABLE:
            continue
        before, now = stored.get(key), asked.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from _differences(before, now, f"{path}.")
        elif before != now:
            yield path, before, now


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
