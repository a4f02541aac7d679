"""The summary of a job, kept by its workers at a cost that hardly grows with the job or their number.

summary.json is derived, and says what it was derived from: the parts and the heartbeats that are in it. So
whoever rewrites it reads only what is new since. Two things keep that little, and the readers few:

- every ``every``-th shard's committer rewrites it, so what is new is never much more than ``every`` parts;
- a worker that leaves while many others are at work leaves it to them. It looks at a sample of the others'
  heartbeats, after its own last one is written: the last to leave finds nobody at work.

A rewrite is based on a look at the whole folder, so none loses what another one wrote. It may be older than
that one, though: so after it the heartbeats are looked at again, and where another worker has left
meanwhile it is made anew. Hence after the last worker has left the summary is right, unless workers that
it was left to, or that were writing it, were killed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from batchinfer.connectors.types import ObjectInfo
from batchinfer.jobs.cost import settle, summary
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.parallel import read_all
from batchinfer.jobs.records import Bill, PartFooter, WorkerRecord

_AT_WORK = ("starting", "running", "draining")
_NOTHING = PartFooter(nonce="", worker="", rows=0)


@dataclass(frozen=True, slots=True)
class Basis:
    """What a summary was derived from: the parts in it, and the sum of their footers; the heartbeats in
    it by worker, each with the version that was read."""

    parts: frozenset[ShardName] = frozenset()
    footer: PartFooter = _NOTHING
    workers: Mapping[str, tuple[str, WorkerRecord]] = field(default_factory=dict)

    def to_values(self) -> dict[str, Any]:
        """As JSON values: parts as ranges of indexes by round."""
        rounds: dict[tuple[int, int], list[int]] = {}
        for shard in sorted(self.parts):
            rounds.setdefault((shard.round, shard.count), []).append(shard.index)
        return {
            "parts": [
                {"round": number, "of": count, "ranges": _ranges(indexes)}
                for (number, count), indexes in rounds.items()
            ],
            "footer": asdict(self.footer),
            "workers": {
                worker: [version, record.state, record.usd_per_hour, asdict(record.bill)]
                for worker, (version, record) in self.workers.items()
            },
        }

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Basis:
        """The inverse of :meth:`to_values`, of heartbeats all that a bill needs."""
        workers = {}
        for worker, (version, state, usd_per_hour, bill) in values["workers"].items():
            record = WorkerRecord(
                worker=worker, state=state, beat=0, usd_per_hour=usd_per_hour, bill=Bill(**bill), started=""
            )
            workers[worker] = version, record
        parts = frozenset(
            ShardName(item["round"], index, item["of"])
            for item in values["parts"]
            for first, last in item["ranges"]
            for index in range(first, last + 1)
        )
        return cls(parts, PartFooter(**values["footer"]), workers)


class SummaryWriter:
    """Keeps the summary for one worker. ``shards`` gives those of the round that the worker is at, ``n``
    is how many samples a row has. A heartbeat younger than ``lease_seconds`` may be of a worker that lives;
    with at most ``few`` others of them the summary is left to nobody."""

    def __init__(
        self,
        folder: JobFolder,
        worker: str,
        shards: Callable[[], Iterable[ShardName]],
        n: int,
        lease_seconds: float,
        every: int,
        few: int,
    ) -> None:
        self._folder = folder
        self._worker = worker
        self._shards = shards
        self._n = n
        self._lease_seconds = lease_seconds
        self._every = every
        self._few = few
        self._chance = random.Random(worker)

    def committed(self, shard: ShardName) -> None:
        """We have committed the shard: rewrite the summary if it is one of those whose turn that is."""
        if shard.index % self._every == self._every - 1:
            self._write(self._stored())

    def leave(self) -> None:
        """Our last heartbeat is written: rewrite the summary, unless others are there to do it."""
        if self._others_at_work():
            return
        basis = self._write(self._stored())
        while self._others_left(basis):
            basis = self._write(basis)

    def _others_at_work(self) -> bool:
        listed = self._folder.list_workers()
        since = listed[self._worker].modified - self._lease_seconds if self._worker in listed else 0.0
        fresh = [name for name, info in listed.items() if info.modified >= since and name != self._worker]
        if len(fresh) <= self._few:
            return False
        sample = self._chance.sample(fresh, self._few)
        records = read_all(self._folder.clock, self._folder.read_worker, sample)
        return any(record.state in _AT_WORK for record in records.values())

    def _others_left(self, basis: Basis) -> bool:
        """Whether another worker has left since its heartbeat was read for ``basis``: it may have written
        its summary before ours, which is without it."""
        listed = self._folder.list_workers()
        changed = [name for name, info in listed.items() if _version(info) != _known(basis, name)]
        records = read_all(self._folder.clock, self._folder.read_worker, changed)
        return any(record.state not in _AT_WORK for record in records.values())

    def _stored(self) -> Basis:
        try:
            return Basis.from_values(json.loads(self._folder.read_summary())["basis"])
        except FileNotFoundError:
            return Basis()

    def _write(self, basis: Basis) -> Basis:
        """Write the summary of the folder as it is now; reads what is not in ``basis``."""
        # Heartbeats first: the parts of a worker that has left are there when its last one is.
        listed = self._folder.list_workers()
        changed = [name for name, info in listed.items() if _version(info) != _known(basis, name)]
        records = read_all(self._folder.clock, self._folder.read_worker, changed)
        parts = self._folder.committed()
        if not basis.parts <= parts.keys():
            basis = replace(basis, parts=frozenset(), footer=_NOTHING)  # somebody has removed parts
        footers = read_all(
            self._folder.clock,
            lambda shard: self._folder.read_footer(shard, parts[shard].size),
            parts.keys() - basis.parts,
        )
        basis = Basis(
            frozenset(parts),
            _sum([basis.footer, *(footers[shard] for shard in sorted(footers))]),
            {
                name: (_version(info), records[name]) if name in records else basis.workers[name]
                for name, info in listed.items()
            },
        )
        self._folder.write_summary(self._content(basis))
        return basis

    def _content(self, basis: Basis) -> bytes:
        # The rounds before ours are complete, so one of their parts says how many there are.
        counts = {shard.round: shard.count for shard in (*self._shards(), *basis.parts)}
        settled = settle((record for _, record in basis.workers.values()), [basis.footer])
        settled = replace(settled, shards=len(basis.parts))
        values = json.loads(summary(settled, sum(counts.values()), self._n))
        return json.dumps(values | {"basis": basis.to_values()}, indent=1, sort_keys=True).encode()


def _version(info: ObjectInfo) -> str:
    return f"{info.etag} {info.modified}"


def _known(basis: Basis, worker: str) -> str | None:
    return basis.workers[worker][0] if worker in basis.workers else None


def _sum(footers: Sequence[PartFooter]) -> PartFooter:
    """One footer that says of all parts together what each says of one."""
    summed: dict[str, Any] = {"nonce": "", "worker": "", "failures": None}
    for item in fields(PartFooter):
        if item.name in summed:
            continue
        values = [getattr(footer, item.name) for footer in footers]
        if isinstance(values[0], Mapping):
            total: dict[str, int] = {}
            for value in values:
                for name, count in value.items():
                    total[name] = total.get(name, 0) + count
            summed[item.name] = total
        else:
            summed[item.name] = sum(values)
    return PartFooter(**summed)


def _ranges(indexes: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges, both ends included."""
    ranges: list[tuple[int, int]] = []
    for index in indexes:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1] = ranges[-1][0], index
        else:
            ranges.append((index, index))
    return ranges
