"""A step on its way: drafted, then launched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchinfer.engine.blocks import BlockIds
from batchinfer.engine.sequence import Sequence
from batchinfer.engine.types import NewRow, StepPlan

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A planned step whose result is not applied yet, by entry of its plan; ``written`` are the blocks
    that it may write."""

    plan: StepPlan
    sequences: list[Sequence]
    written: BlockIds
    prompt_tokens: Counts
    computed_before: Counts


class StepDraft:
    """What a step being planned has so far beside its decodes; ``budget`` is the tokens left to it."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunk_rows: list[int] = []
        self.chunk_sizes: list[int] = []
        self._new_rows: list[NewRow] = []
        self._block_rows: list[Counts] = []
        self._block_positions: list[Counts] = []
        self._block_ids: list[BlockIds] = []

    def add_chunk(self, row: int, size: int) -> None:
        """Compute ``size`` tokens of ``row``."""
        self.chunk_rows.append(row)
        self.chunk_sizes.append(size)
        self.budget -= size

    def add_row(self, new: NewRow) -> None:
        """Set up a row before the step."""
        self._new_rows.append(new)

    def add_blocks(self, rows: Counts, positions: Counts, ids: BlockIds) -> None:
        """Extend block tables before the step: ``ids`` become blocks ``positions`` of ``rows``."""
        self._block_rows.append(rows)
        self._block_positions.append(positions)
        self._block_ids.append(ids)

    def plan(
        self, index: int, rows: Counts, num_tokens: Counts, starts: Counts, samples: npt.NDArray[np.bool_]
    ) -> StepPlan:
        """The plan of these entries, with the rows and blocks drafted."""
        return StepPlan(
            index=index,
            rows=rows,
            num_tokens=num_tokens,
            starts=starts,
            samples=samples,
            new_rows=tuple(self._new_rows),
            block_rows=_joined(self._block_rows),
            block_positions=_joined(self._block_positions),
            block_ids=_joined(self._block_ids),
        )


def _joined(arrays: list[Counts]) -> Counts:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)
