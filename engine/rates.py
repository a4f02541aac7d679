"""What a token costs on this machine: sizes from the model, rates from a short measurement."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from batchinfer.engine.models.decoder import Decoder
from batchinfer.engine.roof import sizes_as_loaded
from batchinfer.engine.types import StepCosts
from batchinfer.kernels.ops import KVSpec

# A product large enough to run at full rate, and a read larger than any cache, yet done in milliseconds.
_PRODUCT = {"cpu": (256, 1024, 1024), "cuda": (4096, 4096, 4096)}
_READ_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


def measure_costs(decoder: Decoder, spec: KVSpec) -> StepCosts:
    """The costs by which a step's time is split over its sequences.

    The rates decide only how time is split, never what is computed.
    """
    layers = len(decoder.config.layers)
    sizes = sizes_as_loaded(decoder.config, decoder.quantize, decoder.dtype.itemsize, spec.dtype.itemsize)
    rows, inner, columns = _PRODUCT[decoder.device.type]
    left = torch.ones(rows, inner, dtype=decoder.dtype, device=decoder.device)
    right = torch.ones(columns, inner, dtype=decoder.dtype, device=decoder.device)
    product = _best_seconds(lambda: torch.nn.functional.linear(left, right), decoder.device)
    numbers = torch.ones(_READ_BYTES[decoder.device.type] // 4, device=decoder.device)
    read = _best_seconds(numbers.sum, decoder.device)
    return StepCosts(
        flops_per_token=sizes.layer_flops,
        flops_per_sample=sizes.head_flops,
        attention_flops=sizes.attention_flops * layers,
        kv_bytes_per_token=sizes.kv_bytes * layers,
        weight_bytes=sizes.weight_bytes,
        flops_rate=2.0 * rows * inner * columns / product,
        bytes_rate=4.0 * numbers.numel() / read,
    )


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of five runs: others on the machine only make it longer."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
