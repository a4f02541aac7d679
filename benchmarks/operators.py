"""Where a step's time goes, operator by operator, beside what this machine could do at best.

    python benchmarks/operators.py [--threads 2] [--sequences 128] [--context 160] [--prefill 2048] \\
        [--kv-dtype int8]

The shapes are SmolLM2-135M's. Each figure is the least of several runs, since other programs only add to
a time; the limits (products, reads) are measured in the same run. One layer's time is multiplied by the
number of layers; caches and weights of all layers are used in turn, so that each run reads cold memory
as a step does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from batchinfer.kernels.cpu.operators import CPUKVCache, load
from batchinfer.kernels.ops import AttentionBatch, KVSpec

LAYERS, HIDDEN, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY = 30, 576, 9, 3, 64, 1536, 49152


def least(run: Callable[[int], object], repeats: int = 20, layers: int = LAYERS) -> float:
    """Seconds of one pass over all layers, ``run(layer)`` each: the sum of each layer's least time."""
    best = [float("inf")] * layers
    for _ in range(repeats):
        for layer in range(layers):
            begin = time.perf_counter()
            run(layer)
            best[layer] = min(best[layer], time.perf_counter() - begin)
    return sum(best)


def step(sequences: int, context: int, queries: int, block: int, shared: int = 0) -> AttentionBatch:
    """A step of equal sequences whose blocks lie scattered over the cache."""
    blocks = -(-context // block)
    common = shared // block
    ids = torch.randperm(sequences * blocks, generator=torch.Generator().manual_seed(0)).int()
    tables = ids.view(sequences, blocks).clone()
    tables[:, :common] = tables[0, :common]
    positions = torch.arange(context - queries, context)
    slots = tables.long()[:, positions // block] * block + positions % block
    return AttentionBatch(
        query_starts=torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32),
        positions=positions.repeat(sequences),
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        block_tables=tables,
        slots=slots.flatten(),
        max_query=queries,
        max_context=context,
    )


def measure(
    title: str,
    batch: AttentionBatch,
    quantize: str | None,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    limits: dict[str, float],
) -> dict[str, object]:
    """Milliseconds of every operator of one step, and of the least that operations and bytes need."""
    ops = load()
    spec = KVSpec(LAYERS, KV_HEADS, SIZE, kv_dtype)
    tokens, sequences = len(batch.positions), len(batch.context_lens)
    cache: CPUKVCache = ops.allocate_kv(spec, int(batch.block_tables.max()) + 1, torch.device("cpu"))
    # Numbers between 1 and 2 of any type, and any int8 beside scales between 1 and 2.
    cache.data.view(torch.int32).fill_(0x3FA03FA0)
    width = (HEADS + 2 * KV_HEADS) * SIZE
    shapes = {
        "qkv": (width, HIDDEN),
        "attention output": (HIDDEN, HEADS * SIZE),
        "gate, up and activation": (2 * INNER, HIDDEN),
        "down": (HIDDEN, INNER),
    }
    itemsize = dtype.itemsize
    angles = torch.rand(4096, SIZE // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    hidden, qkv = (torch.randn(tokens, n).to(dtype) for n in (HIDDEN, width))
    q = torch.randn(tokens, HEADS, SIZE).to(dtype)
    norm = torch.ones(HIDDEN)
    rows: dict[str, tuple[float, float]] = {}
    for name, (out, into) in shapes.items():
        weights = [ops.pack_linear(torch.randn(out, into).to(dtype), None, quantize) for _ in range(LAYERS)]
        x = torch.randn(tokens, into).to(dtype)
        if name == "gate, up and activation":
            took = least(lambda i, x=x, weights=weights: ops.gated_linear(x, weights[i], "silu"))
        else:
            took = least(lambda i, x=x, weights=weights: ops.linear(x, weights[i]))
        operations = 2 * tokens * out * into * LAYERS / limits["operations"]
        rows[f"linear {name}"] = (took, max(operations, out * into * itemsize * LAYERS / limits["bytes"]))
    took = least(lambda i: ops.attention(q, cache, i, batch, 0.125, 0, 0.0))
    pairs = int((batch.positions + 1).sum()) * HEADS * LAYERS
    lines = set(batch.block_tables.flatten().tolist())
    read = len(lines) * ops.block_bytes(spec)
    rows["attention"] = (took, max(4 * pairs * SIZE / limits["operations"], read / limits["bytes"]))
    took = least(lambda i: ops.rotary_and_store(qkv, cos_sin, batch, cache, i, HEADS, None, None, 1e-5))
    rows["rotary and store"] = (took, 2 * qkv.nbytes * LAYERS / limits["bytes"])
    added, residual = torch.zeros_like(hidden), hidden.clone()
    took = 2 * least(lambda i: ops.add_rms_norm(added, residual, norm, 1e-5))
    rows["add and norm"] = (took, 8 * hidden.nbytes * LAYERS / limits["bytes"])
    head = ops.pack_linear(torch.randn(VOCABULARY, HIDDEN).to(dtype), None, quantize)
    last = hidden[:sequences]
    took = least(lambda _: ops.logits(last, head), layers=1)
    operations = 2 * sequences * HIDDEN * VOCABULARY / limits["operations"]
    rows["logits"] = (took, max(operations, HIDDEN * VOCABULARY * itemsize / limits["bytes"]))
    logits = ops.logits(last, head)
    zeros, keys = torch.zeros(sequences), torch.zeros(sequences, 2, dtype=torch.int64)
    took = least(lambda _: ops.sample(logits, zeros, keys, zeros.long()), layers=1)
    rows["sample greedily"] = (took, logits.nbytes / limits["bytes"])
    took = least(lambda _: ops.sample(logits, zeros + 1, keys, zeros.long()), layers=1)
    noise = {"sample with noise, instead": round(took * 1e3, 2)}
    table = {name: [round(took * 1e3, 2), round(limit * 1e3, 2)] for name, (took, limit) in rows.items()}
    table["step"] = [round(sum(column) * 1e3, 2) for column in zip(*rows.values(), strict=True)]
    return {"step": title, "ms [measured, least possible]": table, "ms": noise}


def machine_limits(dtype: torch.dtype) -> dict[str, float]:
    """Operations a second of a large packed product, and bytes a second read from memory."""
    ops = load()
    x, weight = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    packed = ops.pack_linear(weight, None, None)
    product = least(lambda _: ops.linear(x, packed), layers=1)
    large = torch.ones(1 << 28)
    reading = least(lambda _: large.sum(), layers=1)
    return {"operations": 2 * 2048**3 / product, "bytes": large.nbytes / reading}


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--prefill", type=int, default=2048)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--kv-dtype", choices=["bf16", "fp32", "int8"], help="default: the dtype")
    parser.add_argument("--quantize", choices=["int8"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
    dtype, kv_dtype = dtypes[options.dtype], dtypes[options.kv_dtype or options.dtype]
    limits = machine_limits(dtype)
    sequences, context, prefill = options.sequences, options.context, options.prefill
    steps = {
        f"decode, {sequences} sequences of {context}": step(sequences, context, 1, 32),
        f"decode, {sequences} sequences of 1024, 896 of them shared": step(sequences, 1024, 1, 32, 896),
        f"prefill of {prefill}": step(1, prefill, prefill, 32),
    }
    report = {
        "threads": options.threads,
        "dtype": options.dtype,
        "kv_dtype": options.kv_dtype or options.dtype,
        "quantize": options.quantize,
        "limits": {"TFLOP/s": limits["operations"] / 1e12, "GB/s": limits["bytes"] / 1e9},
        "steps": [
            measure(name, batch, options.quantize, dtype, kv_dtype, limits) for name, batch in steps.items()
        ],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
