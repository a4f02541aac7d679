"""The sequences on the device, as arrays by device row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from batchinfer.engine.blocks import BlockIds
from batchinfer.engine.sequence import Sequence

Counts = npt.NDArray[np.int32]


class RunningRows:
    """What the scheduler knows of each running sequence, kept between steps.

    All arrays are int32 and indexed by row. ``length`` counts the tokens known and in flight,
    ``planned`` the positions whose computation is planned: planned < length < ``limit``. ``expected``
    is the length at which the sequence probably ends; ``prompt_tokens`` and ``computed_before`` are the
    sequence's. ``table`` [rows, most blocks] holds ``num_blocks`` block ids, of which other sequences
    share the first ``num_shared``.
    """

    def __init__(self, max_rows: int, max_blocks: int, pool_blocks: int) -> None:
        self.max_rows = max_rows
        self.active = np.zeros(max_rows, np.bool_)
        self.length = np.zeros(max_rows, np.int32)
        self.planned = np.zeros(max_rows, np.int32)
        self.limit = np.zeros(max_rows, np.int32)
        self.expected = np.zeros(max_rows, np.int32)
        self.prompt_tokens = np.zeros(max_rows, np.int32)
        self.computed_before = np.zeros(max_rows, np.int32)
        self.num_blocks = np.zeros(max_rows, np.int32)
        self.num_shared = np.zeros(max_rows, np.int32)
        self.table = np.zeros((max_rows, max_blocks), np.int32)
        self._ticket = np.zeros(max_rows, np.int64)
        self._sequences: list[Sequence | None] = [None] * max_rows
        self._free = list(range(max_rows - 1, -1, -1))
        # The row that a block was allocated for, -1 once that row's sequence is gone.
        self._allocated_for = np.full(pool_blocks, -1, np.int32)
        self._by_age: Counts | None = None

    @property
    def num_free(self) -> int:
        """Rows without a sequence."""
        return len(self._free)

    def __len__(self) -> int:
        """Rows with a sequence."""
        return self.max_rows - len(self._free)

    def at(self, row: int) -> Sequence:
        """The sequence in ``row``, which has one."""
        sequence = self._sequences[row]
        assert sequence is not None
        return sequence

    def by_age(self) -> Counts:
        """Rows with a sequence, by ticket: the oldest first."""
        if self._by_age is None:
            rows = np.flatnonzero(self.active).astype(np.int32)
            self._by_age = rows[np.argsort(self._ticket[rows])]
        return self._by_age

    def place(
        self, sequence: Sequence, expected: int, blocks: BlockIds, num_shared: int, start: int
    ) -> None:
        """Give ``sequence``, all of whose tokens are known, a free row; it begins at position ``start``.

        The first ``num_shared`` of its ``blocks`` it shares, the others were allocated for it.
        """
        row = self._free.pop()
        sequence.row = row
        self._sequences[row] = sequence
        self.active[row] = True
        self._by_age = None
        self._ticket[row] = sequence.ticket
        self.length[row] = sequence.num_known
        self.planned[row] = start
        self.limit[row] = sequence.limit
        self.expected[row] = expected
        self.prompt_tokens[row] = len(sequence.prompt)
        self.computed_before[row] = sequence.computed_before
        self.num_blocks[row] = len(blocks)
        self.num_shared[row] = num_shared
        self.table[row, : len(blocks)] = blocks
        # Whoever computed a shared block shares all its blocks up to there from now on.
        owners = self._allocated_for[blocks[:num_shared]]
        running = np.flatnonzero(owners >= 0)
        np.maximum.at(self.num_shared, owners[running], (running + 1).astype(np.int32))
        self._allocated_for[blocks[num_shared:]] = row

    def append_blocks(self, rows: Counts, ids: BlockIds) -> Counts:
        """Give each of ``rows`` one of ``ids``, just allocated, as its next block; returns its number."""
        positions = self.num_blocks[rows]
        self.table[rows, positions] = ids
        self.num_blocks[rows] += 1
        self._allocated_for[ids] = rows
        return positions

    def remove(self, sequence: Sequence) -> BlockIds:
        """Take the sequence's row; returns its blocks.

        The device works in order, so the row may be given away while launched steps still use it.
        """
        row = sequence.row
        blocks = self.table[row, : self.num_blocks[row]].copy()
        self._allocated_for[blocks[self._allocated_for[blocks] == row]] = -1
        self._sequences[row] = None
        self.active[row] = False
        self._by_age = None
        self._free.append(row)
        sequence.row = -1
        return blocks

    def check(self) -> None:
        """Assert that each row is free or used by one sequence, within its tokens, blocks and limit."""
        assert len(set(self._free)) == len(self._free), "a row is free twice"
        assert set(self._free) == set(np.flatnonzero(~self.active).tolist()), "a row is free and used"
        for row in np.flatnonzero(self.active).tolist():
            assert self.at(row).row == row, "another's row"
            assert self.planned[row] < self.length[row] < self.limit[row], "beyond its tokens or limit"
            assert self.num_shared[row] <= self.num_blocks[row], "shares more blocks than it has"
