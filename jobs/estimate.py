"""What a job will take, before anything is spent: tokens from a sample of rows, time from stated rates."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from batchinfer.connectors.types import BadRow, Row, Split
from batchinfer.jobs.inspection import InspectedModel
from batchinfer.jobs.prompts import Prompt, Prompts
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.types import JobError, RowError

SAMPLE_ROWS = 256
_SAMPLE_PLACES = 8
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
    """A job's tokens, time and price.

    ``prompt_tokens`` are of all rows, from ``sampled_rows`` of them; ``completion_tokens`` the most
    there can be. ``largest`` are the longest sampled prompts: row and tokens. ``failures`` counts
    sampled rows that can't be answered, by code. ``worker_seconds`` is all workers' time together,
    ``seconds`` until the job is done; ``usd`` is None without a price. ``basis`` says what the time is
    based on.
    """

    sampled_rows: int
    prompt_tokens: int
    completion_tokens: int
    largest: tuple[tuple[int, int], ...]
    failures: Mapping[str, int]
    first_failure: str
    worker_seconds: float
    seconds: float
    usd: float | None
    basis: str


def estimate(
    spec: JobSpec,
    rows: int,
    splits: Sequence[Split],
    read: Callable[[Split], Iterable[Row | BadRow]],
    prompts: Prompts,
    model: InspectedModel,
) -> Estimate:
    """Estimate a job of ``rows`` rows from a sample taken at evenly spaced places of its ``splits``.

    Raises JobError where the model's chat template refuses every sampled row.
    """
    sampled: list[tuple[int, Prompt, int | None]] = []
    problems: list[RowError] = []
    looked_at = 0
    for row in _sample(splits, read):
        looked_at += 1
        if isinstance(row, BadRow):
            problems.append(RowError(row.code, row.message))
            continue
        try:
            prompt = prompts.render(row.values)
            own = prompts.sampling
            most = spec.sampling.max_tokens if own is None else own(row.values).max_tokens
            sampled.append((row.index, prompt, most))
        except RowError as error:
            problems.append(error)
    lengths: list[tuple[int, int]] = []
    generated = 0
    refused = 0
    counts = model.count_tokens([prompt for _, prompt, _ in sampled])
    for (index, _, most), tokens in zip(sampled, counts, strict=True):
        if isinstance(tokens, RowError):
            problems.append(tokens)
            refused += 1
        elif tokens >= model.max_context:
            problems.append(
                RowError("too_long", f"row {index} has {tokens} tokens of {model.max_context} at most")
            )
        else:
            lengths.append((tokens, index))
            room = model.max_context - tokens
            generated += min(most or room, room) * spec.sampling.n
    if refused and refused == looked_at:
        raise JobError(f"the model {spec.model.source} can't take these messages: {problems[0].message}")
    scale = rows / looked_at if looked_at else 0.0
    prompt_tokens = round(scale * sum(tokens for tokens, _ in lengths))
    completion_tokens = round(scale * generated)
    rates = _rates(spec)
    worker_seconds = _seconds(
        rates, model.parameters, _weight_bytes(spec), prompt_tokens, completion_tokens
    )
    price = spec.price.usd_per_hour
    lengths.sort(key=lambda item: (-item[0], item[1]))
    return Estimate(
        sampled_rows=looked_at,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        largest=tuple((index, tokens) for tokens, index in lengths[:_LARGEST]),
        failures=dict(sorted(Counter(problem.code for problem in problems).items())),
        first_failure=problems[0].message if problems else "",
        worker_seconds=worker_seconds,
        seconds=worker_seconds / spec.workers.count,
        usd=None if price is None else worker_seconds / 3600 * price,
        basis=rates.basis,
    )


def _sample(
    splits: Sequence[Split], read: Callable[[Split], Iterable[Row | BadRow]]
) -> Iterable[Row | BadRow]:
    """Up to SAMPLE_ROWS rows from the beginnings of evenly spaced splits: the same for the same input."""
    if sum(split.rows for split in splits) <= SAMPLE_ROWS:
        chosen = list(splits)
    else:
        places = min(_SAMPLE_PLACES, len(splits))
        chosen = [splits[place * len(splits) // places] for place in range(places)]
    left = SAMPLE_ROWS
    for number, split in enumerate(chosen):
        wanted = -(-left // (len(chosen) - number))
        for row in islice(read(split), wanted):
            yield row
            left -= 1


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
