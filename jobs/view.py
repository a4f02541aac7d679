"""What people read about a job: lines of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from batchinfer.jobs.cost import Settlement
from batchinfer.jobs.status import JobStatus

if TYPE_CHECKING:
    from batchinfer.jobs.backends.local import LocalWorkers
    from batchinfer.jobs.placement import Placed, ServiceReport
    from batchinfer.jobs.submit import Submitted

_BAR = 16


def submit_lines(submitted: Submitted) -> list[str]:
    """What a submit found or made."""
    if submitted.plan is not None:
        from batchinfer.jobs.plan_view import plan_lines

        lines = plan_lines(submitted.plan, submitted.prediction)
        return [_line("job", submitted.job.uri), *lines]
    if submitted.complete:
        return [f"The job at {submitted.job.uri} is complete; nothing is left to do."]
    return [f"The job at {submitted.job.uri} was begun before, and goes on where it stands."]


def started_line(started: LocalWorkers | Placed) -> str:
    """Which workers were started, or asked for."""
    from batchinfer.jobs.placement import Placed

    workers = _count(started.count, "worker")
    if not isinstance(started, Placed):
        return f"Started {workers}"
    if not started.ids:
        return f"Nothing was asked of {started.backend}, which has all workers already"
    return f"Asked {started.backend} for {workers}: {', '.join(started.ids)}"


def service_lines(reports: Sequence[ServiceReport]) -> list[str]:
    """What batch services say of the job's workers."""
    return [_line(report.backend, report.message) for report in reports]


def status_lines(status: JobStatus) -> list[str]:
    """Where a job stands, in a few lines."""
    return [_line(name, text) for name, text in status_fields(status)]


def status_fields(status: JobStatus) -> list[tuple[str, str]]:
    """Where a job stands: names, and what there is to say of each."""
    done = status.rows_answered + status.rows_failed
    share = done / status.rows if status.rows else 1.0
    filled = int(_BAR * share)
    state = "out of budget" if status.state == "budget" else status.state
    lines = [
        ("job", f"{status.name}, {status.uri}" if status.name else status.uri),
        (
            state,
            f"{'█' * filled}{'░' * (_BAR - filled)} {share:6.1%}  {done:,} of {status.rows:,} rows, "
            f"{status.shards_done:,} of {status.shards:,} shards",
        ),
    ]
    if status.failures:
        lines.append(("failed", f"{_count(status.rows_failed, 'row')}: {_codes(status)}"))
    if status.rows_retried:
        lines.append(
            ("retry", f"round {status.round}: {_count(status.rows_retried, 'failed row')} to try again")
        )
    tokens = f"{status.prompt_tokens:,} in ({status.cached_tokens:,} of them cached), "
    tokens += f"{status.completion_tokens:,} out"
    if status.tokens_per_second:
        tokens += f", {status.tokens_per_second:,.1f} out a second"
    lines.append(("tokens", tokens))
    if status.usd is not None and status.workers:
        expected = status.usd / share if share else None
        more = f", about {money(expected)} at the end" if expected and not status.over else ""
        lines.append(("spent", f"{money(status.usd)}{more}"))
    limits = []
    if status.max_usd is not None:
        limits.append(f"at most {money(status.max_usd)}")
    if status.max_worker_hours is not None:
        limits.append(f"{status.worker_hours:.3g} of at most {status.max_worker_hours:.3g} worker-hours")
    if limits:
        lines.append(("budget", ", ".join(limits)))
    workers = f"{status.workers_alive} alive"
    if status.eta_seconds is not None:
        workers += f", done in about {duration(status.eta_seconds)}"
    lines.append(("workers", workers))
    if status.message:
        lines.append(("", status.message))
    return lines


def status_line(status: JobStatus) -> str:
    """Where a job stands, in one line: for logs."""
    done = status.rows_answered + status.rows_failed
    parts = [
        f"{status.state}: {done:,} of {status.rows:,} rows",
        f"{status.shards_done:,} of {status.shards:,} shards",
    ]
    if status.rows_failed:
        parts.append(f"{status.rows_failed:,} failed ({_codes(status)})")
    parts.append(f"{_count(status.workers_alive, 'worker')}")
    if status.tokens_per_second:
        parts.append(f"{status.tokens_per_second:,.1f} tokens/s")
    if status.usd is not None and status.workers:
        parts.append(money(status.usd))
    if status.eta_seconds is not None:
        parts.append(f"done in about {duration(status.eta_seconds)}")
    return ", ".join(parts)


def progress_figures(status: JobStatus) -> dict[str, Any]:
    """Where a job stands, for a log collector."""
    return {
        "uri": status.uri,
        "state": status.state,
        "rows": status.rows,
        "rows_answered": status.rows_answered,
        "rows_failed": status.rows_failed,
        "failures": dict(status.failures),
        "shards": status.shards,
        "shards_done": status.shards_done,
        "prompt_tokens": status.prompt_tokens,
        "cached_tokens": status.cached_tokens,
        "completion_tokens": status.completion_tokens,
        "tokens_per_second": status.tokens_per_second,
        "usd": status.usd,
        "eta_seconds": status.eta_seconds,
        "workers": status.workers_alive,
    }


def end_figures(status: JobStatus, settlement: Settlement) -> dict[str, Any]:
    """Where a job stands and what it cost, for a log collector."""
    return {
        **progress_figures(status),
        "message": status.message,
        "exit_code": status.exit_code,
        "nanoseconds": {**asdict(settlement.bill), "total": settlement.bill.total},
    }


def bill_lines(settlement: Settlement) -> list[str]:
    """What a job cost and where the time went."""
    whole = settlement.bill
    lines = []
    if settlement.usd is None:
        lines.append(_line("cost", "unknown, as no price was given (price.usd_per_hour)"))
    else:
        lines.append(_line("cost", f"{money(settlement.usd)} for {settlement.rows:,} answers"))
        for name, cost, tokens in (
            ("in", settlement.prefill_usd, settlement.prompt_tokens),
            ("out", settlement.decode_usd, settlement.completion_tokens),
        ):
            if cost is not None and tokens:
                cached = f", {settlement.cached_tokens:,} of them cached" if name == "in" else ""
                lines.append(
                    _line(
                        f"tokens {name}",
                        f"{tokens:,}{cached}: {money(cost)}, {money(cost * 1e6 / tokens)} a million",
                    )
                )
    for name, nanoseconds in (
        ("rows", whole.rows),
        ("start-up", whole.startup),
        ("idle", whole.idle),
        ("storage", whole.storage),
        ("waste", whole.waste),
    ):
        share = nanoseconds / whole.total if whole.total else 0.0
        lines.append(_line(name, f"{duration(nanoseconds / 1e9)} ({share:.1%})"))
    lines.append(
        _line("in all", f"{duration(whole.total / 1e9)} of {_count(len(settlement.accounts), 'worker')}")
    )
    return lines


def money(usd: float) -> str:
    """An amount in USD with as many digits as it needs: $12.30, $0.000123."""
    if usd == 0 or abs(usd) >= 1:
        return f"${usd:,.2f}"
    return f"${usd:.3g}" if abs(usd) >= 1e-4 else f"${usd:.2e}"


def duration(seconds: float) -> str:
    """A time for people: 12.3 s, 4 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{seconds / 86400:.1f} days"


def _codes(status: JobStatus) -> str:
    return ", ".join(f"{code} {count:,}" for code, count in status.failures.items())


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _line(name: str, text: str) -> str:
    return f"{name:<12} {text}"
