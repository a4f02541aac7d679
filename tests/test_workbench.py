"""What a worker gives to its engine: on a trial, the group of suspects and nobody else."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from batchinfer.connectors.storage import open_store
from batchinfer.connectors.types import InputFile, Split
from batchinfer.engine.types import Completion, Decoded, Request
from batchinfer.jobs.claims import Lease
from batchinfer.jobs.clock import SystemClock
from batchinfer.jobs.cost import Ledger
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.open_shard import OpenShard
from batchinfer.jobs.progress import Progress, ProgressReader, ProgressWriter
from batchinfer.jobs.records import Claim
from batchinfer.jobs.samples import Charge, Partial, SampleKey
from batchinfer.jobs.suspects import EngineDeath, Suspicion
from batchinfer.jobs.types import Shard
from batchinfer.jobs.workbench import Workbench

ROWS = 12


def a_bench(suspicion: Suspicion, elsewhere: frozenset[int]) -> Workbench:
    """With one shard of ``ROWS`` rows, all of them read, of which another's engine has ``elsewhere``."""
    clock = SystemClock()
    bench = Workbench(clock, Ledger(clock.now_ns()), "w", None, 100)
    name = ShardName(0, 0, 1)
    split = Split(InputFile("input.jsonl", 1, "etag", "jsonl", "none"), "rows", 0, ROWS, 0, ROWS)
    writer = ProgressWriter(JobFolder(open_store("memory://workbench")), name, "w")
    shard = OpenShard(Shard(0, (split,), 1), Lease(name, 1, Claim(worker="w", nonce="nonce")), 1, writer)
    shard.suspicion, shard.elsewhere = suspicion, elsewhere
    bench.add(shard)
    requests = [Request(row, "prompt") for row in range(ROWS)]
    assert bench.enqueue(shard, requests, {row: {} for row in range(ROWS)}, [])
    bench.engine_ready = True
    return bench


def taken(bench: Workbench, room: int) -> list[int]:
    """The rows that the engine gets."""
    with bench.changed:
        return [request.index for request in bench.take_requests(room)]


def engine_dies(bench: Workbench) -> None:
    """And another one starts."""
    with bench.changed:
        bench.engine_ended(EngineDeath("engine_crash", "it was killed"))
        bench.engine_ready = True


def test_a_suspect_that_is_left_to_another_makes_no_room_for_the_next_group() -> None:
    bench = a_bench(Suspicion(((6, 7), (0, 1, 2))), frozenset({1}))
    assert taken(bench, ROWS) == [0, 2]
    engine_dies(bench)
    bench.check()
    assert taken(bench, ROWS) == [0]


def test_when_all_of_a_group_are_left_to_another_the_next_one_is_tried() -> None:
    bench = a_bench(Suspicion(((6, 7), (0, 1))), frozenset({0, 1}))
    assert taken(bench, ROWS) == [6, 7]


def test_without_suspects_left_the_engine_gets_the_others() -> None:
    bench = a_bench(Suspicion(((0, 1),)), frozenset({0, 1}))
    assert taken(bench, 3) == [2, 3, 4]


@given(
    st.permutations(range(ROWS)),
    st.sets(st.integers(1, ROWS - 1)),
    st.frozensets(st.integers(0, ROWS - 1)),
    st.integers(1, ROWS),
)
def test_engines_that_always_die_leave_every_row_in_one_group(
    order: list[int], cuts: set[int], elsewhere: frozenset[int], room: int
) -> None:
    borders = [0, *sorted(cuts), ROWS]
    groups = tuple(tuple(order[a:b]) for a, b in itertools.pairwise(borders))
    bench = a_bench(Suspicion(groups), elsewhere)
    tried = set()
    while rows := taken(bench, room):
        tried.update(rows)
        engine_dies(bench)
        bench.check()
    assert tried == set(range(ROWS)) - elsewhere


def test_what_was_lost_with_a_shard_is_not_lost_again_when_it_is_resumed() -> None:
    """A worker that reclaims a shard goes on from what it had saved itself, which is waste since then."""
    bench = a_bench(Suspicion(), frozenset())
    [shard] = bench.open.values()
    own, others = Charge("w", None, 100, 10, 1), Charge("v", None, 40, 4, 1)
    saved = {
        SampleKey(0, 0): Partial(Decoded((7,), (10,), 100), (own,)),
        SampleKey(1, 0): Partial(Decoded((7,), (4,), 40), (others,)),
    }
    folder = JobFolder(open_store("memory://workbench"))
    shard.load(Progress(partials=dict(saved)), ProgressReader(folder, shard.name, "w", set()))
    assert shard.own_charges(0) == 0
    assert taken(bench, 2) == [0, 1]
    for row, (prefill_ns, first_ns) in enumerate([(100, 10), (40, 4)]):
        shard.finish(Completion(row, 0, "", (7, 8), "stop", 5, 0, prefill_ns, (first_ns, 25)), None)
    assert shard.own_charges(0) == shard.own_charges(1) == 25
    assert shard.own_unpublished() == 2 * 25
