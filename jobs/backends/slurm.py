"""Slurm: workers as the tasks of job arrays, submitted by sbatch."""

from __future__ import annotations

import getpass
import re
import shlex
from collections import Counter

from batchinfer.jobs.backends.program import run_program
from batchinfer.jobs.backends.request import FINAL_EXITS, GRACE_SECONDS, Active, Place, Request
from batchinfer.jobs.types import JobError

# What a cluster allows that says nothing else.
MAX_ARRAY_SIZE = 1001
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}

# The worker saves its work on SIGTERM. Slurm requeues by itself what a lost node or preemption ended;
# whatever else may pass is requeued here, unless Slurm is ending the job. The task is named by array and
# index, as the number of an array's last task is that of the whole array.
_BODY = """\
signalled=
worker=
trap 'signalled=1; [ -z "$worker" ] || kill -TERM "$worker" 2>/dev/null' USR1 TERM
{command} --index $((SLURM_ARRAY_TASK_ID + {first})) &
worker=$!
[ -z "$signalled" ] || kill -TERM "$worker"
while :; do
    signalled=
    wait "$worker"
    code=$?
    # A wait that a signal cut short says nothing of the worker.
    [ -n "$signalled" ] || break
done
case $code in 0 | {final}) exit $code ;; esac
task=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ] && \\
    [ "$(squeue --noheader --job="$task" --format=%T)" = RUNNING ]; then
    scontrol requeue "$task" && sleep 60
fi
exit $code
"""


def render(request: Request) -> str:
    """The scripts that sbatch gets."""
    return "\n".join(scripts(request, _max_array_size()))


def scripts(request: Request, max_array_size: int) -> list[str]:
    """One script an array; arrays are cut at the cluster's MaxArraySize, above its highest index."""
    return [
        _script(request, first, min(max_array_size, request.count - first))
        for first in range(0, request.count, max_array_size)
    ]


def submit(request: Request) -> tuple[str, ...]:
    """Submit the arrays; returns their job ids."""
    command = ["sbatch", "--parsable"]
    return tuple(
        run_program(command, script).strip().partition(";")[0]
        for script in scripts(request, _max_array_size())
    )


def active(place: Place) -> Active:
    """The array's tasks by what squeue says."""
    states = Counter(run_program(["squeue", "--noheader", "--array", *_ours(place), "--format=%T"]).split())
    return Active(
        sum(count for state, count in states.items() if state in _WAITING),
        sum(count for state, count in states.items() if state in _RUNNING),
    )


def cancel(place: Place) -> None:
    """Cancel all arrays of the job."""
    run_program(["scancel", *_ours(place)])


def _ours(place: Place) -> list[str]:
    return [f"--name={place.name}", f"--user={getpass.getuser()}"]


def _max_array_size() -> int:
    """The cluster's MaxArraySize; Slurm's default where there is no cluster to ask."""
    try:
        config = run_program(["scontrol", "show", "config"])
    except JobError:
        return MAX_ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", config, re.MULTILINE)
    return int(found[1]) if found else MAX_ARRAY_SIZE


def _script(request: Request, first: int, count: int) -> str:
    options, workers, place = request.place.options.slurm, request.workers, request.place
    gres = options.gres or (f"gpu:{workers.gpus}" if workers.gpus else None)
    settings = {
        "job-name": place.name,
        "comment": place.uri,
        "array": f"0-{count - 1}",
        "ntasks": "1",
        "requeue": None,
        "open-mode": "append",
        "signal": f"B:USR1@{GRACE_SECONDS}",
        "output": f"{place.name}-%A_%a.log",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "gres": gres,
        "cpus-per-task": request.cpus,
        "mem": f"{request.memory_mib}M" if request.memory_mib else None,
    }
    flags = [
        f"--{name}" if value is None else f"--{name}={shlex.quote(str(value))}"
        for name, value in settings.items()
        if value is not None or name == "requeue"
    ]
    exports = [
        f"export {name}={shlex.quote(value)}" for name, value in sorted(request.environment({}).items())
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {flag}" for flag in (*flags, *options.sbatch)),
            *exports,
            *options.setup,
            _BODY.format(
                command=shlex.join(request.command),
                first=first,
                final=" | ".join(map(str, FINAL_EXITS)),
                restarts=workers.max_attempts - 1,
            ),
        ]
    )
