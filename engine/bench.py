"""The throughput of one engine on a file of prompts, each with the number of tokens to generate."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchinfer.engine.types import Completion, SamplingParams

if TYPE_CHECKING:
    from batchinfer.engine.engine import Engine
    from batchinfer.engine.roof import Limits


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one run over a data set took.

    ``seconds`` is from the texts to the texts, tokenizing included; ``load_seconds`` the time from
    nothing to an engine that is ready, imports included; ``prompt_tokens`` counts all of the prompts'
    tokens, ``cached_tokens`` those of them read from the prefix cache; ``peak_rss_mb`` is in units of
    2**20 bytes, of this process. On a GPU also the shares of its operations (``mfu``) and bytes (``mbu``)
    a second, the sequential roof of engine.roof and the share of it, all at rates measured in this run.
    """

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    seconds: float
    output_tok_per_s: float
    total_tok_per_s: float
    load_seconds: float
    peak_rss_mb: int
    mfu: float | None = None
    mbu: float | None = None
    roof_tok_per_s: float | None = None
    roof_share: float | None = None


@dataclass(frozen=True, slots=True)
class Shares:
    """How much of a device a run has used; see Throughput."""

    mfu: float
    mbu: float
    roof_tok_per_s: float
    roof_share: float


def shares_of(
    engine: Engine,
    completions: Sequence[Completion],
    steps: int,
    seconds: float,
    limits: Limits,
    shared_tokens: int = 0,
) -> Shares:
    """What ``completions`` in ``steps`` steps used of a device with these ``limits``.

    ``shared_tokens`` leading tokens of all prompts are the same, and count as read once a step.
    """
    from batchinfer.engine.roof import RequestSizes, roof, sizes_as_loaded, utilization, work_of

    loaded = engine.loaded
    number = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "fp8": 1}
    config = engine.config
    model = sizes_as_loaded(
        loaded.model,
        config.quantize,
        number[loaded.dtype],
        number[loaded.dtype if config.kv_dtype == "auto" else config.kv_dtype],
    )
    requests = [
        RequestSizes(c.prompt_tokens, c.cached_tokens, len(c.token_ids), shared_tokens) for c in completions
    ]
    work = work_of(model, requests)
    best = roof(model, work, min(config.max_sequences, len(requests)), limits).sequential
    mfu, mbu = utilization(model, work, steps, seconds, limits)
    rate = work.output_tokens / seconds
    return Shares(round(mfu, 4), round(mbu, 4), round(best, 1), round(rate / best, 4))


def read_dataset(path: str | Path) -> list[tuple[str, int]]:
    """(prompt, max_tokens) of every line ``{"prompt": str, "max_tokens": int}`` of a JSONL file.

    Raises ValueError naming the file and the line that is not one, or the file without any.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The data set {path} can't be read: {error}.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, max_tokens = row["prompt"], row["max_tokens"]
        except (ValueError, TypeError, KeyError):
            prompt = max_tokens = None
        if not isinstance(prompt, str) or type(max_tokens) is not int or max_tokens < 1:
            raise ValueError(
                f"{path}, line {number}: expected an object with prompt (text) and max_tokens (1 or more)."
            )
        rows.append((prompt, max_tokens))
    if not rows:
        raise ValueError(f"The data set {path} has no lines.")
    return rows


def measure_throughput(model: str, dataset: str | Path, **settings: Any) -> Throughput:
    """Load ``model`` and complete the data set at once: greedy, exactly ``max_tokens`` a prompt.

    ``settings`` are those of Engine. Raises ValueError for a bad data set or a prompt that can't be
    run, and what Engine raises.
    """
    rows = read_dataset(dataset)
    begun = time.perf_counter()
    # Threads that wait for each other sleep: as fast on a machine of our own, far faster on a shared one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from batchinfer.engine.engine import Engine  # its imports are part of loading

    with Engine(model, **settings) as engine:
        load_seconds = time.perf_counter() - begun
        sampling = [SamplingParams(max_tokens=count, ignore_eos=True) for _, count in rows]
        begun = time.perf_counter()
        completions = engine.generate([prompt for prompt, _ in rows], sampling)
        seconds = time.perf_counter() - begun
        shares = _gpu_shares(engine, completions, seconds)
    for completion, (_, wanted) in zip(completions, rows, strict=True):
        if len(completion.token_ids) != wanted:
            raise ValueError(
                f"prompt {completion.index} fits only {len(completion.token_ids)} of its {wanted} tokens "
                "into the context; raise max_context."
            )
    prompt_tokens = sum(completion.prompt_tokens for completion in completions)
    output_tokens = sum(len(completion.token_ids) for completion in completions)
    return Throughput(
        requests=len(rows),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(completion.cached_tokens for completion in completions),
        output_tokens=output_tokens,
        seconds=round(seconds, 3),
        output_tok_per_s=round(output_tokens / seconds, 1),
        total_tok_per_s=round((prompt_tokens + output_tokens) / seconds, 1),
        load_seconds=round(load_seconds, 3),
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **({} if shares is None else asdict(shares)),
    )


def _gpu_shares(engine: Engine, completions: Sequence[Completion], seconds: float) -> Shares | None:
    """None on a CPU, whose rates depend on what else it does."""
    import torch

    from batchinfer.engine.roof import measure_limits

    device = torch.device(engine.loaded.device)
    if device.type != "cuda":
        return None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[engine.loaded.dtype]
    limits = measure_limits(device, dtype, engine.config.quantize)
    return shares_of(engine, completions, engine.stats.steps, seconds, limits)
