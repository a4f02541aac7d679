"""Submit: check everything, plan, commit the job, and start its workers; or resume what is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from batchinfer.connectors.storage import open_store, probe
from batchinfer.connectors.types import ObjectStore
from batchinfer.jobs.backends.local import LocalWorkers
from batchinfer.jobs.backends.local import start_workers as start_local_workers
from batchinfer.jobs.budget import asked_cap, slot_ns
from batchinfer.jobs.folder import JobFolder, new_nonce
from batchinfer.jobs.frames import FrameFile, frame_file, frame_spec
from batchinfer.jobs.identity import check_same_budget, check_same_input, check_same_job, check_same_model
from batchinfer.jobs.inspection import inspect_model
from batchinfer.jobs.job import Job
from batchinfer.jobs.pilot import check_rows
from batchinfer.jobs.placement import Placed, check_placeable, place_workers, placed_options
from batchinfer.jobs.plan import Plan, find_input, make_plan
from batchinfer.jobs.prediction import Prediction, predict_by_pilot
from batchinfer.jobs.records import Control, JobRecord
from batchinfer.jobs.retry import is_complete
from batchinfer.jobs.rounds import RoundPlan
from batchinfer.jobs.spec import FailuresSpec, JobSpec, parse_spec
from batchinfer.jobs.spec_source import load_spec, located
from batchinfer.jobs.status import runs_here
from batchinfer.jobs.types import JobError


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that is in its folder: ``plan`` is None where it was there before; ``complete`` where nothing
    is left to do; ``prediction`` is what a pilot said before it was committed."""

    spec: JobSpec
    job: Job
    plan: Plan | None
    complete: bool
    prediction: Prediction | None = None


def plan(
    spec: str | Path | Mapping[str, Any] | JobSpec,
    overrides: Sequence[str] = (),
    pilot: int | None = None,
    seed: int = 0,
) -> tuple[Plan, Prediction | None]:
    """What a job would take: its plan, and with ``pilot`` rows answered first, chosen by ``seed``, what
    they predict. Arguments and errors are those of :func:`submit`."""
    check_rows(pilot)
    made = make_plan(located(load_spec(spec, overrides)))
    return made, None if pilot is None else predict_by_pilot(made, pilot, seed)


def submit(
    spec: str | Path | Mapping[str, Any] | JobSpec,
    overrides: Sequence[str] = (),
    pilot: int | None = None,
    input: object = None,
) -> Job:
    """Submit a job, or resume it, and start its workers, which outlive this process.

    ``spec`` is a file, a URI, a mapping or a JobSpec; ``overrides`` are ``a.b=value``. A new job is tried
    with ``pilot`` rows first, and what they predict is kept with it (``Job.prediction``). ``input`` is a
    pyarrow table, a pandas or polars frame, or whatever offers an Arrow stream, instead of ``input.uri``:
    it is kept in the job's folder, and the same frame again resumes the job. Raises JobError, ModelError
    or StorageError, one sentence each, before anything is spent.
    """
    if input is None:
        submitted = commit_job(load_spec(spec, overrides), pilot)
    else:
        with frame_file(input) as frame:
            submitted = commit_job(frame_spec(spec, overrides, frame.digest), pilot, frame)
    if not submitted.complete:
        begin_work(submitted, attached=False)
    return submitted.job


def begin_work(submitted: Submitted, attached: bool) -> LocalWorkers | Placed:
    """Start the workers that the spec asks for, here or at its service, less those there already.

    Attached ones of this machine end with this process, all others outlive it.
    """
    if submitted.spec.workers.backend == "local":
        return start_workers(submitted, attached)
    return place_workers(submitted.spec, submitted.job.uri)


def start_workers(submitted: Submitted, attached: bool) -> LocalWorkers:
    """Start the workers that the spec asks for on this machine, less those of this job that run on it.

    Attached ones end with this process, others outlive it.
    """
    spec, workers = submitted.spec, submitted.spec.workers
    budget = asked_cap(spec.budget.max_usd, spec.budget.max_worker_hours)
    # Those that began before the job had a budget are about to leave.
    stay = [record for record in submitted.job.workers() if record.bought or not budget.limited]
    there = sum(runs_here(record) is True for record in stay)
    return start_local_workers(
        submitted.job.uri,
        max(0, workers.count - there),
        workers.gpus,
        spec.storage_options(),
        attached,
        workers.cpus,
    )


def retry_job(
    uri: str,
    codes: Collection[str] = (),
    workers: int | None = None,
    storage: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Submitted, RoundPlan]:
    """Begin a retry round of the job at ``uri`` (see ``Job.begin_retry``); starts no worker.

    Its workers are those that the last submit asked for, of its backend and with its options; ``workers``
    is how many are to be started, as many as then where it is None.
    """
    job = Job(uri, storage, before=())
    before = {worker.worker for worker in job.workers()}
    stored = job.record.spec
    asked = JobFolder(open_store(job.uri, storage)).read_control().placing or stored.get("workers", {})
    asked = {**asked, "count": workers} if workers else asked
    spec = parse_spec({**stored, "workers": asked}, f"the job in {job.uri}")
    _, plan = job.begin_retry(codes)
    return Submitted(spec, Job(uri, storage or spec.storage_options(), before), None, False), plan


def commit_job(spec: JobSpec, pilot: int | None = None, frame: FrameFile | None = None) -> Submitted:
    """Put the job into its folder, or find it there; starts nothing. A new job is first tried with
    ``pilot`` of its rows, and what they predict is kept with it; so is the ``frame`` that is its input.

    Raises JobError where the folder holds another job or something else, and for everything that
    ``make_plan`` sees.
    """
    check_rows(pilot)
    check_placeable(spec)
    spec = located(spec)
    store = open_store(spec.output.uri, spec.storage_options())
    folder = JobFolder(store)
    record, plan, prediction = folder.read_job(), None, None
    if record is None:
        _check_empty(store)
        probe(store)
        if frame is not None:
            folder.keep_input(frame.digest, frame.path)
        plan = make_plan(spec)
        if pilot is not None:
            prediction = predict_by_pilot(plan, pilot)
            folder.write_prediction(prediction.to_bytes())
        if not _create(folder, plan):
            plan = None  # somebody else submitted meanwhile: is it the same job?
        record = folder.read_job()
        assert record is not None
    complete = is_complete(folder, record)
    if plan is None:
        _check_same(folder, record, spec, complete)
        _append_changes(folder, record, spec)
    before = {worker.worker for worker, _ in folder.read_workers()}
    job = Job(folder.uri, spec.storage_options(), before)
    return Submitted(spec, job, plan, complete, prediction if plan is not None else None)


def _create(folder: JobFolder, plan: Plan) -> bool:
    """Store the plan, then the record that names it: the commit of the submit."""
    name = folder.write_plan(list(plan.shards))
    return folder.create_job(
        JobRecord(
            spec=plan.spec.model_dump(mode="json"),
            schema=plan.schema,
            input_schema=plan.input_schema,
            fingerprint=plan.fingerprint,
            plan=name,
            shards=len(plan.shards),
            rows=plan.rows,
            slot_ns=_slot_ns(plan.spec),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            nonce=new_nonce(),
        )
    )


def _slot_ns(spec: JobSpec) -> int:
    cap = asked_cap(spec.budget.max_usd, spec.budget.max_worker_hours)
    return slot_ns(cap, spec.price.usd_per_hour, spec.workers.count)


def _check_empty(store: ObjectStore) -> None:
    """Whatever reads the job's folder must find its answers and nothing else."""
    for info in store.list(""):
        if info.key.endswith((".parquet", ".parq", ".pq")):
            raise JobError(
                f"output.uri is {store.root}, but {info.key} is there already and no job: choose an "
                "empty folder, so that readers of the folder see this job's rows only"
            )


def _check_same(folder: JobFolder, record: JobRecord, spec: JobSpec, complete: bool) -> None:
    """Refuse to resume a job that is not the same; one that is complete needs its input no more."""
    stored, control = parse_spec(record.spec, f"the job in {folder.uri}"), folder.read_control()
    check_same_job(folder.uri, stored, spec)
    check_same_budget(folder.uri, stored, control, spec)
    if complete:
        return
    _check_limit_raised(folder.uri, stored, control, spec)
    planned = [split.file for shard in folder.read_plan(record.plan) for split in shard.splits]
    check_same_input(folder.uri, planned, find_input(spec))
    check_same_model(folder.uri, record.fingerprint, inspect_model(spec).fingerprint, spec.model.source)


def _check_limit_raised(uri: str, stored: JobSpec, control: Control, spec: JobSpec) -> None:
    """Refuse to go on with a job that stopped itself, as it would stop again, unless more may fail."""
    if control.state == "stop":
        before = stored.failures if control.failures is None else FailuresSpec(**control.failures)
        now = spec.failures
        if now.max_share <= before.max_share and now.after_rows <= before.after_rows:
            raise JobError(f"the job at {uri} has stopped itself: {control.message}")


def _append_changes(folder: JobFolder, record: JobRecord, spec: JobSpec) -> None:
    """Say what may change between submits: go on after a cancel, workers and price."""
    stored = parse_spec(record.spec)
    current = folder.read_control()
    wanted = replace(
        current,
        state="run",
        failures=spec.failures.model_dump() if spec.failures != stored.failures else None,
        slot_ns=current.slot_ns or _slot_of_new_budget(stored, spec),
        message="",
        placed={**current.placed, **(placed_options(spec) if spec.workers != stored.workers else {})},
        placing=spec.workers.model_dump(mode="json") if spec.workers != stored.workers else None,
        workers=spec.workers.count if spec.workers.count != stored.workers.count else None,
        usd_per_hour=spec.price.usd_per_hour if spec.price != stored.price else None,
        max_usd=_changed(stored.budget.max_usd, spec.budget.max_usd),
        max_worker_hours=_changed(stored.budget.max_worker_hours, spec.budget.max_worker_hours),
    )
    if wanted != current:

        def change(latest: Control) -> Control:
            return replace(wanted, nonce=latest.nonce)

        folder.append_control(change)


def _slot_of_new_budget(stored: JobSpec, spec: JobSpec) -> int | None:
    """The slot of a job that began without a budget and now gets one."""
    began = asked_cap(stored.budget.max_usd, stored.budget.max_worker_hours)
    asked = asked_cap(spec.budget.max_usd, spec.budget.max_worker_hours)
    if began.limited or not asked.limited:
        return None
    return slot_ns(asked, stored.price.usd_per_hour, spec.workers.count)


def _changed(stored: float | None, asked: float | None) -> float | None:
    return None if asked == stored else asked
