"""A pilot: a few rows of a job, answered by engines like those of its workers, before it is submitted."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from batchinfer.engine.types import Request
from batchinfer.jobs.backends.local import worker_shares
from batchinfer.jobs.engine_process import Load
from batchinfer.jobs.lengths import STRATUM_ROWS, Stratum, choose_rows
from batchinfer.jobs.link import Failed
from batchinfer.jobs.pilot_link import Answer, Loaded, Measure, Measured
from batchinfer.jobs.plan import Plan
from batchinfer.jobs.prefixes import alike
from batchinfer.jobs.processes import MEMORY_SHARE, child_environment, python_command
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.survey import PromptRow, Survey
from batchinfer.jobs.throughput import Rates
from batchinfer.jobs.types import JobError
from batchinfer.jobs.worker import engine_config

_STANDARD_ERROR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pilot:
    """What a pilot did: ``strata`` cut the survey's rows and say which were chosen, by ``seed``;
    ``lengths`` are the tokens of each sample of a chosen row, by its place in the survey, none for one
    that was rejected. ``finished`` counts samples by finish reason, ``rejections`` rows by code;
    ``first_rejection`` says why the first can't run. ``rates`` are those of one engine of ``engines`` that
    ran together on ``machine``; ``block`` is the tokens of a block of its KV cache, 0 where unknown;
    ``seconds`` is how long it all took."""

    seed: int
    strata: tuple[Stratum, ...]
    lengths: Mapping[int, tuple[int, ...]]
    finished: Mapping[str, int]
    rejections: Mapping[str, int]
    first_rejection: str
    rates: Rates
    block: int
    engines: int
    machine: str
    seconds: float

    @property
    def rows(self) -> int:
        """How many rows it had."""
        return len(self.lengths)


def check_rows(rows: int | None) -> None:
    """Raise JobError where a pilot of ``rows`` rows can't be; None is no pilot."""
    if rows is not None and rows < 1:
        raise JobError(f"a pilot of {rows} rows says nothing: give it 1 or more, or plan without a pilot")


def pilot_strata(survey: Survey, rows: int, seed: int) -> list[Stratum]:
    """The survey's rows cut into strata of alike prompts, with ``rows`` of them chosen by ``seed``: those
    that begin alike together, and of these the shorter ones apart from the longer ones.

    Raises JobError where ``rows`` is below 1.
    """
    check_rows(rows)
    count = max(1, min(rows, len(survey.rows)) // STRATUM_ROWS)
    fewest = max(2, len(survey.rows) // (2 * count))
    return choose_rows(alike([row.tokens for row in survey.rows], fewest), rows, seed)


def run_pilot(plan: Plan, rows: int, seed: int = 0) -> Pilot:
    """Answer ``rows`` rows of the plan's job, or all that were surveyed if those are fewer.

    Where workers are to be processes of this machine as many engines run as there will be workers, since
    they share it; else one. Raises JobError and ModelError where no engine runs here.
    """
    begun = time.perf_counter()
    strata = pilot_strata(plan.survey, rows, seed)
    chosen = sorted(place for stratum in strata for place in stratum.chosen)
    if not chosen:
        raise JobError(f"no row can be answered, so there is nothing to try: {plan.survey.first_failure}")
    found = {place: plan.survey.rows[place] for place in chosen}
    workers = plan.spec.workers
    count = min(workers.count, len(chosen)) if workers.backend == "local" else 1
    requests = [Request(row.index, row.prompt, row.sampling) for row in found.values()]
    together = _rows_together(plan)
    with _Engines(plan.spec, plan.fingerprint, count) as engines:
        startup, loaded = engines.load()
        shares = [
            Measure(tuple(requests[number::count]), min(together, loaded.rows or together))
            for number in range(count)
        ]
        measured = engines.measure(shares)
    answers = [answer for one in measured for answer in one.answers]
    rejections = [rejection for one in measured for rejection in one.rejections]
    return Pilot(
        seed=seed,
        strata=tuple(strata),
        lengths=_lengths(found, answers),
        finished=_counted(answer.finish_reason for answer in answers),
        rejections=_counted(code for _, code, _ in rejections),
        first_rejection=rejections[0][2] if rejections else "",
        rates=fit_rates(startup, loaded, measured),
        block=loaded.block,
        engines=count,
        machine=machine_name(),
        seconds=time.perf_counter() - begun,
    )


def _rows_together(plan: Plan) -> int:
    """How many samples an engine of the job will have at a time, at most."""
    n = plan.spec.sampling.n
    rows = min(-(-plan.rows // plan.spec.workers.count), 2 * max(shard.rows for shard in plan.shards))
    return n * rows


def _lengths(found: Mapping[int, PromptRow], answers: Sequence[Answer]) -> dict[int, tuple[int, ...]]:
    by_row: dict[int, list[tuple[int, int]]] = {}
    for answer in answers:
        by_row.setdefault(answer.row, []).append((answer.sample, answer.tokens))
    return {
        place: tuple(tokens for _, tokens in sorted(by_row.get(row.index, ())))
        for place, row in found.items()
    }


def _counted(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def fit_rates(startup: float, loaded: Loaded, measured: Sequence[Measured]) -> Rates:
    """The rates that explain the steps of engines that ran together.

    Steps without context say what rows cost by their number. What the pilot's steps took beyond that is
    the context's once every prompt is computed, and the prompts' before.
    """
    decode = _mean_decode(measured)
    bare = Rates(
        startup=startup,
        prefill=0.0,
        decode=decode,
        attention=0.0,
        max_rows=loaded.rows,
        capacity=loaded.capacity,
    )
    beyond = attended = 0.0
    prompts: list[tuple[float, int, int]] = []
    computed = 0
    for one in measured:
        starts = [answer.step - answer.tokens + 1 for answer in one.answers]
        last_start = max(starts, default=-1)
        computed += sum(answer.prompt_tokens - answer.cached_tokens for answer in one.answers)
        for step, seconds in enumerate(one.steps):
            rows = context = 0
            for answer, start in zip(one.answers, starts, strict=True):
                if start < step <= answer.step:
                    rows += 1
                    context += answer.prompt_tokens + step - start
            if step <= last_start:
                prompts.append((seconds, rows, context))
            elif rows:
                beyond += seconds - bare.step(rows)
                attended += context
    attention = max(0.0, beyond / attended) if attended else 0.0
    spent = sum(seconds - bare.step(rows) - attention * context for seconds, rows, context in prompts)
    return replace(bare, attention=attention, prefill=max(0.0, spent / computed) if computed else 0.0)


def _mean_decode(measured: Sequence[Measured]) -> tuple[tuple[int, float], ...]:
    """Over the engines that measured so many rows, never falling as rows increase."""
    taken: dict[int, list[float]] = {}
    for one in measured:
        for rows, seconds in one.decode:
            taken.setdefault(rows, []).append(seconds)
    slowest = 0.0
    table = []
    for rows, found in sorted(taken.items()):
        slowest = max(slowest, sum(found) / len(found))
        table.append((rows, slowest))
    return tuple(table)


def machine_name() -> str:
    """This machine for people: its name, how many cores this process may use, and their kind."""
    model = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0))
    return f"{socket.gethostname()}, {cores} {'core' if cores == 1 else 'cores'} of {model}"


class _Engines:
    """Engines of a pilot, each in a process of its own that ends with the block."""

    def __init__(self, spec: JobSpec, fingerprint: str, count: int) -> None:
        workers = spec.workers
        self._shares = worker_shares(count, workers.gpus, workers.cpus)
        self._load = Load(engine_config(spec), spec.model.source, spec.storage_options(), fingerprint)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._closing = ExitStack()
        self._begun = time.perf_counter()

    def __enter__(self) -> _Engines:
        """Start the processes."""
        with ExitStack() as stack:
            for share in self._shares:
                ours, theirs = socket.socketpair()
                with theirs:
                    process = subprocess.Popen(
                        [
                            *python_command("batchinfer.jobs.pilot_engine"),
                            str(theirs.fileno()),
                            str(os.getpid()),
                        ],
                        stdin=subprocess.DEVNULL,
                        stdout=_STANDARD_ERROR,
                        env={**child_environment(), **share},
                        pass_fds=[theirs.fileno()],
                    )
                self._processes.append(process)
                stack.callback(_end, process)
                connection = Connection(ours.detach())
                self._connections.append(connection)
                stack.callback(connection.close)
                config = replace(self._load.config, memory_share=float(share[MEMORY_SHARE]))
                self._send(len(self._connections) - 1, replace(self._load, config=config))
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes."""
        self._closing.close()

    def load(self) -> tuple[float, Loaded]:
        """Wait until all are ready: the mean seconds from their start, and what one says of itself."""
        seconds, found = 0.0, Loaded(0, 0, 0)
        for _, loaded in self._answers(Loaded):
            seconds += time.perf_counter() - self._begun
            found = loaded
        return seconds / len(self._connections), found

    def measure(self, shares: Sequence[Measure]) -> list[Measured]:
        """Have all of them measure at the same time."""
        for number, share in enumerate(shares):
            self._send(number, share)
        by_engine = dict(self._answers(Measured))
        return [by_engine[number] for number in range(len(shares))]

    def _send(self, number: int, message: object) -> None:
        try:
            self._connections[number].send(message)
        except OSError:
            return  # it is gone; the answer that we wait for says why

    def _answers(self, kind: type[Any]) -> Iterator[tuple[int, Any]]:
        """Each engine's next message, as they come."""
        pending: list[Any] = list(self._connections)
        while pending:
            for ready in wait(pending):
                assert isinstance(ready, Connection)
                number = self._connections.index(ready)
                pending.remove(ready)
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    message = None
                if not isinstance(message, kind):
                    raise JobError(self._problem(number, message))
                yield number, message

    def _problem(self, number: int, message: object) -> str:
        if isinstance(message, Failed):
            return message.message if message.permanent else f"the pilot's engine failed: {message.message}"
        code = self._processes[number].wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        hint = "; it may have run out of memory, so lower workers.count or model.max_context"
        return f"the pilot's engine ended {how}{hint if code == -9 else ''}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
