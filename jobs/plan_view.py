"""What people read of a plan: what a job will take, and afterwards what was predicted beside what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from batchinfer.jobs.view import duration, money

if TYPE_CHECKING:
    from batchinfer.jobs.cost import Settlement
    from batchinfer.jobs.estimate import Estimate
    from batchinfer.jobs.lengths import Range
    from batchinfer.jobs.plan import Plan
    from batchinfer.jobs.prediction import Prediction

_NO_PRICE = "unknown, as no price was given (price.usd_per_hour)"


def plan_lines(plan: Plan, prediction: Prediction | None = None) -> list[str]:
    """What a job will be and take: at most, or as predicted."""
    found, workers = plan.estimate, plan.spec.workers.count
    size = sum(file.size for file in plan.files)
    lines = [
        _line("input", f"{_count(plan.rows, 'row')} in {_count(len(plan.files), 'file')}, {size:,} bytes"),
        _line(
            "shards",
            f"{len(plan.shards):,} of at most {_count(max(shard.rows for shard in plan.shards), 'row')}, "
            f"for {_count(workers, 'worker')}",
        ),
        _line("tokens in", _tokens_in(found)),
    ]
    if prediction is None:
        out = f"{found.fewest_tokens:,} to {found.completion_tokens:,}; a pilot (--pilot 32) tells how many"
        if found.fewest_tokens == found.completion_tokens:
            out = f"{found.completion_tokens:,}, as nothing ends a row earlier"
        lines.append(_line("tokens out", out))
    if found.largest:
        longest = ", ".join(f"row {row} {tokens:,}" for row, tokens in found.largest)
        lines.append(_line("longest", f"{longest} tokens{_of_the_sample(found)}"))
    if found.too_long:
        first = ", ".join(f"row {row} with {tokens:,} tokens" for row, tokens in found.too_long)
        lines.append(
            _line("won't fit", f"{_count(found.too_long_rows, 'row')}{_of_the_sample(found)}: {first}")
        )
    if found.failures:
        codes = ", ".join(f"{code} {count:,}" for code, count in found.failures.items())
        lines.append(_line("will fail", f"{codes}{_of_the_sample(found)}; such as: {found.first_failure}"))
    if prediction is not None:
        return lines + prediction_lines(prediction)
    lines.append(_line("time", f"at most about {duration(found.seconds)}, at {found.basis}"))
    price = _NO_PRICE
    if found.usd is not None:
        hourly = money(plan.spec.price.usd_per_hour or 0.0)
        price = f"at most about {money(found.usd)}, at {hourly} an hour and worker"
    lines.append(_line("price", price))
    return lines


def _tokens_in(found: Estimate) -> str:
    shared = f", {found.cached_tokens:,} of them shared" if found.cached_tokens else ""
    if found.whole:
        return f"{found.prompt_tokens:,}{shared}: all rows were tokenized"
    low, high = round(found.prompt_range.p10), round(found.prompt_range.p90)
    return (
        f"about {found.prompt_tokens:,} ({low:,} to {high:,}){shared}, by a sample of "
        f"{_count(found.sampled_rows, 'row')}"
    )


def _of_the_sample(found: Estimate) -> str:
    return "" if found.whole else " (of the sample)"


def prediction_lines(prediction: Prediction) -> list[str]:
    """What a pilot says that a job will take."""
    ends = ", ".join(f"{count:,} by {reason}" for reason, count in prediction.finished.items())
    lines = [
        _line(
            "pilot",
            f"{_count(prediction.pilot_rows, 'row')} in {duration(prediction.pilot_seconds)} on "
            f"{prediction.machine}: {ends or 'no answers'}",
        )
    ]
    if prediction.rejections:
        codes = ", ".join(f"{code} {count:,}" for code, count in prediction.rejections.items())
        lines.append(_line("", f"failed there: {codes}; such as: {prediction.first_rejection}"))
    if prediction.backend != "local":
        lines.append(
            _line("", f"time and price are this machine's; workers of {prediction.backend} differ")
        )
    lines.append(f"{'':<12} {'P10':>14} {'P50':>14} {'P90':>14}")
    lines.append(_range("tokens out", prediction.completion_tokens, _whole))
    lines.append(_range("time", prediction.seconds, duration))
    if prediction.usd is None:
        lines.append(_line("price", _NO_PRICE))
    else:
        lines.append(_range("price", prediction.usd, money))
        hourly = money(prediction.usd_per_hour or 0.0)
        lines[-1] += f"   at {hourly} an hour for each of {_count(prediction.workers, 'worker')}"
    return lines


def comparison_lines(prediction: Prediction | None, settlement: Settlement) -> list[str]:
    """What was predicted of a job beside what its bill says; nothing without a prediction."""
    if prediction is None:
        return []
    from batchinfer.jobs.prediction import compare

    shown: dict[str, Callable[[float], str]] = {"time": duration, "price": money}
    lines = []
    for item in compare(prediction, settlement):
        show = shown.get(item.name, _whole)
        low, middle, high = (
            show(value) for value in (item.predicted.p10, item.predicted.p50, item.predicted.p90)
        )
        predicted = middle if low == high else f"{middle} ({low} to {high})"
        of = " of all workers" if item.name == "time" else ""
        lines.append(_line(item.name, f"predicted {predicted}, actual {show(item.actual)}{of}"))
    return lines


def _range(name: str, found: Range, show: Callable[[float], str]) -> str:
    return f"{name:<12} {show(found.p10):>14} {show(found.p50):>14} {show(found.p90):>14}"


def _whole(number: float) -> str:
    return f"{number:,.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _line(name: str, text: str) -> str:
    return f"{name:<12} {text}"
