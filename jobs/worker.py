"""The worker: what every container, batch service and backend runs, on a job's address alone."""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import signal
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from batchinfer.connectors.batches import RowBatch
from batchinfer.connectors.readers import read_batches
from batchinfer.connectors.storage import open_store
from batchinfer.connectors.types import Split, StorageError, TransientStorageError
from batchinfer.engine.config import EngineConfig
from batchinfer.jobs.budget import Allowance, cap_of, job_slots
from batchinfer.jobs.clock import Clock, SystemClock
from batchinfer.jobs.columns import passed_columns
from batchinfer.jobs.engine_process import EngineProcess, Load
from batchinfer.jobs.events import LogFormat, log_event, log_to_stderr
from batchinfer.jobs.failure_limit import FailureLimit
from batchinfer.jobs.feeder import Work
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.health import show_life
from batchinfer.jobs.processes import (
    MEMORY_SHARE,
    PARENT,
    STORAGE,
    end_with_parent,
    process_started_ns,
)
from batchinfer.jobs.prometheus import MetricsFile
from batchinfer.jobs.prompts import compile_prompts, widest_sampling
from batchinfer.jobs.records import Bill, Control, JobRecord, WorkerRecord
from batchinfer.jobs.retry import last_round, round_shards
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.supervisor import EXIT_DONE, EXIT_JOB, EXIT_RETRY, EXIT_STOPPED, Pace, Supervisor
from batchinfer.jobs.types import JobError, Shard

logger = logging.getLogger(__name__)

# The protocol's times and sizes as JSON, by the names of Pace; for tests and for tuning.
PACE = "BATCHINFER_PACE"

ATTEMPTS = 12
DRAIN_SECONDS = 25.0


def run_worker(
    job_uri: str,
    usd_per_hour: float | None = None,
    index: int | None = None,
    log_format: LogFormat = LogFormat.TEXT,
    metrics_file: Path | None = None,
) -> int:
    """Work on the job at ``job_uri`` until every shard is committed; returns the exit code.

    0 done, 75 drained by SIGTERM or a failure that may pass, 78 the job is wrong, 77 stopped by a
    cancel or by the budget, 70 internal. ``usd_per_hour`` is this worker's price (default: the job's).
    ``index`` is the batch service's number of this worker: a hint where to start. Its log is lines of
    ``log_format`` on stderr; its figures go to ``metrics_file`` with each heartbeat, for Prometheus. To be
    called from the main thread.
    """
    started_ns = process_started_ns()
    log_to_stderr(log_format)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(EXIT_RETRY))  # nothing is there to be saved yet
    show_life()
    try:
        code = _run(job_uri, usd_per_hour, index, started_ns, metrics_file)
    except TransientStorageError as error:
        logger.error("%s", error)
        code = EXIT_RETRY
    except (JobError, StorageError) as error:
        logger.error("%s", error)
        code = EXIT_JOB
    if log_format is LogFormat.JSON:  # a log for people ends with the reason
        log_event(logger, "exit", f"leaving with exit code {code}", exit_code=code)
    return code


def _run(
    job_uri: str,
    usd_per_hour: float | None,
    index: int | None,
    started_ns: int,
    metrics_file: Path | None,
) -> int:
    clock = SystemClock()
    storage = json.loads(os.environ.get(STORAGE, "{}"))
    folder = JobFolder(open_store(job_uri, storage), clock, attempts=ATTEMPTS)
    record = folder.read_job()
    if record is None:
        raise JobError(f"there is no job at {folder.uri}: give the output.uri of a job that was submitted")
    control = folder.read_control()
    if control.state == "cancel":
        logger.error("the job at %s was cancelled: submit it again to go on", folder.uri)
        return EXIT_STOPPED
    if control.state == "stop":
        logger.error("%s", control.message)
        return EXIT_STOPPED
    spec = parse_spec(record.spec, f"the job in {folder.uri}")
    work = read_work(folder, record, spec)
    if _is_done(folder, list(work.shards)):
        return EXIT_DONE
    load = Load(
        engine_config(spec), spec.model.source, {**storage, **spec.storage_options()}, record.fingerprint
    )
    pace = Pace(**json.loads(os.environ.get(PACE, "{}")))
    limited = cap_of(control, record).limited
    first = _first_heartbeat(_price(usd_per_hour, control, spec), index, limited)
    supervisor = Supervisor(
        folder,
        clock,
        work,
        first,
        started_ns,
        lambda deliver: EngineProcess(load, deliver),
        pace,
        _allowance(folder, clock, record, control, first, started_ns, pace) if limited else None,
    )
    if metrics_file is not None:
        supervisor.write_metrics(MetricsFile(metrics_file, spec.name or folder.uri))
    figures = {"worker": first.worker, "uri": folder.uri, "usd_per_hour": first.usd_per_hour}
    log_event(logger, "start", f"worker {first.worker} starts on {folder.uri}", **figures)
    _drain_on_signals(supervisor)
    if PARENT in os.environ:
        end_with_parent(int(os.environ.pop(PARENT)), signal.SIGTERM)
    code = supervisor.run()
    if supervisor.message:
        logger.error("%s", supervisor.message)
    return code


def _is_done(folder: JobFolder, shards: list[ShardName]) -> bool:
    """Whether all shards are committed. Any that is not says no, before thousands of workers that start
    list 100,000 parts each."""
    some = random.sample(shards, min(len(shards), 8))
    return all(map(folder.is_committed, some)) and folder.committed().keys() >= set(shards)


def read_work(folder: JobFolder, record: JobRecord, spec: JobSpec) -> Work:
    """What the job's record says there is to do. Raises JobError where it can't be done here."""
    plan = folder.read_plan(record.plan)

    def next_round(number: int) -> Mapping[ShardName, Shard]:
        return round_shards(folder, plan, number)

    shards = last_round(folder, plan)
    sampling, tokens = widest_sampling(spec, record.input_schema)
    passed = passed_columns(record.schema, sampling, tokens)
    prompts = compile_prompts(spec, record.input_schema)
    columns = list(dict.fromkeys([*passed.names, *prompts.columns]))
    storage = spec.storage_options()

    def read(split: Split) -> Iterable[RowBatch]:
        return read_batches(split, record.input_schema, columns, storage)

    limit = FailureLimit(spec.failures.max_share, spec.failures.after_rows)
    return Work(
        shards, record.schema, passed, sampling, read, prompts.render, next_round, prompts.sampling, limit
    )


def engine_config(spec: JobSpec) -> EngineConfig:
    """The engine that a job asks for, on this host."""
    model = spec.model
    config = EngineConfig(
        model=model.source,
        dtype=model.dtype,
        quantize=model.quantize,
        kv_dtype=model.kv_dtype,
        max_context=model.max_context,
        device="auto" if spec.workers.gpus else "cpu",
    )
    share = os.environ.get(MEMORY_SHARE)
    return config if share is None else replace(config, memory_share=float(share))


def _allowance(
    folder: JobFolder,
    clock: Clock,
    record: JobRecord,
    control: Control,
    first: WorkerRecord,
    started_ns: int,
    pace: Pace,
) -> Allowance:
    """What the worker that begins with this heartbeat may spend of the job's budget."""
    return Allowance(
        job_slots(folder, clock, record, control, pace.lease),
        clock,
        first.worker,
        first.usd_per_hour,
        started_ns,
        lambda: cap_of(folder.read_control(), record),
        os._exit,
    )


def _price(asked: float | None, control: Control, spec: JobSpec) -> float | None:
    for price in (asked, control.usd_per_hour, spec.price.usd_per_hour):
        if price is not None:
            return price
    return None


def _first_heartbeat(usd_per_hour: float | None, index: int | None, bought: bool) -> WorkerRecord:
    return WorkerRecord(
        worker=secrets.token_hex(6),
        state="starting",
        beat=0,
        usd_per_hour=usd_per_hour,
        bill=Bill(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        host=socket.gethostname(),
        pid=os.getpid(),
        index=index,
        bought=bought,
    )


def _drain_on_signals(supervisor: Supervisor) -> None:
    """On SIGTERM, SIGINT or SIGUSR1 leave in order, within 25 seconds in any case."""

    asked, ask = os.pipe()

    def leave() -> None:
        os.read(asked, 1)
        last_resort = threading.Timer(DRAIN_SECONDS, os._exit, [EXIT_RETRY])
        last_resort.daemon = True
        last_resort.start()
        supervisor.drain()

    # The interrupted code may hold the bench, or the lock by which threads start: a parent that ends
    # sends a signal for each of its threads. So the handler only asks, and the asking is done elsewhere.
    threading.Thread(target=leave, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: os.write(ask, b"\n"))
