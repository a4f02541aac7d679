"""The engine's throughput on a GPU, beside what the GPU could do at best, as one table.

    python benchmarks/gpu/throughput.py [--workloads qwen3-8b ...] [--json]

Weights are dummies, made from configurations that are shipped, so nothing is downloaded: their values
change no time. Prompts are random token ids, outputs have a fixed length (greedy, no end). Each workload
runs twice in an engine of its own: once to compile and record, once measured. The roof is the
sequential one of engine.roof, at the rates of products and of reads measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from batchinfer.engine.bench import shares_of
from batchinfer.engine.types import SamplingParams


@dataclass(frozen=True)
class Workload:
    """Requests with so many tokens in and out: from the least to the most, evenly; the first ``shared``
    of all prompts are the same."""

    model: str
    quantize: str | None
    requests: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    shared: int = 0


WORKLOADS = {
    "qwen3-0.6b": Workload("Qwen3-0.6B", None, 256, (100, 1024), (100, 1024)),
    "qwen3-8b": Workload("Qwen3-8B", None, 256, (1024, 1024), (1024, 1024)),
    "qwen3-8b-fp8": Workload("Qwen3-8B", "fp8", 256, (1024, 1024), (1024, 1024)),
    "qwen3-8b-prompts": Workload("Qwen3-8B", None, 256, (2048, 2048), (128, 128)),
    "qwen3-8b-prompts-fp8": Workload("Qwen3-8B", "fp8", 256, (2048, 2048), (128, 128)),
    "qwen3-8b-shared": Workload("Qwen3-8B", None, 256, (2176, 2176), (256, 256), shared=2048),
    "qwen3-8b-unshared": Workload("Qwen3-8B", None, 256, (2176, 2176), (256, 256)),
}


@dataclass(frozen=True)
class Measured:
    """One row of the table; rates in output tokens a second."""

    workload: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    seconds: float
    output_tok_per_s: float
    roof_tok_per_s: float
    roof_share: float
    mfu: float
    mbu: float


def prompts_of(
    workload: Workload, vocabulary: int, seed: int
) -> tuple[list[tuple[int, ...]], list[SamplingParams]]:
    """Random token ids and the lengths to generate; the same for the same seed."""
    rng = random.Random(seed)
    prefix = [rng.randrange(vocabulary) for _ in range(workload.shared)]
    prompts, sampling = [], []
    for _ in range(workload.requests):
        length = rng.randint(*workload.prompt)
        prompts.append((*prefix, *(rng.randrange(vocabulary) for _ in range(length - len(prefix)))))
        sampling.append(SamplingParams(max_tokens=rng.randint(*workload.output), ignore_eos=True))
    return prompts, sampling


def measure(name: str, workload: Workload, device: str) -> Measured:
    """Run one workload in an engine of its own."""
    import torch

    from batchinfer.engine.engine import Engine
    from batchinfer.engine.roof import measure_limits

    limits = measure_limits(torch.device(device), torch.bfloat16, workload.quantize)
    with Engine(
        workload.model,
        device=device,
        dtype="bf16",
        quantize=workload.quantize,
        load_format="dummy",
        max_context=workload.prompt[1] + workload.output[1],
        max_sequences=workload.requests,
        memory_share=0.9,
    ) as engine:
        vocabulary = engine.loaded.model.vocab_size
        engine.generate(*prompts_of(workload, vocabulary, seed=1))
        prompts, sampling = prompts_of(workload, vocabulary, seed=2)
        before = engine.stats.steps
        begun = time.perf_counter()
        completions = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - begun
        steps = engine.stats.steps - before
        shares = shares_of(engine, completions, steps, seconds, limits, workload.shared)
    output = sum(len(completion.token_ids) for completion in completions)
    return Measured(
        workload=name,
        requests=workload.requests,
        prompt_tokens=sum(completion.prompt_tokens for completion in completions),
        cached_tokens=sum(completion.cached_tokens for completion in completions),
        output_tokens=output,
        seconds=round(seconds, 2),
        output_tok_per_s=round(output / seconds, 1),
        **asdict(shares),
    )


def table(rows: Sequence[Measured]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| workload | tokens in | cached | out | seconds | output tok/s | roof | share | mfu | mbu |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.workload} | {r.prompt_tokens:,} | {r.cached_tokens:,} | {r.output_tokens:,} "
        f"| {r.seconds:.1f} | {r.output_tok_per_s:,.0f} | {r.roof_tok_per_s:,.0f} | {r.roof_share:.0%} "
        f"| {r.mfu:.0%} | {r.mbu:.0%} |"
        for r in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The engine's throughput on a GPU, beside its roof.")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU here, so nothing is measured.", file=sys.stderr)
        return 78
    rows = []
    for name in options.workloads:
        rows.append(measure(name, WORKLOADS[name], "cuda"))
        print(f"{name}: {rows[-1].output_tok_per_s:,.0f} tok/s", file=sys.stderr)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    if options.json:
        print(json.dumps({"machine": where, "rows": [asdict(row) for row in rows]}))
    else:
        print(f"{where}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
