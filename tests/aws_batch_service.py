"""Plays AWS Batch on loopback: takes jobs by its API, and runs them as processes of this machine.

It keeps to what the documentation says of arrays, variables, signals, exit codes, reasons and retries. Of
a container it knows the image's entry point (the program ``batchinfer``), the command and the environment.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECONDS_TO_SIGKILL = 30.0
ENDED = ("SUCCEEDED", "FAILED")


@dataclass
class Attempt:
    """What became of one start."""

    exit_code: int | None
    status_reason: str


@dataclass
class Child:
    """A plain job, or one child of an array."""

    job_id: str
    index: int | None
    status: str = "RUNNABLE"
    attempts: list[Attempt] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    host_lost: bool = False
    terminated: bool = False


@dataclass
class BatchJob:
    """A job as it was submitted."""

    job_id: str
    request: dict[str, Any]
    definition: dict[str, Any]
    children: list[Child]

    @property
    def status(self) -> str:
        states = {child.status for child in self.children}
        if states <= set(ENDED):
            return "FAILED" if "FAILED" in states else "SUCCEEDED"
        return "PENDING" if "arrayProperties" in self.request else next(iter(states))

    def described(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "jobId": self.job_id,
            "jobName": self.request["jobName"],
            "jobQueue": self.request["jobQueue"],
            "jobDefinition": self.request["jobDefinition"],
            "status": self.status,
            "startedAt": 0,
        }
        if "arrayProperties" in self.request:
            counts: dict[str, int] = {}
            for child in self.children:
                counts[child.status] = counts.get(child.status, 0) + 1
            found["arrayProperties"] = {"size": len(self.children), "statusSummary": counts}
        return found


class Refused(Exception):
    """What the service answers with 400."""


class BatchService:
    """The service: its API's operations, and the jobs that it has."""

    def __init__(self, image: Mapping[str, str], logs: Path) -> None:
        self.lock = threading.RLock()
        self.jobs: dict[str, BatchJob] = {}
        self.definitions: dict[str, dict[str, Any]] = {}
        self._image = dict(image)
        self._logs = logs

    # -- the API ----------------------------------------------------------------------------------

    def registerjobdefinition(self, request: dict[str, Any]) -> dict[str, Any]:
        strategy = request["retryStrategy"]
        if not 1 <= strategy["attempts"] <= 10 or len(strategy["evaluateOnExit"]) > 5:
            raise Refused("retryStrategy is out of range")
        kinds = [item["type"] for item in request["containerProperties"]["resourceRequirements"]]
        if not {"VCPU", "MEMORY"} <= set(kinds):
            raise Refused("resourceRequirements lacks VCPU or MEMORY")
        name = request["jobDefinitionName"]
        revision = 1 + sum(known["jobDefinitionName"] == name for known in self.definitions.values())
        arn = f"arn:aws:batch:eu-west-1:123456789012:job-definition/{name}:{revision}"
        self.definitions[arn] = request
        return {"jobDefinitionName": name, "jobDefinitionArn": arn, "revision": revision}

    def submitjob(self, request: dict[str, Any]) -> dict[str, Any]:
        size = request.get("arrayProperties", {}).get("size")
        if size is not None and not 2 <= size <= 10_000:
            raise Refused("the size of an array is from 2 to 10000")
        job_id = f"00000000-0000-0000-0000-{len(self.jobs):012d}"
        if size is None:
            children = [Child(job_id, None)]
        else:
            children = [Child(f"{job_id}:{index}", index) for index in range(size)]
        definition = self.definitions[request["jobDefinition"]]
        self.jobs[job_id] = BatchJob(job_id, request, definition, children)
        return {"jobId": job_id, "jobName": request["jobName"]}

    def listjobs(self, request: dict[str, Any]) -> dict[str, Any]:
        [condition] = request["filters"]
        assert condition["name"] == "JOB_NAME"
        found = [
            job.described()
            for job in self.jobs.values()
            if job.request["jobQueue"] == request["jobQueue"]
            and fnmatch.fnmatchcase(job.request["jobName"], condition["values"][0])
        ]
        return {"jobSummaryList": [{key: job[key] for key in ("jobId", "jobName")} for job in found]}

    def describejobs(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"jobs": [self.jobs[job].described() for job in request["jobs"]]}

    def terminatejob(self, request: dict[str, Any]) -> dict[str, Any]:
        for child in self.jobs[request["jobId"]].children:
            child.terminated = True
            if child.process is None and child.status not in ENDED:
                child.status = "FAILED"
            elif child.process is not None:
                self._end(child.process)
        return {}

    # -- the machines -----------------------------------------------------------------------------

    def reclaim(self, child: Child) -> None:
        """The spot machine of a running child is taken away: SIGTERM, and the machine is gone."""
        assert child.process is not None
        child.host_lost = True
        self._end(child.process)

    def turn(self) -> None:
        """Take in what ended and start what is to run."""
        for job in self.jobs.values():
            for child in job.children:
                if child.process is not None:
                    code = child.process.poll()
                    if code is not None:
                        child.process = None
                        self._ended(job, child, code if code >= 0 else 128 - code)
                elif child.status == "RUNNABLE":
                    self._start(job, child)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        timer = threading.Timer(SECONDS_TO_SIGKILL, process.kill)
        timer.daemon = True
        timer.start()

    def _start(self, job: BatchJob, child: Child) -> None:
        container = job.definition["containerProperties"]
        environment = dict(self._image)
        environment |= {item["name"]: item["value"] for item in container.get("environment", ())}
        environment |= {
            "AWS_BATCH_JOB_ID": child.job_id,
            "AWS_BATCH_JOB_ATTEMPT": str(len(child.attempts) + 1),
            "AWS_BATCH_JQ_NAME": job.request["jobQueue"],
        }
        if child.index is not None:
            environment["AWS_BATCH_JOB_ARRAY_INDEX"] = str(child.index)
            environment["AWS_BATCH_JOB_ARRAY_SIZE"] = str(len(job.children))
        with (self._logs / f"{child.job_id}.log").open("ab") as log:
            child.process = subprocess.Popen(
                ["batchinfer", *container["command"]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        child.status = "RUNNING"

    def _ended(self, job: BatchJob, child: Child, code: int) -> None:
        reason = "Host EC2 (instance i-0123456789) terminated." if child.host_lost else ""
        attempt = Attempt(None, reason) if child.host_lost else Attempt(code, "Essential container exited")
        child.attempts.append(attempt)
        child.host_lost = False
        strategy = job.definition["retryStrategy"]
        if attempt.exit_code == 0:
            child.status = "SUCCEEDED"
        elif child.terminated or len(child.attempts) >= strategy["attempts"]:
            child.status = "FAILED"
        else:
            action = _action(strategy["evaluateOnExit"], attempt)
            child.status = "RUNNABLE" if action == "RETRY" else "FAILED"

    def kill_all(self) -> None:
        for job in self.jobs.values():
            for child in job.children:
                if child.process is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(child.process.pid, signal.SIGKILL)
                    child.process.wait()


def _action(rules: list[dict[str, str]], attempt: Attempt) -> str:
    """What the first rule says whose conditions are all met; without one the job is tried again."""
    for rule in rules:
        met = []
        if "onExitCode" in rule:
            code = "" if attempt.exit_code is None else str(attempt.exit_code)
            met.append(fnmatch.fnmatchcase(code, rule["onExitCode"]))
        if "onStatusReason" in rule:
            met.append(fnmatch.fnmatchcase(attempt.status_reason, rule["onStatusReason"]))
        if met and all(met):
            return rule["action"].upper()
    return "RETRY"


@dataclass
class Running:
    """The service and its address."""

    service: BatchService
    url: str

    def wait(self, seconds: float = 240) -> None:
        """Until every job has ended."""
        deadline = time.monotonic() + seconds
        while not all(job.status in ENDED for job in self.service.jobs.values()):
            assert time.monotonic() < deadline, [job.described() for job in self.service.jobs.values()]
            time.sleep(0.05)


@contextlib.contextmanager
def serve(image: Mapping[str, str], logs: Path) -> Iterator[Running]:
    """The service on a free port; ``image`` is the environment of every container."""
    service = BatchService(image, logs)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                with service.lock:
                    answer, code = getattr(service, self.path.removeprefix("/v1/"))(body), 200
            except Refused as error:
                answer, code = {"__type": "ClientException", "message": str(error)}, 400
            data = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.05):
            with service.lock:
                service.turn()

    threads = [threading.Thread(target=server.serve_forever), threading.Thread(target=run)]
    for thread in threads:
        thread.start()
    try:
        yield Running(service, f"http://127.0.0.1:{server.server_port}")
    finally:
        stop.set()
        server.shutdown()
        for thread in threads:
            thread.join()
        server.server_close()
        service.kill_all()
