"""A job as one HTML page for the people who run it and pay for it.

The page loads nothing and runs no script: charts are SVG of our own, and a content security policy in it
holds browsers to that, whatever a row may contain. Everything is read in bounded memory: of each committed
part its footer, of some of them the token counts of their rows, of failures a few examples.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from importlib.resources import files
from typing import Any

import jinja2

from batchinfer.jobs.columns import NANOSECONDS_PER_HOUR
from batchinfer.jobs.cost import Settlement, settle
from batchinfer.jobs.folder import JobFolder, ShardName
from batchinfer.jobs.prediction import Comparison, Prediction, compare
from batchinfer.jobs.records import JobRecord, PartFooter, WorkerRecord
from batchinfer.jobs.report_bill import (
    UNSEEN_SECONDS,
    Breakdown,
    apportioned,
    break_down,
    decimals,
    money_digits,
    purposes,
)
from batchinfer.jobs.report_charts import area, columns, steps
from batchinfer.jobs.report_failures import FailureKind, failure_kinds
from batchinfer.jobs.report_lengths import Bin, Lengths, lengths
from batchinfer.jobs.report_spec import shareable_spec
from batchinfer.jobs.report_throughput import Throughput, throughput
from batchinfer.jobs.status import JobStatus, StatusReader, living
from batchinfer.jobs.view import duration, money

# Lines of a table at most; the others are summed up in its last one.
WORKERS_SHOWN = 40
SHARDS_SHOWN = 20
SHARD_COLUMNS = 96


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """One worker, or the sum of several: what it did, how long it ran, its time by bucket in shares of
    that, and its cost in digits that add up to those of the bill."""

    name: str
    about: str
    rows: int
    completion_tokens: int
    tokens_per_second: float
    nanoseconds: int
    shares: Mapping[str, float]
    cost: str


@dataclass(frozen=True, slots=True)
class ShardLine:
    """One committed shard; ``cost`` in as many digits as the others'."""

    name: str
    worker: str
    rows: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    nanoseconds: int
    cost: str


@dataclass(frozen=True, slots=True)
class ShardSpan:
    """Consecutive shards in one column of the chart: their labels, and what one of them took on average,
    in USD or, without a price, in seconds."""

    first: str
    last: str
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that the page says. ``priced`` tells whether every worker has a price."""

    status: JobStatus
    record: JobRecord
    settlement: Settlement
    breakdown: Breakdown
    priced: bool
    throughput: Throughput | None
    workers: tuple[WorkerLine, ...]
    shards: tuple[ShardLine, ...]
    shards_cost: str
    failed_in_shards: int
    shard_spans: tuple[ShardSpan, ...]
    lengths: Lengths
    failures: tuple[FailureKind, ...]
    predicted: tuple[Comparison, ...]
    spec: str
    made: float


def read_report(folder: JobFolder, now: Callable[[], float] = time.time) -> Report:
    """Read what the page of the job in ``folder`` says. Raises JobError where there is none.

    A job that is still at work is shown as it is now: its parts first, and then the heartbeats, whose
    bills then cover the parts' rows.
    """
    reader = StatusReader(folder, now=now)
    status = reader.read()
    prediction = folder.read_prediction()
    footers = reader.footers
    beats = list(folder.read_workers())
    workers = [record for record, _ in beats]
    settlement = settle(workers, footers.values())
    alive = {record.worker for record in living(beats, now())}
    lost = sum(record.state not in ("left", "failed") and record.worker not in alive for record, _ in beats)
    priced = settlement.usd is not None
    return Report(
        status=status,
        record=reader.record,
        settlement=settlement,
        breakdown=break_down(settlement, workers, status.state == "done", lost),
        priced=priced,
        throughput=throughput(beats),
        workers=_worker_lines(settlement, workers, alive, status.state == "done"),
        shards=_shard_lines(footers),
        failed_in_shards=sum(footer.failed_rows for footer in footers.values()),
        shards_cost=money((settlement.prefill_usd or 0.0) + (settlement.decode_usd or 0.0)),
        shard_spans=_shard_spans(footers, priced),
        lengths=lengths(folder, footers),
        failures=failure_kinds(folder, status.failures, footers, reader.rounds),
        predicted=()
        if prediction is None
        else tuple(compare(Prediction.from_bytes(prediction), settlement)),
        spec=shareable_spec(reader.record.spec),
        made=now(),
    )


def _worker_lines(
    settlement: Settlement, workers: Iterable[WorkerRecord], alive: set[str], complete: bool
) -> tuple[WorkerLine, ...]:
    """Workers, those that took most time first; those that are too many as one line."""
    records = {record.worker: record for record in workers}
    accounts = sorted(settlement.accounts, key=lambda account: (-account.bill.total, account.worker))
    groups = [[account] for account in accounts[:WORKERS_SHOWN]]
    if len(accounts) > WORKERS_SHOWN:
        groups.append(accounts[WORKERS_SHOWN:])
    costs = [
        sum((account.bill.total * Fraction(account.usd_per_hour or 0.0) for account in group), Fraction(0))
        / NANOSECONDS_PER_HOUR
        for group in groups
    ]
    shown = apportioned(costs) if settlement.usd is not None else ["-"] * len(groups)
    lines = []
    for group, cost in zip(groups, shown, strict=True):
        of = [records[account.worker] for account in group]
        total = sum(account.bill.total for account in group)
        spent: Counter[str] = Counter()
        for account in group:
            spent.update(purposes(account, records[account.worker], complete))
        tokens = sum(record.completion_tokens for record in of)
        ready = total - spent["startup"]
        lines.append(
            WorkerLine(
                name=of[0].worker if len(of) == 1 else f"{len(of):,} others",
                about=_about(of[0], of[0].worker in alive) if len(of) == 1 else "",
                rows=sum(record.rows_done for record in of),
                completion_tokens=tokens,
                tokens_per_second=tokens * 1e9 / ready if ready else 0.0,
                nanoseconds=total,
                shares={name: part / total if total else 0.0 for name, part in spent.items()},
                cost=cost,
            )
        )
    return tuple(lines)


def _about(record: WorkerRecord, alive: bool) -> str:
    """Where a worker runs, and what became of it."""
    state: str = record.state
    if state not in ("left", "failed") and not alive:
        state = "lost without a last word"
    elif record.exit_code is not None:
        state = f"{state}, exit code {record.exit_code}"
    price = "no price" if record.usd_per_hour is None else f"{money(record.usd_per_hour)} an hour"
    return ", ".join(filter(None, [record.host, state, price]))


def _cost(footer: PartFooter) -> float:
    return footer.prefill_usd + footer.decode_usd


def _shard_lines(footers: Mapping[ShardName, PartFooter]) -> tuple[ShardLine, ...]:
    """The shards that took most, or all of them in their order."""

    def took(shard: ShardName) -> int:
        return sum(footers[shard].nanoseconds.values())

    chosen: Sequence[ShardName] = sorted(footers)
    if len(footers) > SHARDS_SHOWN:
        chosen = sorted(footers, key=lambda shard: (-took(shard), shard))[:SHARDS_SHOWN]
    places = decimals([Fraction(max(map(_cost, footers.values()), default=0.0))])
    return tuple(
        ShardLine(
            name=shard.label,
            worker=footers[shard].worker,
            rows=footers[shard].rows,
            failed=footers[shard].failed_rows,
            prompt_tokens=footers[shard].prompt_tokens,
            cached_tokens=footers[shard].cached_tokens,
            completion_tokens=footers[shard].completion_tokens,
            nanoseconds=took(shard),
            cost=money_digits(Fraction(_cost(footers[shard])), places),
        )
        for shard in chosen
    )


def _shard_spans(footers: Mapping[ShardName, PartFooter], priced: bool) -> tuple[ShardSpan, ...]:
    """All committed shards in at most ``SHARD_COLUMNS`` columns of about as many each."""
    shards = sorted(footers)
    number = min(len(shards), SHARD_COLUMNS)
    spans = []
    for place in range(number):
        group = shards[place * len(shards) // number : (place + 1) * len(shards) // number]
        amounts = [
            _cost(footers[shard]) if priced else sum(footers[shard].nanoseconds.values()) / 1e9
            for shard in group
        ]
        spans.append(ShardSpan(group[0].label, group[-1].label, sum(amounts) / len(group)))
    return tuple(spans)


def render_report(report: Report) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda number: f"{number:,}",
        "rate": _rate,
        "share": lambda part: f"{part:.1%}",
        "money": lambda amount: "-" if amount is None else money(float(amount)),
        "duration": duration,
        "seconds": lambda nanoseconds: duration(nanoseconds / 1e9),
        "time": lambda moment: datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    environment.globals |= {
        "rate": _rate,
        "whole": lambda value: f"{value:,.10g}",
        "amount": money if report.priced else duration,
        "span": _span,
        "number": lambda value: f"{value:,.0f}",
        "quantity": {"time": duration, "price": money},
    }
    template = environment.from_string(
        files("batchinfer.jobs").joinpath("report.html").read_text(encoding="utf-8")
    )
    return template.render(
        report=report,
        status=report.status,
        bill=report.settlement,
        breakdown=report.breakdown,
        charts=_charts(report),
        unseen_seconds=UNSEEN_SECONDS,
    )


def _rate(number: float) -> str:
    """A number a second, in three digits or more."""
    if number >= 1e6:
        return f"{number / 1e6:,.4g} M"
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _span(lengths: Bin) -> str:
    """The lengths of a bin, as people write them."""
    if lengths.last is None:
        return f"{lengths.first:,} and more"
    if lengths.first == lengths.last:
        return f"{lengths.first:,}"
    return f"{lengths.first:,} to {lengths.last:,}"


def _charts(report: Report) -> dict[str, Any]:
    found: dict[str, Any] = {}
    flow = report.throughput
    if flow is not None:
        found["tokens"] = area(flow.completion_tokens)
        found["prompts"] = area(flow.prompt_tokens)
        found["workers"] = steps(flow.workers)
    if report.shard_spans:
        found["shards"] = columns([span.amount for span in report.shard_spans])
    for name in ("prompts", "completions"):
        shape = getattr(report.lengths, name)
        if shape is not None:
            found[f"{name}_lengths"] = columns([item.count for item in shape.bins])
    return found
