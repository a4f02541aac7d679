"""The scheduler: which tokens of which sequences the next step computes, and in which KV blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from batchinfer.engine.attribution import StepWork
from batchinfer.engine.blocks import BlockIds, BlockPool
from batchinfer.engine.forecast import peak_blocks
from batchinfer.engine.prefix import Node, PrefixTree
from batchinfer.engine.running import RunningRows
from batchinfer.engine.sequence import Sequence, State
from batchinfer.engine.step import LaunchedStep, StepDraft
from batchinfer.engine.types import NewRow, StepPlan, StepResult
from batchinfer.engine.waiting import WaitingQueue

# How many generated tokens' worth of "runs to its limit" the expected length starts from.
PRIOR_TOKENS = 1024


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

    Cached blocks make room when the pool is full. With ``spare_fresh_blocks``, for memory whose first use
    costs time, those that only one sequence had also do so before a fresh block is taken, once a quarter
    as many blocks are cached as are in use.
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
        spare_fresh_blocks: bool = False,
    ) -> None:
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_rows = min(max_rows, max_batch_tokens)  # so that each can get its next token
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, block_size) if prefix_cache else None
        self._spare_fresh_blocks = spare_fresh_blocks
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

        self._rows = RunningRows(self.max_rows, -(-max_context // block_size), num_blocks)
        # Sequences whose last token is planned, and not known yet, by ticket.
        self._ending: dict[int, Sequence] = {}

    # The queue

    @property
    def num_running(self) -> int:
        """Sequences on the device, with those whose last token is in flight."""
        return len(self._rows) + len(self._ending)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return self.num_waiting > 0 or self.num_running > 0

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences or launched steps need; cached blocks that nobody uses don't count."""
        return self.pool.num_blocks - self.pool.num_free - self.pool.num_idle

    def expected_tokens(self, sequence: Sequence) -> int:
        """How many tokens ``sequence`` will probably generate, as those finished so far did."""
        allowed = sequence.limit - len(sequence.prompt)
        if sequence.stops.never:
            return allowed
        share = self._generated / self._allowed
        return min(allowed, max(int(share * allowed) + 1, len(sequence.tokens) + self.block_size))

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences behind all others. Each, less its last token, must fit the pool alone."""
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
        draft = StepDraft(self.max_batch_tokens)
        state = self._rows
        rows = state.by_age()
        decodes = self._grow(rows[state.length[rows] - state.planned[rows] == 1], draft)
        draft.budget -= len(decodes)
        rows = state.by_age()
        left = state.length[rows] - state.planned[rows]
        for row, size in zip(rows[left > 1].tolist(), left[left > 1].tolist(), strict=True):
            if draft.budget == 0:
                break
            draft.add_chunk(row, min(draft.budget, size))
        if self.preemptions == preemptions:
            self._admit(draft)
        if not len(decodes) and not draft.chunk_rows:
            return None
        return self._launch(decodes, draft)

    def _launch(self, decodes: npt.NDArray[np.int32], draft: StepDraft) -> StepPlan:
        state = self._rows
        rows = np.concatenate([decodes, np.array(draft.chunk_rows, np.int32)])
        starts = state.planned[rows]
        num_tokens = np.ones(len(rows), np.int32)
        num_tokens[len(decodes) :] = draft.chunk_sizes
        ends = starts + num_tokens
        samples = ends == state.length[rows]

        written = [state.table[decodes, starts[: len(decodes)] // self.block_size]]
        for place in range(len(decodes), len(rows)):
            first = int(starts[place]) // self.block_size
            stop = -(-int(ends[place]) // self.block_size)
            written.append(state.table[rows[place], first:stop])
        plan = draft.plan(self._step_index, rows, num_tokens, starts, samples)
        sequences = [state.at(row) for row in rows.tolist()]
        for sequence in sequences:
            sequence.in_flight += 1
        step = LaunchedStep(
            plan, sequences, np.concatenate(written), state.prompt_tokens[rows], state.computed_before[rows]
        )
        self.pool.begin_write(step.written)
        self._steps.append(step)
        self._step_index += 1

        state.planned[rows] = ends
        sampled = rows[samples]
        state.length[sampled] += 1
        for row in sampled[state.length[sampled] == state.limit[sampled]].tolist():
            self._end(state.at(row))
        return plan

    def _grow(self, rows: npt.NDArray[np.int32], draft: StepDraft) -> npt.NDArray[np.int32]:
        """Give a block to each of ``rows`` (oldest first) whose next token needs one.

        Returns the rows that can go on. Preempts where blocks run out; a row may also have to sit out
        until a launched step lets go of the blocks of a preempted or finished sequence.
        """
        state, pool = self._rows, self.pool
        needs = state.planned[rows] == state.num_blocks[rows] * self.block_size
        if not needs.any():
            return rows
        while np.count_nonzero(needs) > pool.num_free + pool.num_idle + pool.num_owed:
            victim = self._victim()
            if victim < 0:
                break
            keep = rows != victim
            rows, needs = rows[keep], needs[keep]
            self._preempt(state.at(victim))
        short = int(np.count_nonzero(needs)) - (pool.num_free + pool.num_idle)
        if short > 0:
            keep = np.ones(len(rows), np.bool_)
            keep[np.flatnonzero(needs)[-short:]] = False
            rows, needs = rows[keep], needs[keep]
        growing = rows[needs]
        ids = self._allocate(len(growing))
        draft.add_blocks(growing, state.append_blocks(growing, ids), ids)
        return rows

    def _victim(self) -> int:
        """The row with the fewest computed tokens, of equals the youngest, never the oldest; or -1."""
        rows = self._rows.by_age()[:0:-1]
        return int(rows[np.argmin(self._rows.planned[rows])]) if len(rows) else -1

    def _preempt(self, sequence: Sequence) -> None:
        sequence.computed_before = max(sequence.computed_before, int(self._rows.planned[sequence.row]))
        self._release_blocks(sequence)
        sequence.state = State.WAITING
        self._queue.give_back(sequence)
        self.num_waiting += 1
        self.preemptions += 1

    def _admit(self, draft: StepDraft) -> None:
        while self._may_admit and draft.budget > 0 and self._rows.num_free:
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
            self._place(sequence, blocks, len(shared), draft)

    def _fits(self, sequence: Sequence, known: int, shared: BlockIds, needed: int) -> bool:
        """Whether ``needed`` blocks beside ``shared`` ones can be had now, and the forecast agrees."""
        state, pool = self._rows, self.pool
        woken = int(np.count_nonzero(pool.references[shared] == 1))
        available = pool.num_free + pool.num_idle - woken
        if needed > available:
            return False
        rows = state.by_age()
        if not len(rows):
            return True
        lengths, blocks = state.length[rows], state.num_blocks[rows]
        finals = np.maximum(state.expected[rows], lengths + self.block_size)
        finals = np.minimum(finals, state.limit[rows])
        own = len(sequence.prompt) + self.expected_tokens(sequence)
        peak = peak_blocks(
            pool.num_blocks - available - pool.num_owed + needed,
            np.append(lengths, np.int32(known)),
            np.append(finals, np.int32(own)),
            np.append(blocks, np.int32(needed + len(shared))),
            np.append(blocks - state.num_shared[rows], np.int32(needed)),
            self.block_size,
        )
        return peak <= pool.num_blocks

    def _place(self, sequence: Sequence, blocks: BlockIds, num_shared: int, draft: StepDraft) -> None:
        """Give an admitted sequence its row and plan its first chunk."""
        start = num_shared * self.block_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(start, len(sequence.prompt))
            self.cached_tokens += sequence.cached_tokens
        expected = len(sequence.prompt) + self.expected_tokens(sequence)
        self._rows.place(sequence, expected, blocks, num_shared, start)
        sequence.state = State.RUNNING
        self.num_waiting -= 1
        draft.add_row(
            NewRow(
                row=sequence.row,
                tokens=sequence.known(),
                num_prompt_tokens=len(sequence.prompt),
                sampling=sequence.sampling,
                index=sequence.index,
                sample_index=sequence.sample_index,
            )
        )
        rows = np.full(len(blocks), sequence.row, np.int32)
        draft.add_blocks(rows, np.arange(len(blocks), dtype=np.int32), blocks)
        draft.add_chunk(sequence.row, min(draft.budget, sequence.num_known - start))

    def _wake(self, nodes: Iterable[Node]) -> None:
        self._may_admit = self._queue.wake(nodes) or self._may_admit

    # Blocks

    def _allocate(self, count: int) -> BlockIds:
        pool, tree = self.pool, self.tree
        if tree and count > pool.num_free:
            tree.evict(count - pool.num_free)
        elif tree and self._spare_fresh_blocks:
            used_before = pool.num_free - pool.num_fresh
            surplus = pool.num_idle - self.blocks_in_use // 4
            if count > used_before and surplus > 0:
                tree.evict_unshared(min(count - used_before, surplus))
        return pool.allocate(count)

    def _end(self, sequence: Sequence) -> None:
        """Its last token is planned: the row is free, the blocks are kept until the token is known."""
        sequence.blocks = self._rows.remove(sequence)
        sequence.state = State.ENDING
        self._ending[sequence.ticket] = sequence

    def _release_blocks(self, sequence: Sequence) -> None:
        if sequence.state is State.ENDING:
            assert sequence.blocks is not None
            blocks = sequence.blocks
            sequence.blocks = None
            del self._ending[sequence.ticket]
        else:
            blocks = self._rows.remove(sequence)
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
        blocks = sequence.blocks if sequence.blocks is not None else self._rows.table[sequence.row]
        for number in range(first, stop):
            key = sequence.slice_bytes(number * self.block_size, (number + 1) * self.block_size)
            claim = self.tree.advance(sequence.chain, key, int(blocks[number]))
            if claim is not None:
                self._wake([claim])

    def check(self) -> None:
        """Assert all invariants: of the pool, the tree and the queue; that every block's owners and
        writers are the sequences and steps that name it; that no block has two writers; that rows are
        used once and their counts agree with their sequences' tokens."""
        state = self._rows
        state.check()
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
        for row in state.by_age().tolist():
            sequence, planned = state.at(row), int(state.planned[row])
            assert sequence.state is State.RUNNING, "a row of a sequence that does not run"
            known = sequence.num_known + sampled.get(id(sequence), 0)
            assert state.length[row] == known, "wrong length"
            assert planned <= state.num_blocks[row] * self.block_size, "planned beyond its blocks"
            assert sequence.in_flight == in_flight.get(id(sequence), 0), "wrong count of steps in flight"
            blocks = state.table[row, : state.num_blocks[row]]
            references[blocks] += 1
            writable = blocks[planned // self.block_size :]
            assert (self.pool.references[writable] == 1).all(), "a block to be written is shared"
            assert not self.pool.cached[writable].any(), "a block to be written is cached"
        assert (references == self.pool.references).all(), "reference counts differ from the owners"
        assert (writers == self.pool.writers).all(), "writer counts differ from the launched steps"
        assert self.num_waiting == len(self._queue.sequences()), "wrong count of waiting sequences"
