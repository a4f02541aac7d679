"""What a job takes at most, before anything is spent: tokens from its prompts, time from stated rates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import stdev

from batchinfer.jobs.inspection import InspectedModel
from batchinfer.jobs.lengths import TAIL, Range, exactly, t_quantile
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.survey import Survey

_LARGEST = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """What a worker is taken to do: operations and bytes a second, and rows decoded together."""

    flops: float
    bytes: float
    batch: int
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A job's tokens, time and price, as far as they can be told without running it.

    ``prompt_tokens`` are of all rows and samples: exact where all rows were looked at (``whole``), else
    from the ``sampled_rows``, and then ``prompt_range`` says how far off they may be. ``cached_tokens`` are
    those of them that the prefix cache will hold. ``completion_tokens`` are the most there can be,
    ``fewest_tokens`` the fewest. ``largest`` are the longest prompts: row and tokens; ``too_long`` the
    first ones that do not fit the context, ``too_long_rows`` how many of those looked at don't.
    ``failures`` counts rows looked at that can't be answered, by code. ``worker_seconds`` is all workers'
    time together, ``seconds`` until the job is done, both at the most tokens; ``usd`` is None without a
    price. ``basis`` says what the time is based on.
    """

    whole: bool
    sampled_rows: int
    prompt_tokens: int
    prompt_range: Range
    cached_tokens: int
    completion_tokens: int
    fewest_tokens: int
    largest: tuple[tuple[int, int], ...]
    too_long: tuple[tuple[int, int], ...]
    too_long_rows: int
    failures: Mapping[str, int]
    first_failure: str
    worker_seconds: float
    seconds: float
    usd: float | None
    basis: str


def estimate(spec: JobSpec, survey: Survey, cached: int, model: InspectedModel) -> Estimate:
    """Estimate the job whose rows were surveyed; ``cached`` of the surveyed rows' prompt tokens will be
    found in the prefix cache."""
    rows, scale = survey.rows, survey.scale
    prompt_tokens = round(scale * sum(len(row.tokens) * row.sampling.n for row in rows))
    completion_tokens = round(scale * sum(row.most * row.sampling.n for row in rows))
    fewest = round(scale * sum((row.most if row.fixed else 1) * row.sampling.n for row in rows))
    cached_tokens = round(scale * cached)
    rates = _rates(spec)
    worker_seconds = _seconds(
        rates, model.parameters, _weight_bytes(spec), prompt_tokens - cached_tokens, completion_tokens
    )
    price = spec.price.usd_per_hour
    by_length = sorted(rows, key=lambda row: (-len(row.tokens), row.index))
    return Estimate(
        whole=survey.whole,
        sampled_rows=survey.looked_at,
        prompt_tokens=prompt_tokens,
        prompt_range=_prompt_range(survey, prompt_tokens),
        cached_tokens=cached_tokens,
        completion_tokens=completion_tokens,
        fewest_tokens=fewest,
        largest=tuple((row.index, len(row.tokens)) for row in by_length[:_LARGEST]),
        too_long=survey.too_long[:_LARGEST],
        too_long_rows=len(survey.too_long),
        failures=survey.failures,
        first_failure=survey.first_failure,
        worker_seconds=worker_seconds,
        seconds=worker_seconds / spec.workers.count,
        usd=None if price is None else worker_seconds / 3600 * price,
        basis=rates.basis,
    )


def _prompt_range(survey: Survey, total: int) -> Range:
    """How far a sample's total may be off, from how much its runs of neighbours differ."""
    if survey.whole:
        return exactly(total)
    means = [
        sum(len(survey.rows[place].tokens) * survey.rows[place].sampling.n for place in places) / count
        for count, places in survey.runs
        if count
    ]
    unread = (1.0 - survey.looked_at / survey.total) ** 0.5
    error = unread * survey.total * stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    far = t_quantile(TAIL, max(2.0, len(means) - 1.0)) * error
    return Range(max(0.0, total - far), float(total), total + far)


def _rates(spec: JobSpec) -> Rates:
    """Round figures that a worker reaches without tuning; what it really does shows once it runs.

    Local workers have this machine; of machines elsewhere nothing is known but whether they have GPUs.
    The same job on the same machine gets the same figures, as they also decide how it is cut into shards.
    """
    import torch

    from batchinfer.kernels.cpu.build import cpu_flags, levels

    local = spec.workers.backend == "local"
    if spec.workers.gpus and (not local or torch.cuda.is_available()):
        return Rates(3e14, 2.5e12, 256, "300 TFLOP/s and 2.5 TB/s a worker, 256 rows together")
    able = levels(cpu_flags()) if local else ()
    core = 25e9
    if "avx512_bf16" in able and spec.model.dtype == "bf16":
        core = 200e9
    elif "avx512" in able:
        core = 60e9
    cores = spec.workers.cpus or max(1, (os.cpu_count() or 1) // (spec.workers.count if local else 1))
    return Rates(
        core * cores,
        1e10,
        64,
        f"{core / 1e9:.0f} GFLOP/s on each of {cores:g} cores and 10 GB/s a worker, 64 rows together",
    )


def _weight_bytes(spec: JobSpec) -> float:
    by_quantization = {"int4": 0.5, "int8": 1.0, "fp8": 1.0}
    if spec.model.quantize is not None:
        return by_quantization[spec.model.quantize]
    return 4.0 if spec.model.dtype == "fp32" else 2.0


def _seconds(
    rates: Rates, parameters: int, weight_bytes: float, prompt_tokens: int, completion_tokens: int
) -> float:
    """Two operations a parameter and token; a decoding step also reads every weight once for its rows."""
    computing = 2.0 * parameters / rates.flops
    reading = parameters * weight_bytes / rates.bytes / rates.batch
    return prompt_tokens * computing + completion_tokens * max(computing, reading)
