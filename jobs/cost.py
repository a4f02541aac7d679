"""Where a worker's time goes: buckets that add up to its bill, exactly, in integer nanoseconds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

from batchinfer.jobs.columns import usd
from batchinfer.jobs.records import Bill, PartFooter, WorkerRecord

State = Literal["startup", "busy", "idle", "storage"]


class Ledger:
    """The running account of one worker, from the start of its process.

    At any time the worker is in one state: starting an engine, ``busy`` (the engine has work), or
    without work, either ``idle`` or waiting for ``storage``. While busy, the engine charges its steps
    to samples (or to waste); what it charges is reported now and then, so the busy time since the last
    report is counted for the rows until the next one says what it was. Busy time that is reported and
    not charged (a request's way to the engine and back) is idle.

    Invariant: the buckets add up to the time since the start (``check``).
    """

    def __init__(self, started_ns: int) -> None:
        self._started = started_ns
        self._since = started_ns
        self._state: State = "startup"
        self._spent: dict[State, int] = {"startup": 0, "busy": 0, "idle": 0, "storage": 0}
        self._reported = started_ns
        self._charged_before = 0
        self._charged = 0
        self._engine_waste = 0
        self._lost = 0

    def enter(self, state: State, now_ns: int) -> None:
        """From now on the worker is in ``state``."""
        self._spent[self._state] += now_ns - self._since
        self._state, self._since = state, now_ns

    def report(self, charged_ns: int, waste_ns: int, at_ns: int) -> None:
        """The engine, since its start, has charged that much to samples and to waste up to ``at_ns``."""
        self._charged = charged_ns + waste_ns
        self._engine_waste = waste_ns
        self._reported = max(self._reported, at_ns)

    def lose(self, nanoseconds: int) -> None:
        """That much of what was charged to samples is of no use: it becomes waste."""
        self._lost += nanoseconds

    def engine_ended(self, now_ns: int, kept_ns: int, state: State) -> None:
        """The engine is gone, and the worker is in ``state``. Of what it charged to samples ``kept_ns``
        is of use, or was told to ``lose`` before; the rest is waste, and so is what it did since its
        last report."""
        unreported = self._unreported(now_ns)
        self._lost += self._charged - kept_ns + unreported
        self._charged_before += self._charged + unreported
        self._charged = self._engine_waste = 0
        self._reported = now_ns
        self.enter(state, now_ns)

    def bill(self, now_ns: int) -> Bill:
        """The bill of the time from the start to now."""
        spent = dict(self._spent)
        spent[self._state] += now_ns - self._since
        unreported = self._unreported(now_ns)
        charged = self._charged_before + self._charged + unreported
        waste = self._lost + self._engine_waste
        spent["idle"] += spent["busy"] - charged
        # More charged than the time with work there was would be an error of the engine's clock; the
        # bill stays whole at the cost of the other buckets.
        for poor, rich in (("idle", "storage"), ("storage", "startup")):
            if spent[poor] < 0:  # type: ignore[index]
                spent[rich] += spent[poor]  # type: ignore[index]
                spent[poor] = 0  # type: ignore[index]
        return Bill(
            startup=spent["startup"],
            rows=charged - waste,
            idle=spent["idle"],
            storage=spent["storage"],
            waste=waste,
        )

    def check(self, now_ns: int) -> None:
        """Raise AssertionError where the account is not sound."""
        bill = self.bill(now_ns)
        assert bill.total == now_ns - self._started, f"{bill} does not add up to {now_ns - self._started}"
        assert min(asdict(bill).values()) >= 0, f"{bill} has a negative bucket"
        busy = self._spent["busy"] + (now_ns - self._since if self._state == "busy" else 0)
        charged = self._charged_before + self._charged + self._unreported(now_ns)
        assert charged <= busy, f"{charged} ns were charged in {busy} ns with work"

    def _unreported(self, now_ns: int) -> int:
        if self._state != "busy":
            return 0
        return now_ns - min(now_ns, max(self._reported, self._since))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One worker's part of a job's bill: its buckets, its price, and whether it still runs."""

    worker: str
    usd_per_hour: float | None
    bill: Bill
    final: bool

    @property
    def usd(self) -> float | None:
        """What the worker cost."""
        return usd(self.bill.total, self.usd_per_hour)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """A job's bill: an account a worker, and the totals of its committed rows.

    ``rows`` are those of the parts (n of them for a row with n samples), ``failed_rows`` those of the
    failures objects that count, less those that a retry round has answered.
    """

    accounts: tuple[Account, ...]
    shards: int
    rows: int
    failed_rows: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    prefill_ns: int
    decode_ns: int
    prefill_usd: float | None
    decode_usd: float | None

    @property
    def bill(self) -> Bill:
        """The sum of all accounts."""
        bills = [account.bill for account in self.accounts]
        return Bill(
            startup=sum(bill.startup for bill in bills),
            rows=sum(bill.rows for bill in bills),
            idle=sum(bill.idle for bill in bills),
            storage=sum(bill.storage for bill in bills),
            waste=sum(bill.waste for bill in bills),
        )

    @property
    def usd(self) -> float | None:
        """What all workers cost; None where one has no price."""
        costs = [account.usd for account in self.accounts]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def check(self) -> None:
        """Raise AssertionError unless committed rows and named overheads are the bill, exactly."""
        assert self.bill.rows == self.prefill_ns + self.decode_ns, (
            f"the rows' {self.prefill_ns + self.decode_ns} ns are not the workers' {self.bill.rows} ns"
        )
        for account in self.accounts:
            assert min(asdict(account.bill).values()) >= 0, f"{account} has a negative bucket"


def settle(workers: Iterable[WorkerRecord], footers: Iterable[PartFooter]) -> Settlement:
    """The bill of a job from its heartbeats and the footers of its parts.

    What a worker charged to committed rows is in the footers; the rest of what it computed helped no
    row that is there, so it is waste: rows finished twice, tokens computed again, and whatever a killed
    worker had not yet saved. While a job runs, that includes rows of open shards.
    """
    parts = list(footers)
    charged: dict[str, int] = {}
    for part in parts:
        for worker, spent in part.nanoseconds.items():
            charged[worker] = charged.get(worker, 0) + spent
    accounts = []
    for record in workers:
        rows = charged.get(record.worker, 0)
        bill = replace(record.bill, rows=rows, waste=record.bill.rows + record.bill.waste - rows)
        final = record.state in ("left", "failed")
        accounts.append(
            Account(worker=record.worker, usd_per_hour=record.usd_per_hour, bill=bill, final=final)
        )
    costs_known = all(account.usd_per_hour is not None for account in accounts)
    return Settlement(
        accounts=tuple(sorted(accounts, key=lambda account: account.worker)),
        shards=len(parts),
        rows=sum(part.rows for part in parts),
        failed_rows=sum(part.failed_rows - part.retried_rows for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        cached_tokens=sum(part.cached_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
        prefill_ns=sum(part.prefill_ns for part in parts),
        decode_ns=sum(part.decode_ns for part in parts),
        prefill_usd=sum(part.prefill_usd for part in parts) if costs_known else None,
        decode_usd=sum(part.decode_usd for part in parts) if costs_known else None,
    )


def summary(settlement: Settlement, shards: int, n: int) -> bytes:
    """The summary as JSON: totals, the bill by bucket in nanoseconds and USD, and by worker.

    ``shards`` counts those of the plan, ``n`` the samples of a row.
    """
    whole = settlement.bill
    total_usd = settlement.usd
    rows = settlement.rows // n
    return json.dumps(
        {
            "complete": settlement.shards == shards,
            "shards": {"committed": settlement.shards, "total": shards},
            "rows": {"answered": rows, "failed": settlement.failed_rows},
            "tokens": {
                "prompt": settlement.prompt_tokens,
                "cached": settlement.cached_tokens,
                "completion": settlement.completion_tokens,
            },
            "nanoseconds": {**asdict(whole), "total": whole.total},
            "usd": {
                "total": total_usd,
                "prefill": settlement.prefill_usd,
                "decode": settlement.decode_usd,
                "per_million_prompt_tokens": _per_million(settlement.prefill_usd, settlement.prompt_tokens),
                "per_million_completion_tokens": _per_million(
                    settlement.decode_usd, settlement.completion_tokens
                ),
                "per_row": None
                if total_usd is None or not settlement.rows
                else total_usd / settlement.rows,
            },
            "workers": {
                account.worker: {
                    "final": account.final,
                    "usd_per_hour": account.usd_per_hour,
                    "usd": account.usd,
                    "nanoseconds": {**asdict(account.bill), "total": account.bill.total},
                }
                for account in settlement.accounts
            },
        },
        indent=1,
        sort_keys=True,
    ).encode("utf-8")


def _per_million(cost: float | None, tokens: int) -> float | None:
    return None if cost is None or not tokens else cost * 1e6 / tokens
