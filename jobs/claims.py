"""Leases on shards: claimed by creating a generation, renewed by rewriting it, lost by going stale.

A lease only saves work: whoever creates a shard's part has committed it, with or without a lease.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from batchinfer.jobs.folder import JobFolder, ShardName, new_nonce
from batchinfer.jobs.records import Claim

LEASE_SECONDS = 60.0
RENEWALS_PER_LEASE = 4
_LOST_IN_A_ROW = 3
# How many shards one look remembers as free, and how many leases it reads to see whether they are released:
# a look at a job of many shards must neither fill the memory nor read what thousands of others renew.
_CANDIDATES = 256
_READS = 64
# Where that many leases were seen at once, workers that find nothing look at all of the folder this much
# more seldom, up to a limit, and look at a few shards meanwhile: together they see as much.
_LEASES_PER_LOOK = 64
_MOST_SKIPPED = 16
_SAMPLE = 4
# How many shards one look considers for help.
_TO_HELP = 3
# How many workers an open shard has a place for: its owner, and a helper.
_PLACES = 2


@dataclass(frozen=True, slots=True)
class Lease:
    """A shard's lease that we hold, as its owner or as its ``helper``: its generation, and the claim as
    last written."""

    shard: ShardName
    generation: int
    claim: Claim
    helper: bool = False


@dataclass(slots=True)
class Survey:
    """What a look at the folder showed: how many shards are committed, and which may be claimed, each
    with the generation to create.

    ``free`` ones have no owner, so the create alone decides who gets them, however old the survey; there
    may be more than were noted.
    ``stale`` ones had an owner that was silent for too long: true only at the time of the survey.
    ``helpable`` ones have an owner, and no helper: with the generation of the helper's lease.
    """

    committed: int
    free: deque[tuple[ShardName, int]]
    stale: deque[tuple[ShardName, int]]
    helpable: list[tuple[ShardName, int]]


class Claims:
    """Claims shards for one worker.

    ``now`` writes the worker's heartbeat and returns the store's time of it: the only clock by which a
    lease is judged. It is read before the leases are listed, so a lease renewed in between looks young.
    ``hint`` is where to start among the shards (a batch service's index), so that workers that start
    together do not race for the same ones.
    """

    def __init__(
        self,
        folder: JobFolder,
        shards: Sequence[ShardName],
        worker: str,
        now: Callable[[], float],
        lease_seconds: float = LEASE_SECONDS,
        hint: int | None = None,
    ) -> None:
        self._folder = folder
        self._worker = worker
        self._now = now
        self._lease_seconds = lease_seconds
        self._hint = hint
        self.begin(shards)

    def begin(self, shards: Sequence[ShardName]) -> None:
        """From now on these are the shards: those of one round."""
        start = _start(len(shards), self._worker, self._hint)
        self._shards = len(shards)
        self._open = [*shards[start:], *shards[:start]]
        self._looks = 0
        self._most_leased = 0
        self._skipped = 0
        self._found_nothing = False
        self._survey: Survey | None = None

    def claim(self, held: Collection[ShardName]) -> Lease | None:
        """A lease on some shard that is not committed, not in ``held``, and free, released or stale.

        None when there is none: every shard is committed, or leased by a worker that may be alive.
        """
        if self._survey is not None:
            lease = self._claim_from(self._survey.free, held)
            if lease is not None:
                return lease
            if self._found_nothing and not self._due():
                return None
        self._survey = self.survey(held)
        self._found_nothing = not (self._survey.free or self._survey.stale)
        return self._claim_from(self._survey.free, held) or self._claim_from(self._survey.stale, held)

    def _due(self) -> bool:
        """Whether to look at the whole folder again, the last look having found nothing to claim."""
        self._skipped += 1
        if self._skipped > min(_MOST_SKIPPED, self._most_leased // _LEASES_PER_LOOK):
            return True
        start = _start(len(self._open), f"{self._worker} {self._looks} {self._skipped}", None)
        sample = [
            *self._open[start : start + _SAMPLE],
            *self._open[: max(0, start + _SAMPLE - len(self._open))],
        ]
        # Most of what was open is committed: the end is near.
        return all(self._folder.is_committed(shard) for shard in sample)

    def helpable(self) -> list[tuple[ShardName, int]]:
        """Some shards that the last look found in somebody's hands and without a helper, each look's but
        once; see :meth:`help`."""
        if self._survey is None:
            return []
        some, self._survey.helpable = self._survey.helpable[:_TO_HELP], []
        return some

    def help(self, shard: ShardName, generation: int) -> Lease | None:
        """Become the shard's one helper; None where another one was faster, or the shard is committed."""
        claim = Claim(worker=self._worker, nonce=new_nonce())
        if not self._folder.create_claim(shard, generation, claim, helper=True):
            return None
        if self._folder.is_committed(shard):
            return None
        return Lease(shard, generation, claim, helper=True)

    def at_work(self, shard: ShardName) -> set[str]:
        """The workers whose lease on the shard is neither stale nor released: its owner, its helper."""
        now = self._now()
        found = set()
        for helper, leases in enumerate(self._folder.list_leases(shard)):
            for generations in leases.values():
                last = max(generations)
                if now - generations[last].modified <= self._lease_seconds:
                    claim = self._folder.read_claim(shard, last, bool(helper))
                    if not claim.released:
                        found.add(claim.worker)
        return found

    def is_surplus(self) -> bool:
        """Whether open shards have places for fewer workers than there are, and the last of these are we:
        in an order by name, which all see alike, so that never more leave than are too many.

        Who left or died within the last lease still counts. What that leaves too few are never the owners
        of open shards, who hold them and stay.
        """
        listed = self._folder.list_workers()
        if self._survey is None or self._worker not in listed:
            return False
        since = listed[self._worker].modified - self._lease_seconds
        fresh = sorted(worker for worker, info in listed.items() if info.modified >= since)
        return fresh.index(self._worker) >= _PLACES * (self._shards - self._survey.committed)

    def all_committed(self) -> bool:
        """Whether the last look at the folder found every shard committed."""
        return self._survey is not None and self._survey.committed == self._shards

    def survey(self, held: Collection[ShardName]) -> Survey:
        """Look at the folder.

        The first look starts where the hint says, every other one anywhere: workers that have run into
        each other would do so again at the next shard.
        """
        now = self._now()
        owners, helpers = self._folder.list_leases()
        committed = self._folder.committed()
        self._open = [shard for shard in self._open if shard not in committed]
        if self._looks:
            start = _start(len(self._open), f"{self._worker} {self._looks}", None)
            self._open = [*self._open[start:], *self._open[:start]]
        self._looks += 1
        free: deque[tuple[ShardName, int]] = deque()
        stale: deque[tuple[ShardName, int]] = deque()
        leased: list[tuple[float, ShardName, int]] = []
        for shard in self._open:
            if shard in held:
                continue
            generations = owners.get(shard.label)
            if not generations:
                free.append((shard, 1))
                if len(free) == _CANDIDATES:
                    break
                continue
            last = max(generations)
            if now - generations[last].modified > self._lease_seconds:
                stale.append((shard, last + 1))
            else:
                leased.append((generations[last].modified, shard, last))
        self._skipped, self._most_leased = 0, max(self._most_leased, len(leased))
        # One that is released is not renewed any more, so it is among those that were longest silent.
        released = set()
        for _, shard, last in heapq.nsmallest(_READS, leased):
            if self._folder.read_claim(shard, last).released:
                free.append((shard, last + 1))
                released.add(shard)
        helpable = []
        for _, shard, _ in leased:
            generations = helpers.get(shard.label, {})
            last = max(generations, default=0)
            helped = last > 0 and now - generations[last].modified <= self._lease_seconds
            if not helped and shard not in released:
                helpable.append((shard, last + 1))
        return Survey(self._shards - len(self._open), free, stale, helpable)

    def renew(self, lease: Lease) -> bool:
        """Rewrite our generation; False when there is a newer one, so the shard is somebody else's."""
        self._folder.rewrite_claim(lease.shard, lease.generation, lease.claim, lease.helper)
        return not self.superseded(lease)

    def superseded(self, lease: Lease) -> bool:
        """Whether a newer generation of the lease exists."""
        try:
            self._folder.read_claim(lease.shard, lease.generation + 1, lease.helper)
        except FileNotFoundError:
            return False
        return True

    def release(self, lease: Lease) -> None:
        """Give the shard up before its lease goes stale; nobody may renew it any more."""
        released = replace(lease.claim, released=True)
        self._folder.rewrite_claim(lease.shard, lease.generation, released, lease.helper)

    def _claim_from(
        self, candidates: deque[tuple[ShardName, int]], held: Collection[ShardName]
    ) -> Lease | None:
        lost_in_a_row = 0
        while candidates and lost_in_a_row < _LOST_IN_A_ROW:
            shard, generation = candidates.popleft()
            if shard in held:
                continue
            claim = Claim(worker=self._worker, nonce=new_nonce())
            if not self._folder.create_claim(shard, generation, claim):
                lost_in_a_row += 1
                # Somebody walks just ahead of us: go on elsewhere.
                candidates.rotate(len(candidates) * 3 // 8)
            # Its last owner may have committed it between our look and our claim.
            elif not self._folder.is_committed(shard):
                return Lease(shard, generation, claim)
        if lost_in_a_row:
            # Others claim what we are about to: look again before trying further.
            candidates.clear()
        return None


def _start(shards: int, worker: str, hint: int | None) -> int:
    """Where to start: hints are spread by the golden ratio, whatever their number will be."""
    if shards == 0:
        return 0
    if hint is None:
        share = int.from_bytes(hashlib.sha256(worker.encode()).digest()[:4], "big") / 2**32
    else:
        share = hint * 0.6180339887498949 % 1.0
    return int(share * shards)
