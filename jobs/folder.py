"""The job folder: the only module that spells a path inside it.

Names and their meaning are a contract (DESIGN.md "Storage: the job folder"). Records are in
``records``; nothing here decides anything, it reads and writes.
"""

from __future__ import annotations

import random
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.connectors.types import ObjectInfo, ObjectStore, TransientStorageError
from batchinfer.jobs.clock import Clock, SystemClock
from batchinfer.jobs.records import (
    Claim,
    CommittedCount,
    Control,
    Failure,
    JobRecord,
    PartFooter,
    SettledSlot,
    Slot,
    WorkerRecord,
    failures_from_bytes,
    failures_to_bytes,
    nonce_of,
    plan_digest,
    plan_from_bytes,
    plan_to_bytes,
)
from batchinfer.jobs.retrying import RetryingStore
from batchinfer.jobs.rounds import RoundPlan
from batchinfer.jobs.types import JobError, Shard

_PART = re.compile(r"part-(?:r(?P<round>\d+)-)?(?P<index>\d+)-of-(?P<count>\d+)\.parquet")
_CLAIM = re.compile(r"_batchinfer/claims/(?P<shard>[^/]+)/(?P<helper>helper-)?(?P<generation>\d+)\.json")
_ROUND = re.compile(r"_batchinfer/rounds/(?P<round>\d+)/plan\.arrow")
_WORKER = re.compile(r"_batchinfer/workers/(?P<worker>[^/]+)\.json")
_SLOT = re.compile(r"_batchinfer/budget/(?P<number>\d+)(?P<settled>\.settled)?\.json")
_PROGRESS = re.compile(
    r"_batchinfer/progress/(?P<shard>[^/]+)/(?P<worker>.+)-(?P<sequence>\d+)(?P<inflight>\.inflight)?\.arrow"
)
_TAIL = 1 << 16
_CONTRADICTIONS = 6


@dataclass(frozen=True, slots=True, order=True)
class ShardName:
    """Which shard: its round (0 for the plan), its index, and how many its round has."""

    round: int
    index: int
    count: int

    @property
    def label(self) -> str:
        """The shard's name in claims, progress and failures: ``00012``, or ``r001-00000``."""
        return f"{self.round_label}{self.index:05d}"

    @property
    def round_label(self) -> str:
        """How the labels of its round begin."""
        return f"r{self.round:03d}-" if self.round else ""

    def region(self, digits: int) -> str:
        """How the labels of its neighbours begin: those that differ from its own in the last ``digits``."""
        return self.label[: len(self.label) - digits]

    @property
    def part(self) -> str:
        """The key of its part, the only object that commits it."""
        return f"part-{self.label}-of-{self.count:05d}.parquet"

    @classmethod
    def of_part(cls, key: str) -> ShardName | None:
        """The shard that the part ``key`` commits; None for any other key."""
        match = _PART.fullmatch(key)
        if match is None:
            return None
        return cls(int(match["round"] or 0), int(match["index"]), int(match["count"]))


@dataclass(frozen=True, slots=True)
class ProgressKey:
    """A progress object: whose, its number among that worker's, and whether it holds rows in flight."""

    key: str
    worker: str
    sequence: int
    inflight: bool


def input_key(digest: str) -> str:
    """The key of an input that the job keeps itself: an Arrow IPC file, by the digest of its content."""
    return f"_batchinfer/input-{digest}.arrow"


def new_nonce() -> str:
    """A fresh name for one write."""
    return secrets.token_hex(8)


class JobFolder:
    """One job's folder on a store. Reads raise FileNotFoundError for what is not there.

    Transient errors are tried again, ``attempts`` times on ``clock``; ``jitter`` spreads the pauses.
    """

    def __init__(
        self,
        store: ObjectStore,
        clock: Clock | None = None,
        jitter: random.Random | None = None,
        attempts: int = 6,
    ) -> None:
        self.clock: Clock = clock or SystemClock()
        self.store: ObjectStore = RetryingStore(store, self.clock, jitter or random.Random(), attempts)
        self.uri = store.root

    def create(
        self, key: str, data: bytes | Path, nonce: str, read_nonce: Callable[[str], str | None]
    ) -> bool:
        """Create ``key`` if it is absent: True when the object there is the one that ``nonce`` names.

        "Already exists" after a lost reply is told from a lost race by reading the nonce back. Nothing
        that is created so is ever deleted, so where "not found" follows it is tried again: a shard that
        was taken for another worker's would lose the progress that is saved of it.
        """
        for _ in range(_CONTRADICTIONS):
            if self.store.create_exclusive(key, data):
                return True
            try:
                return read_nonce(key) == nonce
            except FileNotFoundError:
                continue
        raise TransientStorageError(f"{self.uri}/{key}: the store says that it exists, and that it doesn't")

    # -- the plan and the job ---------------------------------------------------------------------

    def write_plan(self, shards: list[Shard]) -> str:
        """Store a plan under the digest of its content; returns its name for the job's record."""
        data = plan_to_bytes(shards)
        name = f"plan-{plan_digest(data)}.arrow"
        self.store.put(f"_batchinfer/{name}", data)
        return name

    def read_plan(self, name: str) -> list[Shard]:
        """The plan's shards; raises JobError where the object is not what its name says."""
        data = self.store.get(f"_batchinfer/{name}")
        if name != f"plan-{plan_digest(data)}.arrow":
            raise JobError(f"{self.uri}/_batchinfer/{name} is damaged: its digest is {plan_digest(data)}")
        return plan_from_bytes(data)

    def write_prediction(self, data: bytes) -> None:
        """Keep what a pilot predicted, before the job is committed; never read by the protocol."""
        self.store.put("_batchinfer/prediction.json", data)

    def read_prediction(self) -> bytes | None:
        """What a pilot predicted; None where the job was submitted without one."""
        try:
            return self.store.get("_batchinfer/prediction.json")
        except FileNotFoundError:
            return None

    def keep_input(self, digest: str, data: Path) -> None:
        """Store an input of the job's own, once: what is there under its digest is the same."""
        self.store.create_exclusive(input_key(digest), data)

    def create_job(self, record: JobRecord) -> bool:
        """Commit a submit: True when this record is the job's, False when another one was there."""
        return self.create("_batchinfer/job.json", record.to_bytes(), record.nonce, self._nonce)

    def read_job(self) -> JobRecord | None:
        """The job's record, or None where no job was submitted."""
        try:
            return JobRecord.from_bytes(self.store.get("_batchinfer/job.json"))
        except FileNotFoundError:
            return None

    def remove(self) -> None:
        """Delete all that a job keeps here; its record goes first, so that an interruption leaves no job
        that looks incomplete. No worker may be at it."""
        infos = self.store.list("")
        own = [
            info.key for info in infos if info.key.startswith("_batchinfer/") or _PART.fullmatch(info.key)
        ]
        for key in sorted(own, key=lambda key: key != "_batchinfer/job.json"):
            self.store.delete(key)

    # -- retry rounds -----------------------------------------------------------------------------

    def create_round(self, number: int, plan: RoundPlan) -> bool:
        """Begin a retry round: True when this plan is the round's, False when there was one."""

        def nonce(key: str) -> str:
            return RoundPlan.from_bytes(self.store.get(key)).nonce

        return self.create(self._round_key(number), plan.to_bytes(), plan.nonce, nonce)

    def read_round(self, number: int) -> RoundPlan | None:
        """The plan of a retry round, from 1; None where it was not begun."""
        try:
            return RoundPlan.from_bytes(self.store.get(self._round_key(number)))
        except FileNotFoundError:
            return None

    def list_rounds(self) -> list[int]:
        """The numbers of the retry rounds there are, in order."""
        infos = self.store.list("_batchinfer/rounds/")
        return sorted(int(match["round"]) for info in infos if (match := _ROUND.fullmatch(info.key)))

    def _round_key(self, number: int) -> str:
        return f"_batchinfer/rounds/{number:03d}/plan.arrow"

    # -- control ----------------------------------------------------------------------------------

    def read_control(self) -> Control:
        """What was last asked of the job: the highest numbered record, or the defaults."""
        return self._highest_control()[1]

    def append_control(self, change: Callable[[Control], Control]) -> Control:
        """Append the record that ``change`` makes of the current one; returns what was written.

        Another writer's record in between is taken into account: ``change`` is called again on it.
        """
        while True:
            number, current = self._highest_control()
            wanted = replace(change(current), nonce=new_nonce())
            key = f"_batchinfer/control/{number + 1:04d}.json"
            if self.create(key, wanted.to_bytes(), wanted.nonce, self._nonce):
                return wanted

    def _highest_control(self) -> tuple[int, Control]:
        infos = self.store.list("_batchinfer/control/")
        if not infos:
            return 0, Control()
        number, key = max((int(Path(info.key).stem), info.key) for info in infos)
        return number, Control.from_bytes(self.store.get(key))

    def last_change(self) -> float:
        """The store's time of the last heartbeat or control record, in seconds: now is no earlier."""
        infos = self.store.list("_batchinfer/control/") + self.store.list("_batchinfer/workers/")
        return max((info.modified for info in infos), default=0.0)

    # -- claims -----------------------------------------------------------------------------------

    def claim_key(self, shard: ShardName, generation: int, helper: bool = False) -> str:
        """The key of one generation of a shard's lease, or of its helper's."""
        return f"_batchinfer/claims/{shard.label}/{'helper-' if helper else ''}{generation:04d}.json"

    def list_claims(self, shard: ShardName | None = None) -> dict[str, dict[int, ObjectInfo]]:
        """Lease generations by shard label, of one shard or of all."""
        return self.list_leases(f"{shard.label}/" if shard else "")[0]

    def list_leases(
        self, start: str = ""
    ) -> tuple[dict[str, dict[int, ObjectInfo]], dict[str, dict[int, ObjectInfo]]]:
        """Lease generations by shard label, of shards whose labels, with a slash behind them, begin with
        ``start``: the owners', and the helpers'."""
        owners: dict[str, dict[int, ObjectInfo]] = {}
        helpers: dict[str, dict[int, ObjectInfo]] = {}
        for info in self.store.list(f"_batchinfer/claims/{start}"):
            if match := _CLAIM.fullmatch(info.key):
                leases = helpers if match["helper"] else owners
                leases.setdefault(match["shard"], {})[int(match["generation"])] = info
        return owners, helpers

    def create_claim(self, shard: ShardName, generation: int, claim: Claim, helper: bool = False) -> bool:
        """Create a generation: True when it is ours."""
        key = self.claim_key(shard, generation, helper)
        return self.create(key, claim.to_bytes(), claim.nonce, self._nonce)

    def rewrite_claim(self, shard: ShardName, generation: int, claim: Claim, helper: bool = False) -> None:
        """Renew or release our own generation."""
        self.store.put(self.claim_key(shard, generation, helper), claim.to_bytes())

    def read_claim(self, shard: ShardName, generation: int, helper: bool = False) -> Claim:
        """One generation's record."""
        return Claim.from_bytes(self.store.get(self.claim_key(shard, generation, helper)))

    # -- progress of open shards ------------------------------------------------------------------

    def progress_key(self, shard: ShardName, worker: str, sequence: int, inflight: bool = False) -> str:
        """The key of a worker's progress object."""
        suffix = ".inflight.arrow" if inflight else ".arrow"
        return f"_batchinfer/progress/{shard.label}/{worker}-{sequence:06d}{suffix}"

    def list_progress(self, shard: ShardName) -> list[ProgressKey]:
        """All progress objects of a shard, of every worker and generation."""
        found = []
        for info in self.store.list(f"_batchinfer/progress/{shard.label}/"):
            if match := _PROGRESS.fullmatch(info.key):
                inflight = match["inflight"] is not None
                found.append(ProgressKey(info.key, match["worker"], int(match["sequence"]), inflight))
        return found

    # -- failures and parts -----------------------------------------------------------------------

    def failures_key(self, shard: ShardName, nonce: str) -> str:
        """The key of a failures object; it counts only if the shard's part names its nonce."""
        return f"_batchinfer/failures/{shard.label}/{nonce}.arrow"

    def write_failures(self, shard: ShardName, failures: list[Failure], nonce: str) -> None:
        """Store the failures of a shard, before the part that names them."""
        self.store.put(self.failures_key(shard, nonce), failures_to_bytes(failures, nonce))

    def read_failures(self, shard: ShardName, nonce: str) -> list[Failure]:
        """The failures that a part's footer names."""
        return failures_from_bytes(self.store.get(self.failures_key(shard, nonce)))

    def create_part(self, shard: ShardName, data: bytes | Path, nonce: str) -> bool:
        """The commit: True when the shard's part is ours."""
        return self.create(shard.part, data, nonce, lambda key: self.read_footer(shard).nonce)

    def committed(self, start: str = "") -> dict[ShardName, ObjectInfo]:
        """The parts there are, of shards whose labels begin with ``start``."""
        found = {}
        for info in self.store.list(f"part-{start}"):
            if (shard := ShardName.of_part(info.key)) is not None:
                found[shard] = info
        return found

    def is_committed(self, shard: ShardName) -> bool:
        """Whether the shard's part exists."""
        try:
            self.store.head(shard.part)
        except FileNotFoundError:
            return False
        return True

    def read_footer(self, shard: ShardName, size: int | None = None) -> PartFooter:
        """What the part's footer says, of ``size`` bytes if that is known, which saves a request; raises
        JobError for a part that no worker wrote."""
        if size is None:
            size = self.store.head(shard.part).size
        tail = self.store.get_range(shard.part, max(0, size - _TAIL), size)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > len(tail):
            tail = self.store.get_range(shard.part, max(0, size - length), size)
        try:
            # Parquet's metadata is found from the end, so the tail alone reads as a file.
            metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + tail[-length:])).metadata or {}
            return PartFooter.from_bytes(metadata[b"batchinfer"])
        except (pa.ArrowInvalid, KeyError) as error:
            raise JobError(
                f"{self.uri}/{shard.part} was not written by this job: choose another output.uri, "
                "or move that file away"
            ) from error

    def read_count(self) -> CommittedCount | None:
        """How many shards somebody counted as committed of late; None where nobody did, or where what lies
        there can't be read: nothing depends on it."""
        try:
            return CommittedCount.from_bytes(self.store.get("_batchinfer/committed.json"))
        except (FileNotFoundError, ValueError):
            return None

    def write_count(self, count: CommittedCount) -> None:
        """Tell others how many shards are committed, so that few need to count them."""
        self.store.put("_batchinfer/committed.json", count.to_bytes())

    # -- slots of the budget ----------------------------------------------------------------------

    def create_slot(self, number: int, slot: Slot) -> bool:
        """Buy a slot: True when it is ours."""
        return self.create(
            f"_batchinfer/budget/{number:06d}.json", slot.to_bytes(), slot.nonce, self._nonce
        )

    def settle_slot(self, number: int, settled: SettledSlot) -> None:
        """Say once what was spent of a slot that we bought."""
        key = f"_batchinfer/budget/{number:06d}.settled.json"
        self.create(key, settled.to_bytes(), settled.nonce, self._nonce)

    def read_settled(self, number: int) -> SettledSlot:
        """What was spent of a settled slot."""
        return SettledSlot.from_bytes(self.store.get(f"_batchinfer/budget/{number:06d}.settled.json"))

    def list_slots(self) -> tuple[set[int], set[int]]:
        """The numbers of the slots that were bought, and of those that are settled."""
        bought: set[int] = set()
        settled: set[int] = set()
        for info in self.store.list("_batchinfer/budget/"):
            if match := _SLOT.fullmatch(info.key):
                (settled if match["settled"] else bought).add(int(match["number"]))
        return bought, settled

    # -- workers and the summary ------------------------------------------------------------------

    def write_worker(self, record: WorkerRecord) -> None:
        """Rewrite a heartbeat."""
        self.store.put(f"_batchinfer/workers/{record.worker}.json", record.to_bytes())

    def worker_time(self, worker: str) -> float:
        """The store's own time of a worker's last heartbeat, in seconds."""
        return self.store.head(f"_batchinfer/workers/{worker}.json").modified

    def list_workers(self) -> dict[str, ObjectInfo]:
        """The workers that have shown themselves, in order, with the store's time of each's last heartbeat
        and its tag."""
        infos = self.store.list("_batchinfer/workers/")
        return {match["worker"]: info for info in infos if (match := _WORKER.fullmatch(info.key))}

    def read_worker(self, worker: str) -> WorkerRecord:
        """A worker's last heartbeat."""
        return WorkerRecord.from_bytes(self.store.get(f"_batchinfer/workers/{worker}.json"))

    def read_workers(self) -> Iterator[tuple[WorkerRecord, float]]:
        """Every worker's last heartbeat with the store's time of it."""
        for worker, info in self.list_workers().items():
            yield self.read_worker(worker), info.modified

    def write_summary(self, data: bytes) -> None:
        """Rewrite the summary: derived, so nothing depends on it."""
        self.store.put("_batchinfer/summary.json", data)

    def read_summary(self) -> bytes:
        """The last summary."""
        return self.store.get("_batchinfer/summary.json")

    def _nonce(self, key: str) -> str | None:
        return nonce_of(self.store.get(key))
