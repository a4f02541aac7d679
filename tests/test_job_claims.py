"""Leases and progress on a plain store: who may claim, when, and what a claimant goes on from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchinfer.connectors.types import ObjectInfo
from batchinfer.engine.types import Completion, Decoded
from batchinfer.jobs.claims import GLANCES, Claims, Helpable, Lease
from batchinfer.jobs.feeder import Patience, helping_pays
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.prediction import WORKER_SECONDS
from batchinfer.jobs.progress import Progress, ProgressWriter, delete_progress, read_progress
from batchinfer.jobs.records import Claim, CommittedCount, Failure
from batchinfer.jobs.samples import Charge, Finished, Flight, Partial, SampleKey
from batchinfer.jobs.suspects import Suspicion


class TimedStore:
    """Objects and the store's time, which a test sets."""

    root = "memory://job"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.time = 1000.0
        self.calls: list[str] = []

    def create_exclusive(self, key: str, data: bytes | Path) -> bool:
        self.calls.append(f"create {key}")
        if key in self.objects:
            return False
        self.put(key, data)
        return True

    def put(self, key: str, data: bytes | Path) -> None:
        self.objects[key] = (data if isinstance(data, bytes) else data.read_bytes(), self.time)

    def get(self, key: str) -> bytes:
        return self._object(key)[0]

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self.get(key)[start:stop]

    def head(self, key: str) -> ObjectInfo:
        data, modified = self._object(key)
        return ObjectInfo(key, len(data), "", modified)

    def list(self, prefix: str) -> list[ObjectInfo]:
        self.calls.append(f"list {prefix}")
        return [self.head(key) for key in sorted(self.objects) if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def _object(self, key: str) -> tuple[bytes, float]:
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key]


NAMES = [ShardName(0, index, 4) for index in range(4)]


@pytest.fixture
def store() -> TimedStore:
    return TimedStore()


def claims_of(store: TimedStore, worker: str, hint: int | None = 0) -> Claims:
    return Claims(JobFolder(store), NAMES, worker, lambda: store.time, hint=hint)


def claim(claims: Claims) -> Lease | None:
    """What calling it again and again comes to, as a worker does."""
    for _ in range(GLANCES + 1):
        if (lease := claims.claim([])) is not None:
            return lease
    return None


def test_a_shard_has_one_owner_until_the_lease_is_stale_or_released(store: TimedStore) -> None:
    first, second = claims_of(store, "a"), claims_of(store, "b")
    leases = [first.claim([]) for _ in NAMES]
    assert sorted(lease.shard for lease in leases if lease) == NAMES
    assert claim(first) is None and claim(second) is None
    assert not second.all_committed()
    store.time += 59
    assert claim(second) is None
    assert leases[1] is not None and first.renew(leases[1])
    store.time += 2
    taken = [claim(second) for _ in range(4)]
    assert {lease.shard for lease in taken if lease} == {*NAMES} - {leases[1].shard}
    assert {lease.generation for lease in taken if lease} == {2}
    assert leases[0] is not None and not first.renew(leases[0]), "a zombie sees that it is one"
    first.release(leases[1])
    again = claim(second)
    assert again is not None and (again.shard, again.generation) == (leases[1].shard, 2)


def test_a_shard_has_one_helper_until_its_lease_is_stale(store: TimedStore) -> None:
    owner, second, third = (claims_of(store, name) for name in "abc")
    leases = [owner.claim([]) for _ in NAMES]
    assert second.claim([]) is None and third.claim([]) is None
    offer = second.helpable()[0]
    shard = offer.shard
    assert shard in NAMES and offer.generation == 1 and second.owner(offer) == "a"
    lease = second.help(offer)
    assert lease is not None and lease.helper
    assert third.help(offer) is None
    assert second.at_work(shard) == {"a", "b"}
    claim(third)
    assert shard not in [offer.shard for offer in third.helpable()]
    store.time += 50
    for owned in leases:
        assert owned is not None and owner.renew(owned)
    store.time += 50
    assert second.at_work(shard) == {"a"}, "the helper was not seen for too long"
    claim(third)
    store.put(NAMES[0].part, b"committed")
    offered = {offer.shard: offer.generation for offer in third.helpable()}
    if shard in offered:
        assert offered[shard] == 2
    committed = Helpable(NAMES[0], owner_generation=1, generation=7)
    assert second.help(committed) is None, "nobody helps with what is committed"
    assert third.help(replace(offer, generation=2)) is not None or shard == NAMES[0]
    assert not second.renew(lease)


@pytest.mark.parametrize(
    ("settled", "running", "pays"),
    [
        (0, 0, True),
        (1, 0, True),
        (10, 30, True),
        (10, 46, False),
        (40, 30, True),
        (41, 30, False),
        (99, 0, False),
    ],
)
def test_help_pays_while_more_rows_wait_than_run(settled: int, running: int, pays: bool) -> None:
    failures = {row: Failure(row, "x", "y") for row in range(settled)}
    running_rows = set(range(settled, settled + running))
    progress = Progress(failures=failures, running={"before": {99}, "owner": running_rows})
    assert helping_pays(100, progress, 1, "owner") is pays
    assert not helping_pays(100, progress, 1, "next"), "who has published nothing may be at any row"
    progress.suspicion = Suspicion(((99,),))
    assert not helping_pays(100, progress, 1, "owner")


def test_a_stale_lease_is_judged_by_a_fresh_look_only(store: TimedStore) -> None:
    first, second = claims_of(store, "a"), claims_of(store, "b")
    leases = [first.claim([]) for _ in NAMES]
    store.time += 61
    assert second.claim([]) is not None
    # The other leases were stale as well, but their owner is back since.
    for lease in leases:
        assert lease is not None
        first.renew(lease)
    assert second.claim([]) is None


def test_a_committed_shard_is_never_claimed(store: TimedStore) -> None:
    claims = claims_of(store, "a")
    for name in NAMES[:3]:
        store.put(name.part, b"x")
    lease = claims.claim([])
    assert lease is not None and lease.shard == NAMES[3]
    assert claims.claim([lease.shard]) is None
    assert not claims.all_committed()
    store.put(NAMES[3].part, b"x")
    assert claims.claim([]) is None and claims.all_committed()


def test_a_shard_committed_after_the_look_is_passed_over(store: TimedStore) -> None:
    claims = claims_of(store, "a")
    first = claims.claim([])
    assert first is not None
    others = [name for name in NAMES if name != first.shard]
    for name in others[:2]:
        store.put(name.part, b"x")
    lease = claims.claim([first.shard])
    assert lease is not None and lease.shard == others[2]


def test_hints_start_at_different_shards(store: TimedStore) -> None:
    shards = [ShardName(0, index, 1000) for index in range(1000)]
    starts = set()
    for hint in range(20):
        claims = Claims(JobFolder(TimedStore()), shards, "w", lambda: 0.0, hint=hint)
        lease = claims.claim([])
        assert lease is not None
        starts.add(lease.shard.index // 25)
    assert len(starts) == 20


def test_one_look_serves_many_claims(store: TimedStore) -> None:
    claims = claims_of(store, "a")
    for _ in NAMES:
        claims.claim([])
    assert len([call for call in store.calls if call.startswith("list _batchinfer/claims/")]) == 1


def many(store: TimedStore, shards: int, worker: str) -> Claims:
    names = [ShardName(0, index, shards) for index in range(shards)]
    return Claims(JobFolder(store), names, worker, lambda: store.time, hint=0)


def test_a_look_at_many_leases_reads_a_few_and_finds_the_released_one(store: TimedStore) -> None:
    owner = many(store, 300, "a")
    leases = [lease for _ in range(300) if (lease := owner.claim([])) is not None]
    assert len({lease.shard for lease in leases}) == 300
    store.time += 20
    owner.release(leases[200])
    store.time += 20
    for lease in leases:
        if lease is not leases[200]:
            owner.renew(lease)
    reads: list[str] = []
    get = store.get
    store.get = lambda key: (reads.append(key), get(key))[1]  # type: ignore[method-assign]
    found = many(store, 300, "b").claim([])
    assert found is not None and (found.shard, found.generation) == (leases[200].shard, 2)
    assert len(reads) <= 64


def lists(store: TimedStore) -> Counter[str]:
    """How often what was listed."""
    found = Counter(call.split()[1] for call in store.calls if call.startswith("list "))
    store.calls.clear()
    return found


def test_a_worker_that_finds_nothing_glances_at_the_parts_between_its_looks(store: TimedStore) -> None:
    owner = many(store, 640, "a")
    leases = [lease for _ in range(640) if (lease := owner.claim([])) is not None]
    idle = many(store, 640, "b")
    store.put("_batchinfer/workers/b.json", b"{}")
    store.calls.clear()
    assert [idle.claim([]) for _ in range(2 * (GLANCES + 1))] == [None] * 2 * (GLANCES + 1)
    assert lists(store) == {
        "part-00": 2 * (GLANCES + 1),
        "_batchinfer/claims/00": 2,
        "_batchinfer/workers/": 1,
    }
    idle.claim([])
    for lease in leases:
        store.put(lease.shard.part, b"x")
    store.calls.clear()
    assert idle.claim([]) is None and idle.all_committed(), "a glance is enough to see the end"
    assert store.calls == ["list part-00"]


def test_workers_poll_the_more_seldom_the_more_there_are(store: TimedStore) -> None:
    owner = many(store, 40, "a")
    while owner.claim([]) is not None:
        pass
    waits = []
    for workers in (1, 10, 100, 1000, 100_000):
        for number in range(workers):
            store.put(f"_batchinfer/workers/{number}.json", b"{}")
        idle = many(store, 40, "0")
        assert idle.claim([]) is None
        waits.append(idle.least_wait())
        del store.objects["_batchinfer/workers/0.json"]
    assert waits == [1 / 200, 10 / 200, 100 / 200, 1000 / 200, 60.0]


def seconds_until_seen(after: float) -> float:
    """How long after something happened, ``after`` seconds from its first poll on, an idle worker looks."""
    patience, at = Patience(15 / (GLANCES + 1)), 0.0
    while at < after:
        at += patience.next(0.0)
    return at - after


def test_an_idle_worker_sees_the_end_soon_after_it() -> None:
    for tenths in range(1, 1000):
        assert seconds_until_seen(tenths / 10) <= min(0.25 + 0.1 * tenths / 10, 3.75) + 1e-9
    # What a prediction takes for it, beside 1.1 s for the worker's own beginning and end.
    seen = [seconds_until_seen(tenths / 10) for tenths in range(1, 101)]
    assert sum(seen) / len(seen) == pytest.approx(WORKER_SECONDS - 1.1, abs=0.1)


# -- jobs of more than one region -------------------------------------------------------------------


def test_a_look_at_a_large_job_is_at_one_region(store: TimedStore) -> None:
    claims = many(store, 5000, "a")
    store.calls.clear()
    lease = claims.claim([])
    assert lease is not None and lease.shard.index == 0
    assert lists(store) == {"part-00": 1, "_batchinfer/claims/00": 1}


STATES = ["free", "stale", "released", "leased", "done"]


@given(st.integers(0, 2), st.lists(st.sampled_from(STATES), min_size=1))
def test_whoever_looks_again_and_again_gets_all_there_is_and_sees_the_end(
    digits: int, states: list[str]
) -> None:
    store = TimedStore()
    folder = JobFolder(store)
    names = [ShardName(0, index, len(states)) for index in range(len(states))]
    for name, state in zip(names, states, strict=True):
        store.time = 1000.0 if state == "stale" else 1100.0
        if state == "done":
            store.put(name.part, b"x")
        elif state != "free":
            claim = Claim(worker="other", nonce="n", released=state == "released")
            assert folder.create_claim(name, 1, claim)
    store.time = 1100.0
    claims = Claims(folder, names, "me", lambda: store.time, region_digits=digits)
    # Eight leases are read at each look: those of others hide released ones for as many looks.
    taken = []
    for _ in range((GLANCES + 2) * (len(states) + 1)):
        if (lease := claims.claim([lease.shard for lease in taken])) is not None:
            taken.append(lease)
        for name, state in zip(names, states, strict=True):
            if state == "leased" and name.part not in store.objects:
                store.time += 0.001
                folder.rewrite_claim(name, 1, Claim(worker="other", nonce="n"))
    wanted = {
        (name, 1 if state == "free" else 2)
        for name, state in zip(names, states, strict=True)
        if state not in ("done", "leased")
    }
    assert {(lease.shard, lease.generation) for lease in taken} == wanted
    for name in names:
        assert not claims.all_committed() or all(other.part in store.objects for other in names)
        store.put(name.part, b"x")
    for _ in range(GLANCES + 1 + len(names)):
        claims.claim([])
    assert claims.all_committed()


def test_one_counts_the_committed_shards_for_all(store: TimedStore) -> None:
    folder = JobFolder(store)
    names = [ShardName(0, index, 40) for index in range(40)]
    workers = [f"w{number:02d}" for number in range(30)]
    claims = {
        worker: Claims(folder, names, worker, lambda: store.time, region_digits=1) for worker in workers
    }
    for name in names:
        assert folder.create_claim(name, 1, Claim(worker="owner", nonce="n"))
    spread = [*names[::4], *names[1::4], *names[2::4], *names[3::4]]
    for name in spread[:30]:
        store.put(name.part, b"x")

    def too_many() -> list[str]:
        for worker in workers:
            store.put(f"_batchinfer/workers/{worker}.json", b"{}")
        store.calls.clear()
        found = set()
        for worker in workers * (GLANCES + 1):
            assert claims[worker].claim([]) is None
            if claims[worker].is_surplus():
                found.add(worker)
        return sorted(found)

    # Ten shards are open, so there are places for twenty workers.
    assert too_many() == workers[20:]
    assert lists(store)["part-"] == 1
    for name in spread[30:38]:
        store.put(name.part, b"x")
    assert set(too_many()) >= set(workers[20:])
    assert lists(store)["part-"] == 0, "a count serves for ten seconds"
    store.time += 11
    assert too_many() == workers[4:]
    assert lists(store)["part-"] <= 1


def forty_taken(store: TimedStore, round: int) -> tuple[list[ShardName], Claims]:
    """Forty shards in four regions, all of them another's, and the claims of a worker without work."""
    folder = JobFolder(store)
    names = [ShardName(round, index, 40) for index in range(40)]
    store.put("_batchinfer/workers/w.json", b"{}")
    for name in names:
        assert folder.create_claim(name, 1, Claim(worker="owner", nonce="n"))
    return names, Claims(folder, names, "w", lambda: store.time, region_digits=1)


def test_helpers_are_offered_shards_of_every_region(store: TimedStore) -> None:
    folder = JobFolder(store)
    names = [ShardName(0, index, 30) for index in range(30)]
    for name in names:
        assert folder.create_claim(name, 1, Claim(worker="owner", nonce="n"))
    claims = Claims(folder, names, "w", lambda: store.time, region_digits=1)
    assert claims.claim([]) is None
    assert sorted(offer.shard.index // 10 for offer in claims.helpable()) == [0, 1, 2]
    assert claims.helpable() == [], "each is offered once"


def test_who_has_just_finished_a_shard_looks_at_once(store: TimedStore) -> None:
    folder = JobFolder(store)
    claims = Claims(folder, NAMES, "w", lambda: store.time, hint=0)
    mine = claims.claim([])
    assert mine is not None
    for name in NAMES[1:]:
        assert folder.create_claim(name, 1, Claim(worker="owner", nonce="n"))
    assert claims.claim([mine.shard]) is None and claims.claim([mine.shard]) is None
    store.put(mine.shard.part, b"x")
    store.time += 61
    assert claims.claim([]) is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"round": 0, "committed": 40}', b'{"round": 0, "committed": "40", "at": 1}'],
)
def test_a_count_that_cannot_be_read_is_made_anew(store: TimedStore, content: bytes) -> None:
    folder = JobFolder(store)
    _, claims = forty_taken(store, 0)
    assert claims.claim([]) is None
    store.put("_batchinfer/committed.json", content)
    assert folder.read_count() is None
    assert not claims.is_surplus()
    assert folder.read_count() == CommittedCount(round=0, committed=0, at=store.time)


def test_a_count_of_the_future_is_none(store: TimedStore) -> None:
    folder = JobFolder(store)
    _, claims = forty_taken(store, 0)
    folder.write_count(CommittedCount(round=0, committed=39, at=store.time + 1000))
    assert claims.claim([]) is None and not claims.is_surplus()
    assert folder.read_count() == CommittedCount(round=0, committed=0, at=store.time)


@pytest.mark.parametrize("true", [True, False])
def test_nobody_takes_anothers_word_for_it_that_all_is_done(store: TimedStore, true: bool) -> None:
    folder = JobFolder(store)
    names, claims = forty_taken(store, 0)
    assert claims.claim([]) is None
    for name in names if true else names[1:]:
        store.put(name.part, b"x")
    folder.write_count(CommittedCount(round=0, committed=40, at=store.time))
    # Not too many either: the next round may have begun.
    assert not claims.is_surplus()
    assert claims.all_committed() is true


def test_the_count_of_another_round_says_nothing(store: TimedStore) -> None:
    folder = JobFolder(store)
    _, claims = forty_taken(store, 1)
    folder.write_count(CommittedCount(round=0, committed=40, at=store.time))
    assert claims.claim([]) is None and not claims.is_surplus()
    assert folder.read_count() == CommittedCount(round=1, committed=0, at=store.time)


def test_whoever_loses_a_race_goes_on_elsewhere(store: TimedStore) -> None:
    first, second = many(store, 200, "a"), many(store, 200, "b")
    looked = second.claim([])
    assert looked is not None and looked.shard.index == 0
    taken = [first.claim([]) for _ in range(3)]
    assert [lease.shard.index for lease in taken if lease] == [1, 2, 3]
    found = second.claim([])
    assert found is not None and found.shard.index > 20


# -- progress ---------------------------------------------------------------------------------------


def done(row: int, sample: int = 0, text: str = "x") -> Finished:
    completion = Completion(
        index=row,
        sample_index=sample,
        text=text,
        token_ids=(1,),
        finish_reason="stop",
        prompt_tokens=1,
        cached_tokens=0,
        prefill_ns=2,
        token_ns=(3,),
    )
    return Finished(completion, (Charge("w", None, 2, 3, 1),))


def partial(tokens: int) -> Partial:
    return Partial(Decoded((7,) * tokens, (1,) * tokens, 5), (Charge("w", None, 5, tokens, tokens),))


def test_progress_is_the_union_over_workers_and_generations(store: TimedStore) -> None:
    folder, shard = JobFolder(store), NAMES[0]
    a, b = ProgressWriter(folder, shard, "a"), ProgressWriter(folder, shard, "b")
    a.write([done(1)], [], Flight({SampleKey(2, 0): partial(2), SampleKey(3, 0): partial(1)}))
    b.write([done(4)], [Failure(5, "too_long", "it is")], Flight({SampleKey(2, 0): partial(6)}))
    a.write([done(3)], [], Flight({SampleKey(2, 0): partial(4)}))
    found = read_progress(folder, shard)
    assert found is not None
    assert set(found.samples) == {SampleKey(1, 0), SampleKey(3, 0), SampleKey(4, 0)}
    assert found.partials == {SampleKey(2, 0): partial(6)}
    assert found.failures[5].code == "too_long"
    # What was in flight in an earlier object of the same worker is replaced by the later one.
    inflight = [item for item in folder.list_progress(shard) if item.inflight]
    assert [(item.worker, item.sequence) for item in inflight] == [("a", 1), ("b", 0)]


def test_a_worker_that_comes_back_never_rewrites_its_progress(store: TimedStore) -> None:
    folder, shard = JobFolder(store), NAMES[0]
    ProgressWriter(folder, shard, "a").write([done(1)], [], Flight({}))
    ProgressWriter(folder, shard, "a").write([done(2)], [], Flight({}))
    found = read_progress(folder, shard)
    assert found is not None and set(found.samples) == {SampleKey(1, 0), SampleKey(2, 0)}


def test_the_first_copy_of_a_row_counts(store: TimedStore) -> None:
    folder, shard = JobFolder(store), NAMES[0]
    ProgressWriter(folder, shard, "a").write([done(1, text="same")], [], Flight({}))
    ProgressWriter(folder, shard, "b").write([done(1, text="same")], [], Flight({}))
    found = read_progress(folder, shard)
    assert found is not None and list(found.samples) == [SampleKey(1, 0)]


def test_progress_deleted_under_a_reader_means_look_for_the_part(store: TimedStore) -> None:
    folder, shard = JobFolder(store), NAMES[0]
    writer = ProgressWriter(folder, shard, "a")
    writer.write([done(1)], [], Flight({SampleKey(2, 0): partial(2)}))
    get = store.get

    def get_after_commit(key: str) -> bytes:
        store.put(shard.part, b"x")
        delete_progress(JobFolder(store), shard)
        return get(key)

    store.get = get_after_commit  # type: ignore[method-assign]
    assert read_progress(folder, shard) is None


def test_an_object_replaced_under_a_reader_is_read_anew(store: TimedStore) -> None:
    folder, shard = JobFolder(store), NAMES[0]
    writer = ProgressWriter(folder, shard, "a")
    writer.write([], [], Flight({SampleKey(2, 0): partial(2)}))
    get, times = store.get, [1]

    def get_after_flush(key: str) -> bytes:
        if times:
            times.clear()
            writer.write([], [], Flight({SampleKey(2, 0): partial(5)}))
        return get(key)

    store.get = get_after_flush  # type: ignore[method-assign]
    found = read_progress(folder, shard)
    assert found is not None and found.partials == {SampleKey(2, 0): partial(5)}


def test_workers_beyond_the_places_at_open_shards_are_too_many_and_no_others(store: TimedStore) -> None:
    workers = [f"w{number}" for number in range(9)]
    everybody = {worker: claims_of(store, worker) for worker in workers}
    folder = JobFolder(store)

    def too_many() -> list[str]:
        found = []
        for worker in workers[1:]:
            store.put(f"_batchinfer/workers/{worker}.json", b"{}")
        for worker in workers[1:]:
            for _ in range(GLANCES + 1):
                everybody[worker].claim([])
                if everybody[worker].is_surplus():
                    found.append(worker)
        return found

    store.put("_batchinfer/workers/w0.json", b"{}")
    for name in NAMES:
        assert folder.create_claim(name, 1, Claim(worker="w0", nonce="n"))
    assert too_many() == ["w8"]  # four shards are open
    for done, last in [(0, 6), (1, 4), (2, 2)]:
        store.put(NAMES[done].part, b"part")
        assert too_many() == workers[last:]
    # Those that were not heard of for a lease are not counted.
    store.time += 61
    store.put(f"_batchinfer/claims/{NAMES[3].label}/0001.json", Claim(worker="w0", nonce="n").to_bytes())
    assert too_many() == workers[3:]
