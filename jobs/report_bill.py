"""Where a job's money went: buckets that add up to its bill, to the nanosecond and the last digit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from batchinfer.jobs.claims import LEASE_SECONDS, RENEWALS_PER_LEASE
from batchinfer.jobs.columns import NANOSECONDS_PER_HOUR
from batchinfer.jobs.cost import Account, Settlement
from batchinfer.jobs.records import WorkerRecord

# The longest time that a killed worker's last heartbeat may be before its end.
UNSEEN_SECONDS = LEASE_SECONDS / RENEWALS_PER_LEASE


@dataclass(frozen=True, slots=True)
class Bucket:
    """One purpose that workers' time went to: its nanoseconds, its USD (None without a price), and what
    that is in digits that add up to those of the whole."""

    key: str
    name: str
    meaning: str
    nanoseconds: int
    usd: Fraction | None
    shown_usd: str = ""
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A job's bill by purpose. The buckets' nanoseconds add up to ``nanoseconds``, their USD to ``usd``.

    ``unseen`` counts workers that were lost without a last word, of whose end up to ``UNSEEN_SECONDS``
    each (``unseen_usd`` in all) is in no bill.
    """

    buckets: tuple[Bucket, ...]
    nanoseconds: int
    usd: Fraction | None
    shown_usd: str
    unseen: int
    unseen_usd: Fraction | None


_MEANINGS = {
    "prefill": ("Prefill", "reading prompts"),
    "decode": ("Decode", "writing completions"),
    "open": ("Not committed yet", "rows of shards that are still open"),
    "startup": ("Start-up", "starting processes, loading the model"),
    "idle": ("Idle", "nothing left to claim, or between the engine's steps"),
    "storage": ("Storage wait", "reading input and writing results with nothing to compute"),
    "waste": ("Waste", "tokens computed again, rows finished twice, work that was lost"),
}


def break_down(
    settlement: Settlement, workers: Iterable[WorkerRecord], complete: bool, lost: int
) -> Breakdown:
    """The bill of ``settlement`` by purpose; ``workers`` are those it was made of.

    ``lost`` of them ended without a last word.
    """
    records = {record.worker: record for record in workers}
    spent = dict.fromkeys(_MEANINGS, 0)
    costs: dict[str, Fraction] = dict.fromkeys(_MEANINGS, Fraction(0))
    rows_usd = Fraction(0)
    priced = all(account.usd_per_hour is not None for account in settlement.accounts)
    for account in settlement.accounts:
        price = Fraction(account.usd_per_hour or 0.0) / NANOSECONDS_PER_HOUR
        for key, nanoseconds in purposes(account, records[account.worker], complete).items():
            if key == "rows":
                rows_usd += nanoseconds * price
            else:
                spent[key] += nanoseconds
                costs[key] += nanoseconds * price
    whole = settlement.bill
    # The rows' time is divided by what their parts say of them; what is left of it is decoding.
    spent["prefill"] = min(settlement.prefill_ns, whole.rows)
    spent["decode"] = whole.rows - spent["prefill"]
    costs["prefill"] = min(Fraction(settlement.prefill_usd or 0.0), rows_usd)
    costs["decode"] = rows_usd - costs["prefill"]
    shown = apportioned(list(costs.values())) if priced else []
    buckets = tuple(
        Bucket(
            key,
            name,
            meaning,
            spent[key],
            costs[key] if priced else None,
            shown[place] if priced else "",
            spent[key] / whole.total if whole.total else 0.0,
        )
        for place, (key, (name, meaning)) in enumerate(_MEANINGS.items())
        if key != "open" or not complete
    )
    dearest = max((account.usd_per_hour or 0.0 for account in settlement.accounts), default=0.0)
    return Breakdown(
        buckets=buckets,
        nanoseconds=whole.total,
        usd=sum(costs.values(), Fraction(0)) if priced else None,
        shown_usd=money_digits(sum(costs.values(), Fraction(0)), decimals(costs.values()))
        if priced
        else "",
        unseen=lost,
        unseen_usd=lost * Fraction(UNSEEN_SECONDS) * Fraction(dearest) / 3600 if priced else None,
    )


def purposes(account: Account, record: WorkerRecord, complete: bool) -> dict[str, int]:
    """A worker's nanoseconds by purpose, those of committed rows as one; they add up to its bill.

    Until a job is complete, what its workers charged to rows of open shards is no waste yet.
    """
    bill = account.bill
    still_open = 0 if complete else max(0, bill.waste - record.bill.waste)
    return {
        "rows": bill.rows,
        "open": still_open,
        "startup": bill.startup,
        "idle": bill.idle,
        "storage": bill.storage,
        "waste": bill.waste - still_open,
    }


def decimals(costs: Iterable[Fraction]) -> int:
    """How many decimals show a sum of money in four digits, and cents at least."""
    total, places = sum(costs, Fraction(0)), 2
    while total and total * 10**places < 1000 and places < 12:
        places += 1
    return places


def money_digits(amount: Fraction, places: int) -> str:
    """An amount in USD with so many decimals."""
    return f"${round(amount * 10**places) / 10**places:,.{places}f}"


def apportioned(costs: Sequence[Fraction]) -> list[str]:
    """Amounts in USD, rounded so that what is shown adds up to the rounded sum: whoever lost most by
    rounding down gets the digits that are left."""
    places = decimals(costs)
    scaled = [cost * 10**places for cost in costs]
    units = [int(amount) for amount in scaled]
    missing = round(sum(scaled, Fraction(0))) - sum(units)
    order = sorted(range(len(costs)), key=lambda place: units[place] - scaled[place])
    for place in order[:missing]:
        units[place] += 1
    return [f"${unit / 10**places:,.{places}f}" for unit in units]
