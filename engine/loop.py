"""The engine loop: plan, launch, apply; time accounted, tokens collected, sequences ended."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from batchinfer.engine.attribution import StepWork, split_step
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.intake import Limits, Tokenizer, take_in
from batchinfer.engine.order import order_window
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.sequence import Sequence, State
from batchinfer.engine.types import (
    Completion,
    Decoded,
    EngineError,
    FinishReason,
    Rejection,
    Request,
    RowLogprobs,
    Runner,
    StepHandle,
    StepPlan,
    StepResult,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done since it was made, and where it stands.

    ``prompt_tokens`` and ``cached_tokens`` count prompt tokens computed once and read from the cache,
    ``recomputed_tokens`` those computed again. ``rows_ns`` (charged to requests), ``waste_ns``
    (tokens computed again or for nothing) and ``idle_ns`` (no step in flight and the caller away) sum
    to the time from ``started_ns`` to ``accounted_until_ns``, the completion of the last step applied,
    both on the engine's clock (``time.perf_counter_ns``). ``running`` and ``waiting`` count samples,
    ``kv_blocks_used`` how many of the ``kv_blocks`` they hold.
    """

    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    recomputed_tokens: int
    preemptions: int
    rows_ns: int
    waste_ns: int
    idle_ns: int
    started_ns: int
    accounted_until_ns: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks: int


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight; ``entered_ns`` is when the call that launched it began, ``left_ns`` when the
    call before it had ended."""

    plan: StepPlan
    handle: StepHandle
    entered_ns: int
    left_ns: int


class EngineLoop:
    """Runs requests on a runner, one step a call.

    With the runner's ``steps_in_flight`` d the step N + 1 is planned when the results of N + 1 - d and
    older are applied: always, whatever happens to be ready. ``clock`` counts nanoseconds, the same as
    ``StepResult.completed_ns``.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._clock = clock
        self._steps_in_flight = runner.steps_in_flight
        self._limits = Limits(runner.max_context, runner.num_blocks, runner.block_size)
        self._scheduler = Scheduler(
            block_size=runner.block_size,
            num_blocks=runner.num_blocks,
            max_rows=min(config.max_sequences, runner.max_rows),
            max_batch_tokens=config.max_batch_tokens,
            max_context=runner.max_context,
            prefix_cache=config.prefix_cache,
            spare_fresh_blocks=runner.fresh_blocks_cost,
        )
        self._launched: deque[_Launched] = deque()
        self._unfinished: dict[int, dict[int, Sequence]] = {}
        self._outbox: list[Completion | Rejection] = []
        self._failed = False

        self._started_ns = self._accounted_until = self._left_ns = clock()
        self._rows_ns = self._waste_ns = self._idle_ns = 0
        self._steps = self._prompt_tokens = self._generated_tokens = self._recomputed_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do or to return."""
        return bool(self._unfinished or self._launched or self._outbox)

    @property
    def num_waiting(self) -> int:
        """Samples that are not on the device."""
        return self._scheduler.num_waiting

    @property
    def stats(self) -> EngineStats:
        """Counters and state as of the last applied step."""
        scheduler = self._scheduler
        return EngineStats(
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=self._generated_tokens,
            recomputed_tokens=self._recomputed_tokens,
            preemptions=scheduler.preemptions,
            rows_ns=self._rows_ns,
            waste_ns=self._waste_ns,
            idle_ns=self._idle_ns,
            started_ns=self._started_ns,
            accounted_until_ns=self._accounted_until,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            kv_blocks_used=scheduler.blocks_in_use,
            kv_blocks=scheduler.pool.num_blocks,
        )

    def add(self, requests: Seq[Request]) -> None:
        """Queue requests, ordered among themselves, behind those added before.

        Those that can't run are returned as rejections by the next ``step``. Raises ValueError, and
        adds nothing, if a sample is unfinished already or a ``resume`` is inconsistent.
        """
        accepted, rejected = take_in(requests, self._tokenizer, self._limits)
        fresh: set[tuple[int, int]] = set()
        for request in accepted:
            for sequence in request.samples:
                key = sequence.index, sequence.sample_index
                if key in fresh or sequence.sample_index in self._unfinished.get(sequence.index, {}):
                    raise ValueError(f"request {key[0]}, sample {key[1]} is added twice")
                fresh.add(key)
        self._outbox += rejected
        expected = [
            max((self._scheduler.expected_tokens(sample) for sample in request.samples), default=0)
            for request in accepted
        ]
        prompts = [request.prompt for request in accepted]
        for place in order_window(prompts, expected, self._limits.block_size):
            for sequence in accepted[place].samples:
                reason = _resumed_reason(sequence)
                if reason is None:
                    self._unfinished.setdefault(sequence.index, {})[sequence.sample_index] = sequence
                    self._scheduler.add([sequence])
                else:
                    self._outbox.append(self._completion(sequence, reason))

    def drop(self, index: int) -> None:
        """Forget the unfinished samples of a request; what they cost becomes waste."""
        for sequence in self._unfinished.pop(index, {}).values():
            self._scheduler.drop(sequence)
            self._rows_ns -= sequence.charged_ns
            self._waste_ns += sequence.charged_ns

    def unfinished(self) -> list[int]:
        """Indexes of the requests with unfinished samples."""
        return list(self._unfinished)

    def in_flight(self) -> Iterator[tuple[int, int, Decoded]]:
        """(index, sample index, decoded part) of every unfinished sample that has cost or holds
        anything yet, as of the last applied step: enough to go on from there elsewhere."""
        for samples in self._unfinished.values():
            for sequence in samples.values():
                if sequence.tokens or sequence.prefill_ns:
                    yield sequence.index, sequence.sample_index, sequence.decoded()

    def step(self) -> list[Completion | Rejection]:
        """Plan and launch a step, wait for the one that is due; returns what is finished.

        Raises what the runner raises, and EngineError in every call after that.
        """
        if self._failed:
            raise EngineError("An earlier step of this engine failed; make a new engine.")
        entered = self._clock()
        finished, self._outbox = self._outbox, []
        plan = self._scheduler.schedule()
        if plan is not None:
            with self._failing():
                handle = self._runner.launch(plan)
            self._launched.append(_Launched(plan, handle, entered, self._left_ns))
        elif not self._launched:
            assert not self._scheduler.has_work, "work is left, but nothing can be planned"
            return finished
        if plan is None or len(self._launched) >= self._steps_in_flight:
            finished += self._complete()
        self._left_ns = self._clock()
        return finished

    def settle(self) -> list[Completion | Rejection]:
        """Wait for all launched steps without planning more; returns what is finished."""
        finished, self._outbox = self._outbox, []
        while self._launched:
            finished += self._complete()
            self._left_ns = self._clock()
        return finished

    def check(self) -> None:
        """Assert the scheduler's invariants and that the times add up."""
        self._scheduler.check()
        accounted = self._rows_ns + self._waste_ns + self._idle_ns
        assert accounted == self._accounted_until - self._started_ns, "nanoseconds lost or counted twice"

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """A step that fails leaves rows and cache in an unknown state: nothing can follow it."""
        try:
            yield
        except BaseException:
            self._failed = True
            self._launched.clear()
            raise

    def _complete(self) -> list[Completion]:
        """Apply the oldest step in flight; returns the samples that it finished."""
        launched = self._launched.popleft()
        with self._failing():
            result = launched.handle.result()
        sequences, work = self._scheduler.apply(launched.plan, result)
        shares = split_step(self._runner.costs, self._interval(launched, result), work)
        self._rows_ns += int(shares.prefill.sum() + shares.decode.sum())
        self._waste_ns += int(shares.waste.sum())
        self._count(work)
        for place, scores in result.logprobs.items():
            width = sequences[place].sampling.logprobs
            assert width is not None
            sequences[place].logprobs += _entries(scores, width)
        for place, scores in result.prompt_logprobs.items():
            _add_prompt_logprobs(sequences[place], int(work.starts[place]) + 1, scores)

        finished = []
        done = State.DONE
        prefill: list[int] = shares.prefill.tolist()
        decode: list[int] = shares.decode.tolist()
        tokens: list[int] = result.tokens.tolist()
        for sequence, token, prefill_ns, decode_ns in zip(sequences, tokens, prefill, decode, strict=True):
            if sequence.state is done:
                continue
            sequence.charged_ns += prefill_ns + decode_ns
            sequence.prefill_ns += prefill_ns
            if token < 0:
                sequence.prefill_ns += decode_ns
                continue
            sequence.token_ns.append(decode_ns)
            count = len(sequence.token_ns)
            stops = sequence.stops
            reason: FinishReason | None = None
            if (token in stops.ids or stops.strings) and stops.push(token, count):
                reason = "stop"
            elif len(sequence.prompt) + count == sequence.limit:
                reason = "length"
            if reason is not None:
                self._scheduler.finish(sequence)
                finished.append(self._finish(sequence, reason))
        return finished

    def _interval(self, launched: _Launched, result: StepResult) -> int:
        """Nanoseconds of a step: from the completion before it to its own.

        Less the time in which nothing was in flight and nobody had called ``step``, which is idle.
        """
        completed = max(result.completed_ns, self._accounted_until)
        idle = launched.entered_ns - max(self._accounted_until, launched.left_ns)
        idle = min(max(idle, 0), completed - self._accounted_until)
        interval = completed - self._accounted_until - idle
        self._idle_ns += idle
        self._accounted_until = completed
        return interval

    def _count(self, work: StepWork) -> None:
        ends = work.starts + work.num_tokens
        first = np.clip(work.computed_before, work.starts, ends)
        computed = np.clip(np.minimum(ends, work.prompt_tokens) - first, 0, None)
        self._steps += 1
        self._prompt_tokens += int(computed[work.useful].sum())
        self._recomputed_tokens += int((first - work.starts)[work.useful].sum())
        self._generated_tokens += int(np.count_nonzero(work.samples & work.useful))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Completion:
        samples = self._unfinished[sequence.index]
        del samples[sequence.sample_index]
        if not samples:
            del self._unfinished[sequence.index]
        return self._completion(sequence, reason)

    def _completion(self, sequence: Sequence, reason: FinishReason) -> Completion:
        sampling = sequence.sampling
        prompt_logprobs = None if sampling.prompt_logprobs is None else tuple(sequence.prompt_logprobs)
        return Completion(
            index=sequence.index,
            sample_index=sequence.sample_index,
            text=sequence.stops.text(sequence.tokens),
            token_ids=tuple(sequence.tokens),
            finish_reason=reason,
            prompt_tokens=len(sequence.prompt),
            cached_tokens=sequence.cached_tokens or 0,
            prefill_ns=sequence.prefill_ns,
            token_ns=tuple(sequence.token_ns),
            logprobs=None if sampling.logprobs is None else tuple(sequence.logprobs),
            prompt_logprobs=prompt_logprobs,
        )


def _resumed_reason(sequence: Sequence) -> FinishReason | None:
    """Why a sample that was begun elsewhere is finished already, if it is. Replays its tokens."""
    for count, token in enumerate(sequence.tokens, 1):
        if sequence.stops.push(token, count):
            return "stop"
    return "length" if sequence.num_known >= sequence.limit else None


def _entries(scores: RowLogprobs, width: int) -> list[TokenLogprobs]:
    """One entry a position, with at most ``width`` of the most likely tokens."""
    rows = zip(
        scores.chosen.tolist(),
        scores.top_ids[:, :width].tolist(),
        scores.top[:, :width].tolist(),
        strict=True,
    )
    return [TokenLogprobs(chosen, tuple(zip(ids, values, strict=True))) for chosen, ids, values in rows]


def _add_prompt_logprobs(sequence: Sequence, position: int, scores: RowLogprobs) -> None:
    """Add those from ``position`` on that an earlier, preempted run has not brought already."""
    width = sequence.sampling.prompt_logprobs
    assert width is not None
    known = len(sequence.prompt_logprobs) - position
    sequence.prompt_logprobs += _entries(scores, width)[known:]
