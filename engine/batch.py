"""What the device keeps of every row between steps, and the inputs of a step made from it there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from batchinfer.engine.types import StepPlan
from batchinfer.kernels.ops import AttentionBatch


def to_device(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy of ``values`` on ``device``; the caller may reuse the array at once.

    For CUDA it goes through pinned memory, queued on the stream: a copy from pageable memory would wait
    for the work before it.
    """
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device, copy=True)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one forward pass.

    ``tokens`` int64 [T], packed entry after entry; ``last`` int64 [S]: where each entry's last token is.
    """

    tokens: torch.Tensor
    attention: AttentionBatch
    last: torch.Tensor


class DeviceRows:
    """Tokens and block tables of all rows.

    ``tokens`` int32 [max_rows, max_context + 1]: prompt and decoded tokens by position, the sampler's
    writes included; the extra column takes the token that follows a full context. ``blocks`` int32
    [max_rows, blocks of a full context]. With a ``padding_block``, which nobody else may use, both have
    one row more, ``padding_row``, whose first block it is: to fill up batches with.
    """

    def __init__(
        self,
        max_rows: int,
        max_context: int,
        block_size: int,
        device: torch.device,
        padding_block: int | None = None,
    ) -> None:
        self.max_context = max_context
        self.padding_row = None if padding_block is None else max_rows
        self._block_size = block_size
        self._device = device
        width = -(-max_context // block_size)
        rows = max_rows + (padding_block is not None)
        self.tokens = torch.zeros((rows, max_context + 1), dtype=torch.int32, device=device)
        self.blocks = torch.zeros((rows, width), dtype=torch.int32, device=device)
        if padding_block is not None:
            self.blocks[max_rows, 0] = padding_block

    def update(self, plan: StepPlan) -> None:
        """Set up the plan's new rows, then hand out its blocks."""
        for new in plan.new_rows:
            self.tokens[new.row, : len(new.tokens)] = to_device(new.tokens, self._device)
            self.blocks[new.row] = 0
        if len(plan.block_rows):
            rows, positions, ids = (
                to_device(values, self._device)
                for values in (plan.block_rows, plan.block_positions, plan.block_ids)
            )
            self.blocks[rows.long(), positions.long()] = ids

    def inputs(self, plan: StepPlan) -> StepInputs:
        """Build the step's inputs on the device; only the plan's own small arrays cross to it."""
        rows, counts, starts = (
            to_device(values, self._device).long() for values in (plan.rows, plan.num_tokens, plan.starts)
        )
        ends = counts.cumsum(0)
        total = plan.total_tokens
        if total == len(plan.rows):  # a token each
            positions, token_rows = starts, rows
        else:
            offsets = starts - (ends - counts)
            entry = torch.repeat_interleave(counts, output_size=total)
            positions = torch.arange(total, device=self._device) + offsets[entry]
            token_rows = rows[entry]
        max_context = int((plan.starts + plan.num_tokens).max())
        attention = AttentionBatch(
            query_starts=torch.cat((ends.new_zeros(1), ends)).int(),
            positions=positions,
            context_lens=(starts + counts).int(),
            block_tables=self.blocks[rows, : -(-max_context // self._block_size)],
            slots=self.slots(token_rows, positions),
            max_query=int(plan.num_tokens.max()),
            max_context=max_context,
        )
        return StepInputs(self.tokens[token_rows, positions].long(), attention, ends - 1)

    def slots(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where the cache stores the tokens at ``positions`` of ``rows``, all int64 [T]."""
        blocks = self.blocks[rows, positions // self._block_size].long()
        return blocks * self._block_size + positions % self._block_size
