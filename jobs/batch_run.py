"""``run-batch``: a batch file in, a batch file out, with a job beside the output while it runs.

The job's folder is OUTPUT.job. It makes the run interruptible: started again in the same way, the run goes
on with the rows that are missing. It is deleted when the output is there.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import socket
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa

from batchinfer.connectors.http import download
from batchinfer.connectors.storage import normalize_uri, open_store, protocol_of, split_root
from batchinfer.jobs.backends.local import start_workers
from batchinfer.jobs.batch_answers import AnswerLine, answer_lines
from batchinfer.jobs.cost import Settlement
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.live import follow
from batchinfer.jobs.models import cache_folder
from batchinfer.jobs.spec import JobSpec, parse_spec
from batchinfer.jobs.status import JobStatus, living, runs_here
from batchinfer.jobs.submit import Submitted, commit_job
from batchinfer.jobs.types import JobError
from batchinfer.jobs.view import submit_lines


@dataclass(frozen=True, slots=True)
class BatchResult:
    """How a run ended: ``status`` is the job's. Where that is done, ``answered`` and ``failed`` count
    output lines, ``repeated`` those whose custom_id an earlier line has; ``bill`` is what it took."""

    status: JobStatus
    bill: Settlement
    answered: int = 0
    failed: int = 0
    repeated: int = 0


def run_batch(
    input_uri: str, output_uri: str, model: Mapping[str, Any], say: Callable[[str], None]
) -> BatchResult:
    """Answer the batch file at ``input_uri`` into ``output_uri``, or go on where an earlier run was
    interrupted; ``model`` is a job spec's ``model``, ``say`` takes lines for people.

    The output appears whole when all lines are answered, in the order of the input. The input is a file,
    a folder or a glob as in a job spec, or an http(s) address, which is fetched once. Raises JobError,
    ModelError or StorageError where it can't be done as asked.
    """
    output = normalize_uri(output_uri)
    with _alone(output):
        return _run(input_uri, output, model, say)


def _run(input_uri: str, output: str, model: Mapping[str, Any], say: Callable[[str], None]) -> BatchResult:
    folder = JobFolder(open_store(f"{output}.job"))
    if folder.read_job() is None:
        folder.remove()  # what an interrupted removal left
        resumed = False
    else:
        resumed = True
        _refuse_other_hosts(folder, output)
    with _local_copy(input_uri, output) as source:
        spec = parse_spec(
            {
                "model": model,
                "input": {"uri": source, "format": "openai"},
                "output": {"uri": folder.uri},
                # A line that can't be answered is an error line, however many there are.
                "failures": {"max_share": 1.0},
            },
            "run-batch",
        )
        _check_apart(spec, output)
        try:
            submitted = commit_job(spec)
        except JobError as error:
            if not resumed:
                raise
            raise JobError(
                f"an earlier run for {output} was interrupted, and this is not it: {error}; delete "
                f"{folder.uri} to begin anew"
            ) from None
        for line in submit_lines(submitted):
            say(line)
        status = submitted.job.status() if submitted.complete else _work(submitted)
        job = submitted.job
        if status.state != "done":
            message = status.message.replace("submit again", "run it again")
            return BatchResult(replace(status, message=message), job.bill())
        counts = _Counts()
        _write(output, counts.counted(answer_lines(job)))
        result = BatchResult(status, job.bill(), counts.answered, counts.failed, counts.repeated)
        folder.remove()
    _remove_empty_folders(folder.uri)
    return result


@contextmanager
def _alone(output: str) -> Iterator[None]:
    """Hold the output for this process, as far as this machine goes: the system lets go of it with the
    process, however that ends."""
    folder = cache_folder() / "runs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / hashlib.sha256(output.encode()).hexdigest()[:16], "w")  # noqa: SIM115
    except OSError as error:
        raise JobError(
            f"{folder} can't be written ({error.strerror}): set BATCHINFER_CACHE to a folder that can"
        ) from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(_taken(output, "this machine")) from None
        yield


def _refuse_other_hosts(folder: JobFolder, output: str) -> None:
    """Raise JobError where a worker of another machine is at the run."""
    for worker in living(list(folder.read_workers()), time.time()):
        if worker.host != socket.gethostname():
            raise JobError(_taken(output, worker.host))


def _taken(output: str, host: str) -> str:
    return f"another run-batch for {output} is at work on {host}: wait for it to end, or give another -o"


def _work(submitted: Submitted) -> JobStatus:
    """Run the job to its end with a worker of our own."""
    while True:
        # The worker of an interrupted run may still be there, and about to leave.
        there = any(runs_here(worker) is True for worker in submitted.job.workers())
        gpus, storage = submitted.spec.workers.gpus, submitted.spec.storage_options()
        with start_workers(submitted.job.uri, 0 if there else 1, gpus, storage, attached=True) as started:
            status = follow(submitted.job, started)
        if status.state != "stalled" or started.processes:
            return status


class _Counts:
    """Counts lines on their way."""

    def __init__(self) -> None:
        self.answered = self.failed = 0
        self._ids = array("Q")

    def counted(self, lines: Iterable[AnswerLine]) -> Iterator[AnswerLine]:
        """The same lines."""
        for line in lines:
            if line.failed:
                self.failed += 1
            else:
                self.answered += 1
            if line.custom_id is not None:
                digest = hashlib.blake2b(line.custom_id.encode(), digest_size=8).digest()
                self._ids.append(int.from_bytes(digest, "little"))
            yield line

    @property
    def repeated(self) -> int:
        """Lines whose custom_id an earlier one has."""
        return len(self._ids) - len(np.unique(np.frombuffer(self._ids, np.uint64))) if self._ids else 0


def _check_apart(spec: JobSpec, output: str) -> None:
    for uri in spec.input.uri:
        if normalize_uri(uri) == output:
            raise JobError(f"{output} is the input as well as the output: give another -o")


@contextmanager
def _local_copy(uri: str, output: str) -> Iterator[str]:
    """The input's address; of a web address a copy on this machine, kept until the run is complete."""
    if protocol_of(uri) not in ("http", "https"):
        yield uri
        return
    name = PurePosixPath(uri.partition("://")[2].partition("?")[0]).name or "input.jsonl"
    folder = cache_folder() / "downloads" / hashlib.sha256(f"{uri}\n{output}".encode()).hexdigest()[:16]
    copy = folder / name
    if not copy.exists():
        download(uri, copy)
    yield str(copy)
    if JobFolder(open_store(f"{output}.job")).read_job() is None:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_empty_folders(uri: str) -> None:
    """Stores have no folders but local ones, where those of deleted objects are left."""
    if protocol_of(uri) == "file":
        for path, _, _ in os.walk(uri, topdown=False):
            with suppress(OSError):
                os.rmdir(path)


def _write(output: str, lines: Iterable[AnswerLine]) -> None:
    """Write the output, whole; packed where its name ends in .gz or .zst."""
    root, key = split_root(output)
    with tempfile.TemporaryDirectory(prefix="batchinfer-") as scratch:
        path = Path(scratch) / "output"
        try:
            with open(path, "xb") as file, _packed(file, output) as packed:
                for line in lines:
                    packed.write(line.text.encode() + b"\n")
        except OSError as error:
            raise JobError(
                f"{output} can't be put together in {scratch} ({error.strerror or error}): set TMPDIR to a "
                "folder with room for it, and run it again"
            ) from None
        open_store(root).put(key, path)


@contextmanager
def _packed(file: IO[bytes], name: str) -> Iterator[Any]:
    if name.lower().endswith(".gz"):
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            yield packed
    elif name.lower().endswith(".zst"):
        with pa.CompressedOutputStream(file, "zstd") as packed:
            yield packed
    else:
        yield file
