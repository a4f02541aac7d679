"""What steps need of a GPU beside weights and KV cache, measured by running the largest there can be."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from batchinfer.engine.batch import DeviceRows
from batchinfer.engine.graphs import DecodeGraphs
from batchinfer.engine.models.decoder import Decoder
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.types import EngineError, NewRow, SamplingParams, StepCosts, StepPlan
from batchinfer.kernels.ops import KVSpec, Operators

# Everything at once that makes the sampler copy logits; 20 log-probabilities are the most of OpenAI's API.
_ALL = SamplingParams(
    max_tokens=None,
    min_tokens=1,
    temperature=1.0,
    top_k=5,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={0: 1.0},
    logprobs=20,
    prompt_logprobs=20,
)


class Meter(Protocol):
    """Watches a device's memory."""

    def peak(self, work: Callable[[], None]) -> int:
        """The most bytes that ``work`` held at once, beyond those that were held before."""
        ...


class CudaMeter:
    """Counts the bytes that torch reserves on a GPU: with what its allocator can't use of them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self, work: Callable[[], None]) -> int:
        """See Meter."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        work()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_reserved(self._device) - before
        return int(peak)


def step_bytes(
    decoder: Decoder,
    ops: Operators,
    spec: KVSpec,
    meter: Meter,
    *,
    max_sequences: int,
    max_batch_tokens: int,
    max_context: int,
    recorded: bool,
) -> int:
    """Bytes of the rows kept on the device, of the largest step, and of the recorded decode steps' pool.

    All sequences stand at the end of a full context and use every sampling parameter; the first ones
    compute all tokens that a step may have beyond one for each. Only one block of KV cache is there, so
    they all read and write it: sizes depend on no content. Recorded steps keep their memory to
    themselves, so it counts beside that of other steps; a recorded batch of ``max_sequences`` needs most,
    and the smaller ones find their memory in its pool.
    """
    block = ops.block_bytes(spec)

    def largest_step() -> None:
        kv = ops.allocate_kv(spec, 1, decoder.device)
        runner = TorchRunner(
            decoder,
            ops,
            kv,
            max_rows=max_sequences,
            max_context=max_context,
            eos_token_ids=(0,),
            costs=StepCosts(1, 1, 1, 1, 1, 1, 1),
        )
        handle = runner.launch(_largest_plan(max_sequences, max_batch_tokens, max_context))
        try:
            handle.result()
        except EngineError:
            # Damaged weights: the first request that meets them is told.
            return

    @torch.inference_mode()
    def recorded_decodes() -> None:
        kv = ops.allocate_kv(spec, 1, decoder.device)
        rows = DeviceRows(max_sequences, max_context, kv.block_size, decoder.device, padding_block=0)
        DecodeGraphs(decoder, kv, rows, [max_sequences], _run_once)

    total = meter.peak(largest_step) - block
    if recorded:
        # Both have the rows.
        width = -(-max_context // ops.block_size(spec))
        rows = 4 * (max_sequences + 1) * (max_context + 1 + width)
        total += max(0, meter.peak(recorded_decodes) - block - rows)
        # What records and what it records refer to each other.
        gc.collect()
    return total


def _run_once(work: Callable[[], None]) -> Callable[[], None]:
    work()
    return work


def _largest_plan(max_sequences: int, max_batch_tokens: int, max_context: int) -> StepPlan:
    sequences = min(max_sequences, max_batch_tokens)
    counts = np.ones(sequences, np.int32)
    left = max_batch_tokens - sequences
    for i in range(sequences):
        more = min(left, max_context - 1)
        counts[i] += more
        left -= more
    tokens = np.zeros(max_context, np.int32)
    rows = np.arange(sequences, dtype=np.int32)
    return StepPlan(
        index=0,
        rows=rows,
        num_tokens=counts,
        starts=max_context - counts,
        samples=np.ones(sequences, np.bool_),
        new_rows=tuple(NewRow(int(row), tokens, max_context, _ALL, int(row), 0) for row in rows),
    )
