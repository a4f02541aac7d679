"""Leases on shards: claimed by creating a generation, renewed by rewriting it, lost by going stale.

A lease only saves work: whoever creates a shard's part has committed it, with or without a lease.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from batchinfer.jobs.folder import JobFolder, ShardName, new_nonce
from batchinfer.jobs.records import Claim, CommittedCount

LEASE_SECONDS = 60.0
RENEWALS_PER_LEASE = 4
REGION_DIGITS = 3
_LOST_IN_A_ROW = 3
# How many shards one look remembers as free, and how many leases it reads to see whether they are released:
# the longest silent ones, and all that were not renewed when they should have been. A look at a job of many
# shards must not read what thousands of others renew.
_CANDIDATES = 256
_READS = 64
_READS_OF_RENEWED = 8
# How many regions are looked at in a row by a worker that found something the last time, and by all those
# together that found nothing.
_LOOKS = 8
_LOOKS_IN_VAIN = 32
# Between two looks of a worker that finds nothing come glances, which see only whether all is done.
GLANCES = 3
# How often all workers that find nothing look or glance together, at most, in a second.
_POLLS_PER_SECOND = 200.0
# How long a count of the committed shards serves all workers, in seconds.
_COUNT_SECONDS = 10.0
# How many shards one look considers for help where there is one region; of several regions it is one each.
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


@dataclass(frozen=True, slots=True)
class Helpable:
    """A shard that has an owner and no helper: the generation of the owner's lease, and the one to create
    for a helper's."""

    shard: ShardName
    owner_generation: int
    generation: int


@dataclass(slots=True)
class Survey:
    """What a look at a region showed: which shards may be claimed, each with the generation to create.

    ``free`` ones have no owner, so the create alone decides who gets them, however old the survey; there
    may be more than were noted.
    ``stale`` ones had an owner that was silent for too long: true only at the time of the survey.
    ``helpable`` ones have an owner, and no helper.
    """

    free: deque[tuple[ShardName, int]]
    stale: deque[tuple[ShardName, int]]
    helpable: list[Helpable]


class Claims:
    """Claims shards for one worker.

    ``now`` writes the worker's heartbeat and returns the store's time of it: the only clock by which a
    lease is judged. It is read before the leases are listed, so a lease renewed in between looks young.
    ``hint`` is where to start among the shards (a batch service's index), so that workers that start
    together do not race for the same ones.

    Shards whose labels differ in the last ``region_digits`` only are a region, which a page or two of a
    listing show. A look is at one region: each worker goes round all that have open shards, in an order of
    its own, and so sees every shard however many others there are.
    """

    def __init__(
        self,
        folder: JobFolder,
        shards: Sequence[ShardName],
        worker: str,
        now: Callable[[], float],
        lease_seconds: float = LEASE_SECONDS,
        hint: int | None = None,
        region_digits: int = REGION_DIGITS,
    ) -> None:
        self._folder = folder
        self._worker = worker
        self._now = now
        self._lease_seconds = lease_seconds
        self._hint = hint
        self._digits = region_digits
        self._chance = random.Random(worker)
        self._workers = 1
        self._workers_seen: float | None = None
        self.begin(shards)

    def begin(self, shards: Sequence[ShardName]) -> None:
        """From now on these are the shards: those of one round."""
        start = _start(len(shards), self._worker, self._hint)
        self._shards = len(shards)
        self._round = shards[0].round if shards else 0
        self._every = shards[0].round_label if shards else ""
        regions: dict[int, list[ShardName]] = {}
        for shard in [*shards[start:], *shards[:start]]:
            regions.setdefault(shard.index // 10**self._digits, []).append(shard)
        self._open = {region[0].region(self._digits): region for region in regions.values()}
        first, *others = self._open or [""]
        self._chance.shuffle(others)
        self._tour = deque([first, *others])
        self._counted_open = self._shards
        self._looks = 0
        self._glances = 0
        self._found_nothing = False
        self._held: frozenset[ShardName] = frozenset()
        self._survey: Survey | None = None
        self._helpable: list[Helpable] = []

    def claim(self, held: Collection[ShardName]) -> Lease | None:
        """A lease on some shard that is not committed, not in ``held``, and free, released or stale.

        None when none was seen: the shards that were looked at are committed, or leased by workers that
        may be alive. Whoever calls it again and again gets every shard that may be had.
        """
        if self._survey is not None:
            lease = self._claim_from(self._survey.free, held)
            if lease is not None:
                return lease
            if self._found_nothing and self._held == frozenset(held) and self._glance():
                return None
        self._held = frozenset(held)
        now = self._now()
        looks = max(1, _LOOKS_IN_VAIN // self._workers) if self._found_nothing else _LOOKS
        looks = min(looks, len(self._open))
        self._found_nothing = True
        self._helpable = []
        while looks > 0 and self._open:
            region = self._next_region()
            survey = self._survey = self._look(now, region, held)
            self._helpable += survey.helpable[: 1 if len(self._open) > 1 else _TO_HELP]
            if survey.free or survey.stale:
                self._found_nothing = False
            lease = self._claim_from(survey.free, held) or self._claim_from(survey.stale, held)
            if lease is not None:
                return lease
            # A region that turns out to be done took one request, and is never looked at again.
            looks -= region in self._open
        if self._workers_seen is None or now - self._workers_seen > self._lease_seconds:
            self._fresh_workers()
        return None

    def _next_region(self) -> str:
        """The next region of our tour that has open shards."""
        while self._tour[0] not in self._open:
            self._tour.popleft()
        self._tour.rotate(-1)
        return self._tour[-1]

    def _glance(self) -> bool:
        """Whether no look is due, the last one having found nothing: then only whether the last region is
        done meanwhile is seen, by one request. Where there are several, each look is at another one."""
        if len(self._open) != 1 or self._glances == GLANCES:
            self._glances = 0
            return False
        self._glances += 1
        [region] = self._open
        self._strike(region, self._folder.committed(region))
        return True

    def least_wait(self) -> float:
        """How long to wait, at least, before the next claim when the last one gave nothing: the longer, the
        more workers there are, so that the store has no more to do for many than for some. Not as long
        where there was something and others were faster."""
        cost = GLANCES + 1 if len(self._open) > 1 and self._found_nothing else 1
        return min(self._lease_seconds, cost * self._workers / _POLLS_PER_SECOND)

    def helpable(self) -> list[Helpable]:
        """Some shards that the last claim's looks found in somebody's hands and without a helper, each
        claim's but once; see :meth:`help`."""
        some, self._helpable = self._helpable, []
        return some

    def owner(self, offer: Helpable) -> str:
        """The worker in whose hands the shard was seen."""
        return self._folder.read_claim(offer.shard, offer.owner_generation).worker

    def help(self, offer: Helpable) -> Lease | None:
        """Become the shard's one helper; None where another one was faster, or the shard is committed."""
        shard, generation = offer.shard, offer.generation
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
        for helper, leases in enumerate(self._folder.list_leases(f"{shard.label}/")):
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
        of open shards, who hold them and stay while they live. Judged after a look, not after a glance.
        """
        if self._glances or self._survey is None:
            return False
        fresh, now = self._fresh_workers()
        if self._worker not in fresh:
            return False
        place = fresh.index(self._worker)
        if place < _PLACES * self._known_open() and len(self._open) > 1:
            self._count(now)
        # When nothing is open any more the job is done, or its next round begins.
        return bool(self._open) and place >= _PLACES * min(self._known_open(), self._counted_open)

    def _fresh_workers(self) -> tuple[list[str], float]:
        """The workers that showed themselves within a lease before our last heartbeat, by name, and the
        time of that."""
        listed = self._folder.list_workers()
        now = listed[self._worker].modified if self._worker in listed else 0.0
        since = now - self._lease_seconds
        fresh = sorted(worker for worker, info in listed.items() if info.modified >= since)
        self._workers, self._workers_seen = max(1, len(fresh)), now
        return fresh, now

    def _known_open(self) -> int:
        """How many shards we do not know to be committed."""
        return sum(map(len, self._open.values()))

    def _count(self, now: float) -> None:
        """Learn how many shards are open, of all regions: from what somebody counted of late, or else by
        counting for everybody. Others' word is enough to see that we are too many, not that all is done."""
        count = self._folder.read_count()
        fresh = count is not None and count.round == self._round and 0 <= now - count.at <= _COUNT_SECONDS
        if count is None or not fresh or count.committed >= self._shards:
            # Said before it is done, so that the others leave it to us: what we know, which may be less.
            self._folder.write_count(self._known_count(now))
            parts = self._folder.committed(self._every)
            for region in list(self._open):
                self._strike(region, parts)
            count = self._known_count(now)
            self._folder.write_count(count)
        self._counted_open = self._shards - count.committed

    def _known_count(self, now: float) -> CommittedCount:
        """How many shards we know to be committed."""
        return CommittedCount(round=self._round, committed=self._shards - self._known_open(), at=now)

    def _strike(self, region: str, committed: Collection[ShardName]) -> None:
        """Forget the shards of a region that are committed, and the region with its last one."""
        left = [shard for shard in self._open[region] if shard not in committed]
        if left:
            self._open[region] = left
        else:
            del self._open[region]

    def all_committed(self) -> bool:
        """Whether every shard was seen to be committed."""
        return not self._open

    def _look(self, now: float, region: str, held: Collection[ShardName]) -> Survey:
        """Look at a region; ``now`` was read before.

        The first look starts where the hint says, every other one anywhere: workers that have run into
        each other would do so again at the next shard.
        """
        self._strike(region, self._folder.committed(region))
        survey = Survey(deque(), deque(), [])
        if region not in self._open:
            return survey
        owners, helpers = self._folder.list_leases(region)
        shards = self._open[region]
        if self._looks:
            start = _start(len(shards), f"{self._worker} {self._looks}", None)
            shards = self._open[region] = [*shards[start:], *shards[:start]]
        self._looks += 1
        leased: list[tuple[float, ShardName, int]] = []
        for shard in shards:
            if shard in held:
                continue
            generations = owners.get(shard.label)
            if not generations:
                survey.free.append((shard, 1))
                if len(survey.free) == _CANDIDATES:
                    break
                continue
            last = max(generations)
            if now - generations[last].modified > self._lease_seconds:
                survey.stale.append((shard, last + 1))
            else:
                leased.append((generations[last].modified, shard, last))
        released = set() if survey.free else self._released(now, leased)
        survey.free.extend((shard, last + 1) for _, shard, last in leased if shard in released)
        for _, shard, owned in leased:
            generations = helpers.get(shard.label, {})
            last = max(generations, default=0)
            helped = last > 0 and now - generations[last].modified <= self._lease_seconds
            if not helped and shard not in released:
                survey.helpable.append(Helpable(shard, owned, last + 1))
        return survey

    def _released(self, now: float, leased: list[tuple[float, ShardName, int]]) -> set[ShardName]:
        """Those of the leases that are released: they are not renewed any more, so they are among those
        that were longest silent."""
        overdue = now - 1.25 * self._lease_seconds / RENEWALS_PER_LEASE
        longest = heapq.nsmallest(_READS, leased)
        return {
            shard
            for place, (modified, shard, last) in enumerate(longest)
            if (place < _READS_OF_RENEWED or modified < overdue)
            and self._folder.read_claim(shard, last).released
        }

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
