"""A worker's account: its buckets add up to its bill whatever happens in whatever order."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.jobs.cost import Ledger, settle, summary
from batchinfer.jobs.records import Bill, PartFooter, WorkerRecord

START = 5_000


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Events: (what, how long until then, how much of the busy time since the last report is charged)."""
    what = st.sampled_from(["busy", "idle", "storage", "report", "lose", "ended"])
    return draw(st.lists(st.tuples(what, st.integers(0, 10**12), st.integers(0, 100)), max_size=30))


@settings(deadline=None)
@given(lives())
def test_the_buckets_add_up_to_the_time_since_the_start(events: list[tuple[str, int, int]]) -> None:
    ledger, now = Ledger(START), START
    busy_since: int | None = None
    free, charged, waste = 0, 0, 0  # busy and not yet charged; charged by this engine
    losable, lost = 0, 0  # of what it charged to samples
    for what, wait, share in events:
        now += wait
        if busy_since is not None:
            free += now - busy_since
            busy_since = now
        if what in ("busy", "idle", "storage"):
            ledger.enter(what, now)  # type: ignore[arg-type]
            busy_since = now if what == "busy" else None
        elif what == "report":
            some = free * share // 100
            free -= some
            charged, waste, losable = (
                charged + some - some // 4,
                waste + some // 4,
                losable + some - some // 4,
            )
            ledger.report(charged, waste, now)
            free = 0  # what was not charged by now never will be: it is idle
        elif what == "lose":
            some = losable * share // 100
            ledger.lose(some)
            losable, lost = losable - some, lost + some
        else:
            ledger.engine_ended(now, lost + losable * share // 100, "startup")
            busy_since, free, charged, waste, losable, lost = None, 0, 0, 0, 0, 0
        ledger.check(now)
        assert ledger.bill(now + 7).total == now + 7 - START


def test_time_goes_where_it_was_spent() -> None:
    ledger = Ledger(0)
    ledger.enter("storage", 100)  # loading took 100
    ledger.enter("busy", 130)  # reading the first rows 30
    ledger.report(40, 10, 190)  # 60 busy: 40 for rows, 10 computed again, 10 on the way
    assert ledger.bill(190) == Bill(startup=100, rows=40, idle=10, storage=30, waste=10)
    # Busy time since the last report counts for the rows until it is reported.
    assert ledger.bill(200) == Bill(startup=100, rows=50, idle=10, storage=30, waste=10)
    ledger.lose(15)
    ledger.enter("idle", 210)
    assert ledger.bill(300) == Bill(startup=100, rows=25, idle=120, storage=30, waste=25)
    ledger.enter("busy", 300)
    ledger.engine_ended(350, 20, "startup")  # of 40 charged 20 are saved; 50 were never reported
    assert ledger.bill(360) == Bill(startup=110, rows=5, idle=120, storage=30, waste=95)


def heartbeat(worker: str, bill: Bill, price: float | None = 3.6, state: str = "left") -> WorkerRecord:
    return WorkerRecord(
        worker=worker,
        state=state,
        beat=1,
        usd_per_hour=price,
        bill=bill,
        started="",  # type: ignore[arg-type]
    )


def test_what_helped_no_committed_row_is_waste() -> None:
    workers = [
        heartbeat("a", Bill(startup=5, rows=100, idle=1, storage=2, waste=3)),
        heartbeat("b", Bill(startup=5, rows=50, idle=0, storage=0, waste=0), state="running"),
    ]
    parts = [
        PartFooter(
            nonce="n", worker="a", rows=2, nanoseconds={"a": 60, "b": 50}, prefill_ns=30, decode_ns=80
        ),
        PartFooter(nonce="m", worker="a", rows=1, failed_rows=2, nanoseconds={"a": 30}, decode_ns=30),
    ]
    settlement = settle(workers, parts)
    settlement.check()
    a, b = settlement.accounts
    assert (a.bill.rows, a.bill.waste, a.final) == (90, 13, True)
    assert (b.bill.rows, b.bill.waste, b.final) == (50, 0, False)
    assert settlement.bill.total == 111 + 55
    assert settlement.usd == pytest.approx(166 * 3.6 / 3.6e12)
    assert (settlement.rows, settlement.failed_rows, settlement.shards) == (3, 2, 2)
    written = json.loads(summary(settlement, 2, 1))
    assert written["complete"] and written["nanoseconds"]["total"] == 166


def test_a_bill_without_a_price_has_no_usd() -> None:
    settlement = settle([heartbeat("a", Bill(startup=5), None)], [])
    assert settlement.usd is None
    assert json.loads(summary(settlement, 1, 1))["usd"]["total"] is None


def test_rows_charged_beyond_the_bill_are_seen() -> None:
    part = PartFooter(nonce="n", worker="a", rows=1, nanoseconds={"a": 60}, decode_ns=60)
    with pytest.raises(AssertionError, match="negative"):
        settle([heartbeat("a", Bill(rows=50))], [part]).check()
