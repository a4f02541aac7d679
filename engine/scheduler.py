"""The scheduler: which tokens of which sequences the next step computes, and in which KV blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchinfer.engine.attribution import StepWork
from batchinfer.engine.blocks import BlockIds, BlockPool
from batchinfer.engine.forecast import peak_blocks
from batchinfer.engine.prefix import Node, PrefixTree
from batchinfer.engine.sequence import Sequence, State
from batchinfer.engine.types import NewRow, StepPlan, StepResult
from batchinfer.engine.waiting import WaitingQueue

# How many generated tokens' worth of "runs to its limit" the expected length starts from.
PRIOR_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A planned step whose result is not applied yet, by entry of its plan; ``written`` are the blocks
    that it may write."""

    plan: StepPlan
    sequences: list[Sequence]
    written: BlockIds
    prompt_tokens: npt.NDArray[np.int32]
    computed_before: npt.NDArray[np.int32]


class _Draft:
    """What a step being planned has so far beside its decodes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunk_rows: list[int] = []
        self.chunk_sizes: list[int] = []
        self.new_rows: list[NewRow] = []
        self.block_rows: list[npt.NDArray[np.int32]] = []
        self.block_positions: list[npt.NDArray[np.int32]] = []
        self.block_ids: list[BlockIds] = []

    def add_chunk(self, row: int, size: int) -> None:
        """Compute ``size`` tokens of ``row``."""
        self.chunk_rows.append(row)
        self.chunk_sizes.append(size)
        self.budget -= size

    def add_blocks(
        self, rows: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], ids: BlockIds
    ) -> None:
        """Extend block tables."""
        self.block_rows.append(rows)
        self.block_positions.append(positions)
        self.block_ids.append(ids)


def _joined(arrays: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)


class Scheduler:
    """Plans steps over waiting and running sequences. Counts only: it never looks at a clock.

    A step takes the running sequences' next tokens first, then continues prompts, then admits waiting
    sequences, under ``max_batch_tokens`` tokens and ``max_rows`` sequences. ``schedule`` may be called
    again before the step before it is applied: tokens in flight are planned by position, since the
    device has them. Steps are applied in the order they were planned.

    Blocks for a sequence's known tokens are allocated when it is admitted, then one at a time. A
    sequence is admitted if the forecast says that it and the running ones reach their expected lengths
    without running out; if they do run out all the same, the one with the fewest computed tokens goes
    back to the queue, but never the oldest, so that some sequence always gets to its end.
    """

    def __init__(
        self,
        *,
        block_size: int,
        num_blocks: int,
        max_rows: int,
        max_batch_tokens: int,
        max_context: int,
        prefix_cache: bool,
    ) -> None:
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_rows = min(max_rows, max_batch_tokens)
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_size) if prefix_cache else None
        self.num_waiting = 0
        self.preemptions = 0
        self.cached_tokens = 0
        self._queue = WaitingQueue()
        self._step_index = 0
        self._steps: deque[LaunchedStep] = deque()
        # False while the first in the queue did not fit and no block has been given back since.
        self._may_admit = True
        self._generated = PRIOR_TOKENS
        self._allowed = PRIOR_TOKENS

        # State of running sequences by device row. ``length`` counts tokens known and in flight,
        # ``planned`` positions whose computation is planned; planned < length < limit.
        rows = self.max_rows
        self._sequences: list[Sequence | None] = [None] * rows
        self._ending: dict[int, Sequence] = {}
        self._free_rows = list(range(rows - 1, -1, -1))
        self._active = np.zeros(rows, np.bool_)
        self._ticket = np.zeros(rows, np.int64)
        self._length = np.zeros(rows, np.int32)
        self._planned = np.zeros(rows, np.int32)
        self._limit = np.zeros(rows, np.int32)
        self._expected = np.zeros(rows, np.int32)
        self._prompt_tokens = np.zeros(rows, np.int32)
        self._computed_before = np.zeros(rows, np.int32)
        self._num_blocks = np.zeros(rows, np.int32)
        self._table = np.zeros((rows, -(-max_context // block_size)), np.int32)
        # Leading blocks that other sequences share, and which row allocated a block (-1: none running).
        self._num_shared = np.zeros(rows, np.int32)
        self._allocated_by = np.full(num_blocks, -1, np.int32)
        self._by_age: npt.NDArray[np.int32] | None = None

    # The queue

    @property
    def num_running(self) -> int:
        """Sequences on the device, with those whose last token is in flight."""
        return self.max_rows - len(self._free_rows) + len(self._ending)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self.num_waiting > 0 or self.num_running > 0

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences or launched steps need; cached blocks that nobody uses don't count."""
        return self.pool.num_blocks - self.pool.num_free - self.pool.num_idle

    def blocks_for(self, limit: int) -> int:
        """Blocks of a sequence with ``limit`` tokens, whose last token is never in the cache."""
        return -(-(limit - 1) // self.block_size)

    def expected_tokens(self, sequence: Sequence) -> int:
        """How many tokens ``sequence`` will probably generate, as those finished so far did."""
        allowed = sequence.limit - len(sequence.prompt)
        if sequence.stops.never:
            return allowed
        share = self._generated / self._allowed
        return min(allowed, max(int(share * allowed) + 1, len(sequence.tokens) + self.block_size))

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind all others. Each must fit the pool alone (``blocks_for``)."""
        for sequence in sequences:
            self._queue.append(sequence)
            self.num_waiting += 1
        self._may_admit = True

    def finish(self, sequence: Sequence) -> None:
        """The sequence has all its tokens: give back what it holds."""
        if not sequence.stops.never:
            self._generated += len(sequence.tokens)
            self._allowed += sequence.limit - len(sequence.prompt)
        self.drop(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Forget the sequence, wherever it is. Launched steps keep the blocks that they may write."""
        if sequence.state is State.WAITING:
            self.num_waiting -= 1
        elif sequence.state is not State.DONE:
            self._release_blocks(sequence)
        sequence.state = State.DONE

    # Planning

    def schedule(self) -> StepPlan | None:
        """Plan the next step, which counts as launched from here on; None if nothing can be computed
        before a launched step is applied, or there is no work."""
        preemptions = self.preemptions
        draft = _Draft(self.max_batch_tokens)
        rows = self._rows_by_age()
        decodes = self._grow(rows[self._length[rows] - self._planned[rows] == 1], draft)
        draft.budget -= len(decodes)
        rows = self._rows_by_age()
        for row in rows[self._length[rows] - self._planned[rows] > 1].tolist():
            if draft.budget == 0:
                break
            draft.add_chunk(row, min(draft.budget, int(self._length[row] - self._planned[row])))
        if self.preemptions == preemptions:
            self._admit(draft)
        if not len(decodes) and not draft.chunk_rows:
            return None
        return self._launch(decodes, draft)

    def _launch(self, decodes: npt.NDArray[np.int32], draft: _Draft) -> StepPlan:
        chunk_rows = np.array(draft.chunk_rows, np.int32)
        rows = np.concatenate([decodes, chunk_rows])
        starts = self._planned[rows]
        num_tokens = np.ones(len(rows), np.int32)
        num_tokens[len(decodes) :] = draft.chunk_sizes
        ends = starts + num_tokens
        samples = ends == self._length[rows]

        written = [self._table[decodes, starts[: len(decodes)] // self.block_size]]
        for place in range(len(decodes), len(rows)):
            first = int(starts[place]) // self.block_size
            stop = -(-int(ends[place]) // self.block_size)
            written.append(self._table[rows[place], first:stop])
        plan = StepPlan(
            index=self._step_index,
            rows=rows,
            num_tokens=num_tokens,
            starts=starts,
            samples=samples,
            new_rows=tuple(draft.new_rows),
            block_rows=_joined(draft.block_rows),
            block_positions=_joined(draft.block_positions),
            block_ids=_joined(draft.block_ids),
        )
        sequences = [self._at(row) for row in rows.tolist()]
        for sequence in sequences:
            sequence.in_flight += 1
        step = LaunchedStep(
            plan, sequences, _joined(written), self._prompt_tokens[rows], self._computed_before[rows]
        )
        self.pool.begin_write(step.written)
        self._steps.append(step)
        self._step_index += 1

        self._planned[rows] = ends
        sampled = rows[samples]
        self._length[sampled] += 1
        for row in sampled[self._length[sampled] == self._limit[sampled]].tolist():
            self._end(self._at(row))
        return plan

    def _at(self, row: int) -> Sequence:
        sequence = self._sequences[row]
        assert sequence is not None
        return sequence

    def _rows_by_age(self) -> npt.NDArray[np.int32]:
        if self._by_age is None:
            rows = np.flatnonzero(self._active).astype(np.int32)
            self._by_age = rows[np.argsort(self._ticket[rows])]
        return self._by_age

    def _grow(self, rows: npt.NDArray[np.int32], draft: _Draft) -> npt.NDArray[np.int32]:
        """Give a block to each of ``rows`` (oldest first) whose next token needs one.

        Returns the rows that can go on. Preempts where blocks run out; a row may also have to sit out
        until a launched step lets go of the blocks of a preempted or finished sequence.
        """
        needs = self._planned[rows] == self._num_blocks[rows] * self.block_size
        if not needs.any():
            return rows
        pool = self.pool
        while np.count_nonzero(needs) > pool.num_free + pool.num_idle + pool.num_owed:
            victim = self._victim()
            if victim < 0:
                break
            keep = rows != victim
            rows, needs = rows[keep], needs[keep]
            self._preempt(self._at(victim))
        short = int(np.count_nonzero(needs)) - (pool.num_free + pool.num_idle)
        if short > 0:
            keep = np.ones(len(rows), np.bool_)
            keep[np.flatnonzero(needs)[-short:]] = False
            rows, needs = rows[keep], needs[keep]
        growing = rows[needs]
        ids = self._allocate(len(growing))
        positions = self._num_blocks[growing]
        self._table[growing, positions] = ids
        self._num_blocks[growing] += 1
        self._allocated_by[ids] = growing
        draft.add_blocks(growing, positions, ids)
        return rows

    def _victim(self) -> int:
        """The row with the fewest computed tokens, of equals the youngest, never the oldest; or -1."""
        rows = self._rows_by_age()[1:]
        if not len(rows):
            return -1
        return int(rows[::-1][np.argmin(self._planned[rows][::-1])])

    def _preempt(self, sequence: Sequence) -> None:
        sequence.computed_before = max(sequence.computed_before, int(self._planned[sequence.row]))
        self._release_blocks(sequence)
        sequence.state = State.WAITING
        self._queue.give_back(sequence)
        self.num_waiting += 1
        self.preemptions += 1

    def _admit(self, draft: _Draft) -> None:
        while self._may_admit and draft.budget > 0 and self._free_rows:
            sequence = self._queue.first()
            if sequence is None or sequence.in_flight:  # preempted, and a token of it is on its way
                return
            known = sequence.num_known
            data = sequence.slice_bytes(0, known) if self.tree else b""
            matched: list[Node] = []
            if self.tree and sequence.sampling.prompt_logprobs is None:
                # Not the whole of it: logits come from computing at least one token.
                matched, claim = self.tree.match(data, (known - 1) // self.block_size)
                if claim is not None:
                    self._queue.park(claim)
                    continue
            shared = np.array([node.block for node in matched], np.int32)
            needed = -(-known // self.block_size) - len(shared)
            if not self._fits(sequence, known, shared, needed):
                self._may_admit = False
                return
            self._queue.pop()
            self.pool.retain(shared)
            blocks = np.concatenate([shared, self._allocate(needed)])
            if self.tree:
                sequence.chain = self.tree.enter(data, matched, blocks)
            self._place(sequence, known, blocks, len(shared), draft)

    def _fits(self, sequence: Sequence, known: int, shared: BlockIds, needed: int) -> bool:
        """Whether ``needed`` blocks beside ``shared`` ones can be had now, and the forecast agrees."""
        pool = self.pool
        woken = int(np.count_nonzero(pool.references[shared] == 1))
        available = pool.num_free + pool.num_idle - woken
        if needed > available:
            return False
        rows = self._rows_by_age()
        if not len(rows):
            return True
        lengths = self._length[rows]
        finals = np.maximum(self._expected[rows], lengths + self.block_size)
        finals = np.minimum(finals, self._limit[rows])
        blocks = self._num_blocks[rows]
        own = len(sequence.prompt) + self.expected_tokens(sequence)
        peak = peak_blocks(
            pool.num_blocks - available - pool.num_owed + needed,
            np.append(lengths, np.int32(known)),
            np.append(finals, np.int32(own)),
            np.append(blocks, np.int32(needed + len(shared))),
            np.append(blocks - self._num_shared[rows], np.int32(needed)),
            self.block_size,
        )
        return peak <= pool.num_blocks

    def _place(
        self, sequence: Sequence, known: int, blocks: BlockIds, num_shared: int, draft: _Draft
    ) -> None:
        """Give an admitted sequence its row and plan its first chunk."""
        row = self._free_rows.pop()
        start = num_shared * self.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(start, len(sequence.prompt))
            self.cached_tokens += sequence.cached_tokens
        sequence.expected = len(sequence.prompt) + self.expected_tokens(sequence)
        sequence.state = State.RUNNING
        sequence.row = row
        self.num_waiting -= 1
        self._sequences[row] = sequence
        self._active[row] = True
        self._by_age = None
        self._ticket[row] = sequence.ticket
        self._length[row] = known
        self._planned[row] = start
        self._limit[row] = sequence.limit
        self._expected[row] = sequence.expected
        self._prompt_tokens[row] = len(sequence.prompt)
        self._computed_before[row] = sequence.computed_before
        self._num_blocks[row] = len(blocks)
        self._table[row, : len(blocks)] = blocks
        self._num_shared[row] = num_shared
        owners = self._allocated_by[blocks[:num_shared]]
        positions = np.arange(len(blocks), dtype=np.int32)
        running = owners >= 0
        np.maximum.at(self._num_shared, owners[running], positions[:num_shared][running] + 1)
        self._allocated_by[blocks[num_shared:]] = row
        draft.new_rows.append(
            NewRow(
                row=row,
                tokens=sequence.known(),
                num_prompt_tokens=len(sequence.prompt),
                sampling=sequence.sampling,
                index=sequence.index,
                sample_index=sequence.sample_index,
            )
        )
        draft.add_blocks(np.full(len(blocks), row, np.int32), positions, blocks)
        draft.add_chunk(row, min(draft.budget, known - start))

    def _wake(self, nodes: Iterable[Node]) -> None:
        self._may_admit = self._queue.wake(nodes) or self._may_admit

    # Blocks

    def _allocate(self, count: int) -> BlockIds:
        if self.tree and count > self.pool.num_free:
            self.tree.evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def _free_row(self, sequence: Sequence) -> BlockIds:
        """Take the sequence's row; returns its blocks. The device works in order, so the row may be
        given away while launched steps still use it."""
        row = sequence.row
        blocks = self._table[row, : self._num_blocks[row]].copy()
        self._allocated_by[blocks[self._allocated_by[blocks] == row]] = -1
        self._sequences[row] = None
        self._active[row] = False
        self._by_age = None
        self._free_rows.append(row)
        sequence.row = -1
        return blocks

    def _end(self, sequence: Sequence) -> None:
        """Its last token is planned: the row is free, the blocks are kept until the token is known."""
        sequence.blocks = self._free_row(sequence)
        sequence.state = State.ENDING
        self._ending[sequence.ticket] = sequence

    def _release_blocks(self, sequence: Sequence) -> None:
        if sequence.state is State.ENDING:
            assert sequence.blocks is not None
            blocks = sequence.blocks
            sequence.blocks = None
            del self._ending[sequence.ticket]
        else:
            blocks = self._free_row(sequence)
        if self.tree:
            # Claims first: a node is a leaf once they are gone.
            assert sequence.chain is not None
            self._wake(self.tree.leave(sequence.chain))
            sequence.chain = None
            self.tree.touch_idle(self.pool.release(blocks))
        else:
            self.pool.release(blocks)
        self._may_admit = True

    # Results

    def apply(self, plan: StepPlan, result: StepResult) -> tuple[list[Sequence], StepWork]:
        """Take the result of the oldest launched step: tokens are appended to their sequences, full
        blocks enter the prefix tree. Returns the sequences by entry of the plan, and its work.

        Entries of sequences that are done are of no use. Whoever calls decides which sequences have
        all their tokens and calls ``finish``, for those at their limit before the next ``schedule``.
        """
        step = self._steps.popleft()
        assert step.plan is plan, "steps are applied in the order they were planned"
        if self.pool.end_write(step.written):
            self._may_admit = True
        useful = np.ones(len(step.sequences), np.bool_)
        tokens: list[int] = result.tokens.tolist()
        done = State.DONE
        for place, (sequence, token) in enumerate(zip(step.sequences, tokens, strict=True)):
            sequence.in_flight -= 1
            if sequence.state is done:
                useful[place] = False
            elif token >= 0:
                sequence.tokens.append(token)
        ends = plan.starts + plan.num_tokens
        if self.tree:
            first, stop = plan.starts // self.block_size, ends // self.block_size
            for place in np.flatnonzero(useful & (first < stop)).tolist():
                self._enter_blocks(step.sequences[place], int(first[place]), int(stop[place]))
        work = StepWork(
            starts=plan.starts,
            num_tokens=plan.num_tokens,
            samples=plan.samples,
            prompt_tokens=step.prompt_tokens,
            computed_before=step.computed_before,
            useful=useful,
        )
        return step.sequences, work

    def _enter_blocks(self, sequence: Sequence, first: int, stop: int) -> None:
        """Blocks first:stop of a sequence are full and computed: enter them into the prefix tree."""
        if sequence.chain is None:  # preempted since
            return
        assert self.tree is not None
        blocks = sequence.blocks if sequence.blocks is not None else self._table[sequence.row]
        for number in range(first, stop):
            key = sequence.slice_bytes(number * self.block_size, (number + 1) * self.block_size)
            claim = self.tree.advance(sequence.chain, key, int(blocks[number]))
            if claim is not None:
                self._wake([claim])

    def check(self) -> None:
        """Assert all invariants: of the pool, the tree and the queue; that every block's owners and
        writers are the sequences and steps that name it; that no block has two writers; that rows are
        used once and their counts agree with their sequences' tokens."""
        self.pool.check()
        self._queue.check()
        if self.tree:
            self.tree.check()
        references = self.pool.cached.astype(np.int32)
        writers = np.zeros_like(references)
        in_flight: dict[int, int] = {}
        sampled: dict[int, int] = {}
        for step in self._steps:
            assert len(np.unique(step.written)) == len(step.written), "two writers in one step"
            writers[step.written] += 1
            for sequence, samples in zip(step.sequences, step.plan.samples.tolist(), strict=True):
                in_flight[id(sequence)] = in_flight.get(id(sequence), 0) + 1
                sampled[id(sequence)] = sampled.get(id(sequence), 0) + samples
        for sequence in self._ending.values():
            assert sequence.state is State.ENDING and sequence.blocks is not None
            assert sampled.get(id(sequence), 0) > 0, "it ends, but no step has its last token"
            references[sequence.blocks] += 1
        for row in np.flatnonzero(self._active).tolist():
            sequence = self._at(row)
            assert sequence.state is State.RUNNING and sequence.row == row, "another's row"
            length, planned = int(self._length[row]), int(self._planned[row])
            assert length == sequence.num_known + sampled.get(id(sequence), 0), "wrong length"
            assert planned < length < sequence.limit, "planned beyond its tokens or its limit"
            assert planned <= self._num_blocks[row] * self.block_size, "planned beyond its blocks"
            assert sequence.in_flight == in_flight.get(id(sequence), 0), "wrong count of steps in flight"
            blocks = self._table[row, : self._num_blocks[row]]
            references[blocks] += 1
            writable = blocks[planned // self.block_size :]
            assert (self.pool.references[writable] == 1).all(), "a block to be written is shared"
            assert not self.pool.cached[writable].any(), "a block to be written is cached"
        assert (references == self.pool.references).all(), "reference counts differ from the owners"
        assert (writers == self.pool.writers).all(), "writer counts differ from the launched steps"
        free_rows = set(self._free_rows)
        assert len(free_rows) == len(self._free_rows), "a row is free twice"
        assert free_rows == set(np.flatnonzero(~self._active).tolist()), "a row is free and used"
        assert self.num_waiting == len(self._queue.sequences()), "wrong count of waiting sequences"
