"""What must hold after a run of tests/chaos.py, and its figures."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import fake_engine as fake
import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.jobs.cost import Settlement, settle
from batchinfer.jobs.records import JobRecord, WorkerRecord

if TYPE_CHECKING:
    from chaos import Run, Script, Worker

SECOND = 1_000_000_000
CLOCK_TICK_NS = 20_000_000
"""How exactly a process's start is known, twice over."""
SLACK_NS = 30 * SECOND
"""How long a worker's last words, or a heartbeat, may take on a busy machine whose store has faults."""
CHECKPOINT_SLACK_NS = 10 * SECOND
"""How long after a token was decoded a checkpoint that reaches the store may still lack it."""
DRAIN_NS = 25 * SECOND
_LOST = ("was taken over by another worker", "was committed by another worker")
_MUTABLE = re.compile(r"/_batchinfer/(workers/|claims/|summary\.json)")
_DELETABLE = re.compile(r"/_batchinfer/progress/|/_probe-")
HEADER = (
    "seed  store    engine  rows  events                          faults  repeated  tokens  waste  "
    "tail killed  tail clean  seconds"
)


class Decoding(NamedTuple):
    """One token as an engine logged it: when, and of which supervisor's engine."""

    at_ns: int
    pid: int


@dataclass(frozen=True)
class Figures:
    """What a run shows: tokens decoded again, the share of the bill that is waste, and the longest time
    of a worker that its bill does not hold, by how it ended."""

    seed: int
    store: str
    engine: str
    rows: int
    events: str
    faults: int
    repeated: int
    tokens: int
    waste: float
    tail_killed: float
    tail_clean: float
    seconds: float

    def line(self) -> str:
        """A row of the table."""
        return (
            f"{self.seed:4}  {self.store:7}  {self.engine:6}  {self.rows:4}  {self.events:30}  "
            f"{self.faults:6}  {self.repeated:8}  {self.tokens:6}  {self.waste:5.1%}  "
            f"{self.tail_killed:9.2f} s  {self.tail_clean:8.2f} s  {self.seconds:7.1f}"
        )


def totals(runs: Sequence[Figures]) -> str:
    """A table of all runs, by store and engine."""
    lines = [
        "store    engine  runs  rows  faults  repeated  tokens  most waste  longest tail  seconds a run"
    ]
    for store, engine in sorted({(run.store, run.engine) for run in runs}):
        some = [run for run in runs if (run.store, run.engine) == (store, engine)]
        lines.append(
            f"{store:7}  {engine:6}  {len(some):4}  {sum(run.rows for run in some):4}  "
            f"{sum(run.faults for run in some):6}  {sum(run.repeated for run in some):8}  "
            f"{sum(run.tokens for run in some):6}  {max(run.waste for run in some):10.1%}  "
            f"{max(max(run.tail_killed, run.tail_clean) for run in some):10.2f} s  "
            f"{sum(run.seconds for run in some) / len(some):13.1f}"
        )
    return "\n".join(lines)


def inputs(rows: int) -> pa.Table:
    """The input of every run."""
    return pa.table(
        {
            "id": [f"id {row}" for row in range(rows)],
            "text": [f"Tell me about {row}." for row in range(rows)],
        }
    )


def check(run: Run, answers: dict[int, str]) -> Figures:
    """Raise AssertionError where the run broke a promise."""
    record = run.folder.read_job()
    assert record is not None
    workers = [worker for worker, _ in run.folder.read_workers()]
    table = _rows(run, record, answers)
    settlement = _bill(run, workers, table)
    _objects(run)
    tails = {worker.pid: _life(run, worker, workers) for worker in run.workers}
    repeated, tokens = (0, 0) if run.script.real else _tokens(run, record)
    killed = [tails[worker.pid] for worker in run.workers if worker.suffered("kill")]
    clean = [tails[worker.pid] for worker in run.workers if not worker.suffered("kill")]
    events = Counter(action for worker in run.workers for _, action in worker.signals)
    names = [f"{count} {action}" for action, count in sorted(events.items())]
    more = len(run.workers) - run.script.workers
    names += [f"{more} new"] if more else []
    names += ["submit killed"] if run.script.kill_submit else []
    ends = [worker.died_ns or 0 for worker in run.workers]
    return Figures(
        seed=run.script.seed,
        store=run.script.server,
        engine="real" if run.script.real else "fake",
        rows=run.script.rows,
        events=", ".join(names),
        faults=run.proxy.hits.total(),
        repeated=repeated,
        tokens=tokens or sum(table["completion_tokens"].to_pylist()),
        waste=settlement.bill.waste / max(1, settlement.bill.total),
        tail_killed=max(killed, default=0) / SECOND,
        tail_clean=max(clean, default=0) / SECOND,
        seconds=(max(ends) - min(worker.started_ns for worker in run.workers)) / SECOND,
    )


def _rows(run: Run, record: JobRecord, answers: dict[int, str]) -> pa.Table:
    """Every row once, in one shard, with its input's columns and the answers of an undisturbed run."""
    script, store = run.script, run.folder.store
    parts = sorted(run.folder.committed())
    assert len(parts) == record.shards
    table = pa.concat_tables([pq.read_table(pa.BufferReader(store.get(part.part))) for part in parts])
    n = script.samples
    expected = [row for row in range(script.rows) for _ in range(n)]
    assert table["row_index"].to_pylist() == expected
    source = inputs(script.rows)
    for name in source.column_names:
        assert table[name].to_pylist() == [source[name][row].as_py() for row in expected]
    samples = table["sample_index"].to_pylist() if n > 1 else [0] * len(expected)
    if script.real:
        assert dict(zip(expected, table["completion"].to_pylist(), strict=True)) == answers
    else:
        os.environ["FAKE_TOKENS"] = str(script.tokens)
        texts = [fake.text_of(row, sample) for row, sample in zip(expected, samples, strict=True)]
        assert table["completion"].to_pylist() == texts
    return table


def _bill(run: Run, workers: list[WorkerRecord], table: pa.Table) -> Settlement:
    """Nanoseconds are conserved: rows and named overheads are what the workers say they lived."""
    footers = [run.folder.read_footer(part) for part in run.folder.committed()]
    assert all(footer.failures is None for footer in footers)
    settlement = settle(workers, footers)
    settlement.check()
    spent = sum(table["prefill_ns"].to_pylist()) + sum(table["decode_ns"].to_pylist())
    assert settlement.bill.rows == spent
    assert settlement.bill.total == sum(worker.bill.total for worker in workers)
    return settlement


def _objects(run: Run) -> None:
    """What is immutable was stored with one content only, and is there with it."""
    tags: dict[str, set[str]] = defaultdict(set)
    for passed in run.proxy.passed:
        if "/out/" not in passed.path or passed.status >= 300:
            continue
        if passed.kind == "delete":
            assert _DELETABLE.search(passed.path), f"{passed.path} was deleted"
        elif passed.kind in ("create", "put") and not _MUTABLE.search(passed.path):
            assert passed.etag is not None
            tags[passed.path].add(passed.etag.strip('"'))
    there = {info.key: info.etag for info in run.folder.store.list("")}
    for path, found in tags.items():
        key = path.partition("/out/")[2]
        assert len(found) == 1, f"{key} was changed"
        assert there.get(key) in (None, *found), f"{key} is not what was stored"
        assert key in there or _DELETABLE.search(f"/{key}"), f"{key} is gone"


def _life(run: Run, worker: Worker, workers: list[WorkerRecord]) -> int:
    """Hold a bill to the life that was measured; returns the nanoseconds that the bill does not hold."""
    assert worker.died_ns is not None
    life = worker.died_ns - worker.started_ns
    code = worker.process.returncode
    mine = [record for record in workers if record.pid == worker.pid]
    expected = {0, 75, *([-9] if worker.suffered("kill") else [])}
    if worker.suffered("term") and all(record.exit_code is not None for record in mine):
        expected.add(-15)  # before Python could say otherwise, or when it had left and Python ended
    assert code in expected, f"{worker.pid} left with {code}"
    for at, action in worker.signals:
        if action == "term" and not worker.paused_ns and code == 75:
            assert worker.died_ns - at < DRAIN_NS + SECOND, "it took too long to leave"
    if not mine:
        return life  # it came to no heartbeat
    [record] = mine
    beats = [
        passed.at_ns
        for passed in run.proxy.passed
        if passed.path.endswith(f"/workers/{record.worker}.json")
        and passed.kind == "put"
        and passed.status < 300
    ]
    seen = max(beats) - worker.started_ns
    assert record.bill.total <= seen + CLOCK_TICK_NS, "the bill is longer than the life"
    assert seen - record.bill.total < SLACK_NS, "a heartbeat was long on its way"
    tail = life - record.bill.total
    if code == -9:
        renewal = int(_lease_ns() / 4)
        assert tail < renewal + worker.paused_ns + SLACK_NS, f"{tail / SECOND:.1f} s were never seen"
    else:
        assert record.exit_code == code or code in (75, -15)
        assert tail < worker.paused_ns + SLACK_NS, f"{tail / SECOND:.1f} s were never seen"
    return tail


def _lease_ns() -> float:
    from chaos import LEASE

    return LEASE * SECOND


def _tokens(run: Run, record: JobRecord) -> tuple[int, int]:
    """(tokens decoded again, tokens decoded): only what a worker that was killed, or lost its shard, had
    decoded since its last checkpoint may be decoded by another one later."""
    decoded: dict[tuple[int, int, int], list[Decoding]] = defaultdict(list)
    for path in run.logs.iterdir():
        for line in path.read_text().splitlines():
            at, row, sample, place = map(int, line.split())
            decoded[row, sample, place].append(Decoding(at, int(path.stem)))
    ours = {worker.pid: worker for worker in run.workers}
    checkpoints = _checkpoints(run)
    helped = {label for label in run.folder.list_claims() if _has_helper(run, label)}
    shards = {
        row: shard.index
        for shard in run.folder.read_plan(record.plan)
        for row in range(shard.first_row, shard.first_row + shard.rows)
    }
    repeated = 0
    for (row, sample, place), times in decoded.items():
        times.sort()
        repeated += len(times) - 1
        label = f"{shards[row]:05d}"
        for first, second in itertools.pairwise(times):
            what = f"token {place} of sample {sample} of row {row}"
            workers = ours.get(first.pid), ours.get(second.pid)
            if label in helped or any(worker is None or _lost(worker) for worker in workers):
                continue
            worker = workers[0]
            assert worker is not None
            assert worker.suffered("kill", "crash"), f"{what} was decoded again, and nobody was killed"
            saved = checkpoints.get((first.pid, label), [])
            before = [at for at in saved if at > first.at_ns + CHECKPOINT_SLACK_NS]
            ends = [at for at, action in worker.signals if action in ("kill", "crash")]
            assert not [at for at in before if at < max(ends)], (
                f"{what} was decoded again after a checkpoint"
            )
    return repeated, sum(map(len, decoded.values()))


def _has_helper(run: Run, label: str) -> bool:
    return any("helper" in info.key for info in run.folder.store.list(f"_batchinfer/claims/{label}/"))


def _lost(worker: Worker) -> bool:
    text = worker.errors.read_text()
    return worker.suffered("pause") or any(sign in text for sign in _LOST)


def _checkpoints(run: Run) -> dict[tuple[int, str], list[int]]:
    """When each supervisor's progress on each shard reached the store, by its process and the shard."""
    pids = {worker.worker: worker.pid for worker, _ in run.folder.read_workers()}
    found: dict[tuple[int, str], list[int]] = defaultdict(list)
    for passed in run.proxy.passed:
        match = re.search(r"/progress/([^/]+)/(\w+)-\d+(\.inflight)?\.arrow$", passed.path)
        if match and passed.kind == "create" and passed.status < 300 and match[2] in pids:
            found[pids[match[2]], match[1]].append(passed.at_ns)
    return found


def real_answers(script: Script, scratch: Path) -> dict[int, str]:
    """The real engine's answers in an undisturbed job in a folder of this machine."""
    from chaos import _spec, python_command

    scratch.mkdir(parents=True)
    pq.write_table(inputs(script.rows), scratch / "rows.parquet", row_group_size=script.shard_rows)
    spec = _spec(script, str(scratch))
    spec["input"] = {"uri": str(scratch / "rows.parquet")}
    spec["workers"] = {"count": 1}
    (scratch / "job.json").write_text(json.dumps(spec))
    command = python_command("batchinfer", "submit", str(scratch / "job.json"), "--wait")
    environment = {**os.environ, "BATCHINFER_CACHE": str(scratch / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=240, capture_output=True, cwd=scratch)
    table = pq.read_table(scratch / "out", columns=["row_index", "completion"])
    return dict(zip(table["row_index"].to_pylist(), table["completion"].to_pylist(), strict=True))
