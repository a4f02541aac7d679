"""What a job will take, predicted from a pilot: tokens, time and price, each as a range."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from batchinfer.jobs.cost import Settlement
from batchinfer.jobs.lengths import Range, exactly, total_range
from batchinfer.jobs.pilot import Pilot, run_pilot
from batchinfer.jobs.plan import Plan
from batchinfer.jobs.prefixes import BLOCK_TOKENS, cached_tokens
from batchinfer.jobs.survey import PromptRow
from batchinfer.jobs.throughput import Load, Rates, engine_seconds, share_out

# How far the rates of a pilot may be from those of the job, eight times out of ten: taken to be so, and
# about what was seen on a busy machine (docs/planning.md).
RATES_OFF = 0.15
# Rows of one engine whose steps are gone through one by one; those of more are as many times longer.
MOST_SIMULATED = 20_000
# What a worker takes beside its engine: its interpreter's start, the folder of the job, the first claim and
# the last commit, 1.0 to 1.2 s on two cores with local storage; and until it sees that the others are done,
# 0.4 s on average where it waits for up to ten seconds for that (feeder.Patience).
WORKER_SECONDS = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A job's tokens, time and price as a pilot tells them (prediction.json).

    Tokens are of all samples of all rows that can be answered, as in the bill. ``worker_seconds`` is the
    time of all workers together, ``seconds`` that until the job is done; ``usd`` is None without
    ``usd_per_hour``. ``finished`` counts the pilot's samples by finish reason, ``rejections`` its rows
    that can't run, by code. ``machine`` is where ``engines`` engines together had the ``rates``; that is
    where the workers run only if ``backend`` is local.
    """

    rows: int
    pilot_rows: int
    seed: int
    prompt_tokens: Range
    cached_tokens: int
    completion_tokens: Range
    worker_seconds: Range
    seconds: Range
    usd: Range | None
    usd_per_hour: float | None
    workers: int
    backend: str
    finished: Mapping[str, int]
    rejections: Mapping[str, int]
    first_rejection: str
    machine: str
    engines: int
    pilot_seconds: float
    rates: Rates

    def to_bytes(self) -> bytes:
        """The prediction as JSON."""
        return json.dumps(prediction_values(self), sort_keys=True, ensure_ascii=False).encode("utf-8")

    @classmethod
    def from_bytes(cls, data: bytes) -> Prediction:
        """The inverse of :meth:`to_bytes`."""
        values = json.loads(data)
        for name in ("prompt_tokens", "completion_tokens", "worker_seconds", "seconds", "usd"):
            values[name] = None if values[name] is None else Range(**values[name])
        rates = values["rates"]
        values["rates"] = Rates(
            **{**rates, "decode": tuple((rows, took) for rows, took in rates["decode"])}
        )
        return cls(**values)


def prediction_values(prediction: Prediction) -> dict[str, Any]:
    """The prediction as JSON values."""
    return asdict(prediction)


def predict(plan: Plan, pilot: Pilot) -> Prediction:
    """What the plan's job will take, from what the pilot of it did."""
    completion = completion_range(plan, pilot.strata, pilot.lengths)
    drawn = drawn_lengths(plan, pilot)
    middle = plan.survey.scale * sum(map(sum, drawn))
    block = pilot.block or BLOCK_TOKENS
    took = [
        job_seconds(
            plan, pilot.rates, block, scaled_lengths(plan, drawn, wanted / middle if middle else 1.0)
        )
        for wanted in (completion.p10, completion.p50, completion.p90)
    ]
    seconds = _with_rates_off(Range(*took))
    workers, price = plan.spec.workers.count, plan.spec.price.usd_per_hour
    worker_seconds = seconds.scaled(workers)
    return Prediction(
        rows=plan.survey.answerable,
        pilot_rows=pilot.rows,
        seed=pilot.seed,
        prompt_tokens=plan.estimate.prompt_range,
        cached_tokens=plan.estimate.cached_tokens,
        completion_tokens=completion,
        worker_seconds=worker_seconds,
        seconds=seconds,
        usd=None if price is None else worker_seconds.scaled(price / 3600),
        usd_per_hour=price,
        workers=workers,
        backend=plan.spec.workers.backend,
        finished=pilot.finished,
        rejections=pilot.rejections,
        first_rejection=pilot.first_rejection,
        machine=pilot.machine,
        engines=pilot.engines,
        pilot_seconds=pilot.seconds,
        rates=pilot.rates,
    )


def predict_by_pilot(plan: Plan, rows: int, seed: int = 0) -> Prediction:
    """Run a pilot of ``rows`` rows and predict; see ``run_pilot`` for what it raises."""
    return predict(plan, run_pilot(plan, rows, seed))


def completion_range(plan: Plan, strata: Sequence[Any], lengths: Mapping[int, Sequence[int]]) -> Range:
    """The tokens that the job will generate: rows that nothing ends early get exactly their most, the
    others what the pilot's rows of their stratum got; ``lengths`` are those of the chosen rows."""
    rows, scale = plan.survey.rows, plan.survey.scale
    fixed = sum(row.most * row.sampling.n for row in rows if row.fixed)
    sizes, observed = [], []
    lowest = highest = 0
    for stratum in strata:
        free = [place for place in stratum.members if not rows[place].fixed]
        seen = [sum(lengths[place]) for place in stratum.chosen if not rows[place].fixed]
        if free and seen:
            sizes.append(scale * len(free))
            observed.append(seen)
        for place in free:
            known = place in lengths and scale == 1.0
            lowest += sum(lengths[place]) if known else rows[place].sampling.n
            highest += sum(lengths[place]) if known else rows[place].most * rows[place].sampling.n
    found = exactly(0.0)
    if sizes:
        found = total_range(sizes, observed, scale * lowest, scale * highest)
    return Range(*(round(scale * fixed + value) for value in (found.p10, found.p50, found.p90)))


def drawn_lengths(plan: Plan, pilot: Pilot) -> list[tuple[int, ...]]:
    """Tokens of each sample of every surveyed row: of a chosen row its own, of another those of a chosen
    row of its stratum, drawn at random."""
    rows = plan.survey.rows
    draw = random.Random(pilot.seed)
    anywhere = [lengths for lengths in pilot.lengths.values() if lengths] or [(1,)]
    found: list[tuple[int, ...]] = [()] * len(rows)
    for stratum in pilot.strata:
        near = [pilot.lengths[place] for place in stratum.chosen if pilot.lengths[place]] or anywhere
        for place in stratum.members:
            row = rows[place]
            if place in pilot.lengths:
                found[place] = pilot.lengths[place]
            elif row.fixed:
                found[place] = (row.most,) * row.sampling.n
            else:
                lengths = draw.choice(near)
                taken = (lengths[sample % len(lengths)] for sample in range(row.sampling.n))
                found[place] = tuple(min(tokens, row.most) for tokens in taken)
    return found


def scaled_lengths(plan: Plan, drawn: Sequence[Sequence[int]], factor: float) -> list[tuple[int, ...]]:
    """``drawn`` with each sample ``factor`` times as long, within its limits."""
    return [
        tuple(min(max(1, round(tokens * factor)), row.most) for tokens in lengths)
        for row, lengths in zip(plan.survey.rows, drawn, strict=True)
    ]


def job_seconds(plan: Plan, rates: Rates, block: int, lengths: Sequence[Sequence[int]]) -> float:
    """Seconds until the job is done, when each surveyed row's samples get ``lengths`` tokens: until an
    engine is ready, and then what the worker with the most to do takes, beside its own seconds."""
    rows, workers = plan.survey.rows, plan.spec.workers.count
    places = range(len(rows))
    if plan.survey.whole:
        shards = _sharded(plan, places)
        alone = _loads(rows, lengths, [place for shard in shards for place in shard], block)
        alone_shards = [[item for place in shard for item in alone[place]] for shard in shards]
        owned = share_out(rates, alone_shards, workers)
        by_loads = {id(loads): shard for loads, shard in zip(alone_shards, shards, strict=True)}
        longest = 0.0
        for taken in owned:
            own = [by_loads[id(loads)] for loads in taken]
            loads = _loads(rows, lengths, [place for shard in own for place in shard], block)
            parts = [[item for place in shard for item in loads[place]] for shard in own]
            longest = max(longest, engine_seconds(rates, parts))
        return rates.startup + WORKER_SECONDS + longest
    # Of a large set one worker's part is gone through, made of the rows that were looked at.
    wanted = plan.survey.answerable / workers
    count = min(max(1, round(wanted)), MOST_SIMULATED)
    loads = _loads(rows, lengths, list(places), block)
    order = [place for _ in range(-(-count // len(rows))) for place in places][:count] if rows else []
    size = max(shard.rows for shard in plan.shards)
    parts = [
        [item for place in order[start : start + size] for item in loads[place]]
        for start in range(0, len(order), size)
    ]
    return rates.startup + WORKER_SECONDS + engine_seconds(rates, parts) * wanted / count


def _sharded(plan: Plan, places: Sequence[int]) -> list[list[int]]:
    """The surveyed rows by shard."""
    rows = plan.survey.rows
    shards: list[list[int]] = [[] for _ in plan.shards]
    number = 0
    for place in places:
        while not plan.shards[number].has(rows[place].index):
            number += 1
        shards[number].append(place)
    return shards


def _loads(
    rows: Sequence[PromptRow], lengths: Sequence[Sequence[int]], order: Sequence[int], block: int
) -> dict[int, list[Load]]:
    """What the samples of rows are to an engine that gets them in this order."""
    cached = cached_tokens([rows[place] for place in order], block)
    found: dict[int, list[Load]] = {}
    for place, hit in zip(order, cached, strict=True):
        size, samples = len(rows[place].tokens), len(lengths[place])
        computed = max(0, size * samples - hit)
        # The samples after the first find the prompt's full blocks.
        later = min(size - (size - 1) // block * block, computed // max(1, samples))
        found[place] = [
            Load(later if number else computed - later * (samples - 1), size, tokens)
            for number, tokens in enumerate(lengths[place])
        ]
    return found


def _with_rates_off(seconds: Range) -> Range:
    """The range with what the rates may be off added to what the tokens may be."""
    off = RATES_OFF * seconds.p50
    below = ((seconds.p50 - seconds.p10) ** 2 + off**2) ** 0.5
    above = ((seconds.p90 - seconds.p50) ** 2 + off**2) ** 0.5
    return Range(max(0.0, seconds.p50 - below), seconds.p50, seconds.p50 + above)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity as it was predicted and as it came; seconds are of all workers together."""

    name: str
    predicted: Range
    actual: float


def compare(prediction: Prediction, settlement: Settlement) -> list[Comparison]:
    """What was predicted beside what the bill says."""
    found = [
        Comparison("tokens in", prediction.prompt_tokens, settlement.prompt_tokens),
        Comparison("tokens out", prediction.completion_tokens, settlement.completion_tokens),
        Comparison("time", prediction.worker_seconds, settlement.bill.total / 1e9),
    ]
    if prediction.usd is not None and settlement.usd is not None:
        found.append(Comparison("price", prediction.usd, settlement.usd))
    return found
