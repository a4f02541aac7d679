"""How fast a device could complete requests at best, and how much of it a run has used.

Every output token costs the device bytes (its share of the weights, its own context) and operations
(of the weights, of attention). The sequential roof takes one after the other, the overlapped one the
longer of both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from batchinfer.engine.models.decoder import DecoderConfig
from batchinfer.kernels.fp8 import quantize_rows

# Sizes at which rates are measured: products and reads that take a GPU about a millisecond.
_PRODUCT = {"cpu": 1024, "cuda": 8192}
_READ_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}
_REPEATS = {"cpu": 2, "cuda": 20}


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What a token costs: operations of the layers and of the head, of one query against one position in
    one layer; bytes of KV of one position in one layer, and of the weights that a step reads. ``windows``
    has a number for each layer, 0 where it sees everything."""

    layer_flops: float
    head_flops: float
    attention_flops: float
    kv_bytes: float
    weight_bytes: float
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RequestSizes:
    """Tokens of one request: of its prompt, those of them that a cache gave, and of its output (1 or
    more). ``shared`` leading ones lie in blocks that a step reads once for all requests."""

    prompt: int
    cached: int
    output: int
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """What requests cost in all: operations, bytes of KV that their decodes read, bytes of KV that each
    step reads once for all of them, output tokens."""

    flops: float
    kv_bytes: float
    shared_bytes: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """A device's rates: operations and bytes a second."""

    flops_rate: float
    bytes_rate: float


@dataclass(frozen=True, slots=True)
class Roof:
    """Output tokens a second at best."""

    sequential: float
    overlapped: float


def model_sizes(
    model: DecoderConfig, weight_bytes: float, kv_bytes: float, head_bytes: float | None = None
) -> ModelSizes:
    """The sizes of ``model`` with weights and KV of so many bytes a number; the head's are the weights'
    where they are not given."""
    head = model.vocab_size * model.hidden_size
    return ModelSizes(
        layer_flops=2.0 * model.layer_parameters,
        head_flops=2.0 * head,
        attention_flops=4.0 * model.num_heads * model.head_size,
        kv_bytes=2.0 * model.num_kv_heads * model.head_size * kv_bytes,
        weight_bytes=model.layer_parameters * weight_bytes
        + head * (weight_bytes if head_bytes is None else head_bytes),
        windows=tuple(layer.window for layer in model.layers),
    )


def sizes_as_loaded(
    model: DecoderConfig, quantize: str | None, weight_bytes: float, kv_bytes: float
) -> ModelSizes:
    """The sizes of ``model`` as its decoder keeps it: weights of ``weight_bytes`` a number where they are
    not quantized, KV of ``kv_bytes``. Embeddings don't count: a step reads few of their rows."""
    if quantize == "int4":
        # Each 128 have a scale of 16 bits and a zero point of 8 beside them; the head is int8.
        return model_sizes(model, 67 / 128, kv_bytes, 1.0)
    return model_sizes(model, weight_bytes if quantize is None else 1.0, kv_bytes)


def work_of(model: ModelSizes, requests: Iterable[RequestSizes]) -> Work:
    """The least work that completes ``requests``: nothing computed twice, the last token never fed."""
    flops, kv, shared, output = 0.0, 0.0, 0, 0
    for request in requests:
        end = request.prompt + request.output - 1
        flops += model.layer_flops * (end - request.cached) + model.head_flops * request.output
        shared = max(shared, request.shared)
        for window in model.windows:
            flops += model.attention_flops * _positions_seen(request.cached, end, window)
            read = _positions_seen(request.prompt, end, window)
            if window == 0:
                read -= request.shared * (end - request.prompt)
            kv += model.kv_bytes * read
        output += request.output
    full = sum(window == 0 for window in model.windows)
    return Work(flops, kv, model.kv_bytes * shared * full, output)


def _positions_seen(start: int, end: int, window: int) -> int:
    """Sum over the positions ``start`` .. ``end - 1`` of how many positions each sees, itself included."""
    if window > 0:
        growing = min(end, max(start, window))
        return _positions_seen(start, growing, 0) + (end - growing) * window
    return (end * (end + 1) - start * (start + 1)) // 2


def roof(model: ModelSizes, work: Work, batch: float, limits: Limits) -> Roof:
    """The roofs with ``batch`` sequences decoding in each step."""
    steps = work.output_tokens / batch
    moving = (steps * (model.weight_bytes + work.shared_bytes) + work.kv_bytes) / limits.bytes_rate
    computing = work.flops / limits.flops_rate
    return Roof(work.output_tokens / (moving + computing), work.output_tokens / max(moving, computing))


def utilization(
    model: ModelSizes, work: Work, steps: int, seconds: float, limits: Limits
) -> tuple[float, float]:
    """(mfu, mbu): the shares of the device's operations and bytes that ``work`` needed in ``steps`` steps.

    Weights are read once a step; intermediate results and the KV that prefill reads are not counted.
    """
    moved = steps * (model.weight_bytes + work.shared_bytes) + work.kv_bytes
    return work.flops / (seconds * limits.flops_rate), moved / (seconds * limits.bytes_rate)


@torch.inference_mode()
def measure_limits(device: torch.device, dtype: torch.dtype, quantize: str | None) -> Limits:
    """Measure both rates on ``device``, of products in ``dtype`` or, where asked, in fp8."""
    size, kind = _PRODUCT[device.type], device.type
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if quantize == "fp8" and kind == "cuda":
        a, b = quantize_rows(left), quantize_rows(right)
        product = _seconds(
            lambda: torch._scaled_mm(
                a.values,
                b.values.t(),
                scale_a=a.scales[:, None],
                scale_b=b.scales[None, :],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            ),
            device,
        )
    else:
        product = _seconds(lambda: left @ right.t(), device)
    numbers = torch.ones(_READ_BYTES[kind] // 4, device=device)
    return Limits(2.0 * size**3 / product, 4.0 * numbers.numel() / _seconds(numbers.sum, device))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call of ``work``, the least of four series."""
    repeats, best = _REPEATS[device.type], float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - begun) / repeats)
    return best
