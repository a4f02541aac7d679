"""The throughput of one engine on a file of prompts, each with the number of tokens to generate."""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchinfer.engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Throughput:
    """What one run over a data set took.

    ``seconds`` is from the texts to the texts, tokenizing included; ``load_seconds`` the time from
    nothing to an engine that is ready, imports included; ``prompt_tokens`` counts all of the prompts'
    tokens, ``cached_tokens`` those of them read from the prefix cache; ``peak_rss_mb`` is in units of
    2**20 bytes, of this process.
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
    )
