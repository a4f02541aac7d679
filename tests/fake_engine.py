"""An engine for tests of jobs with real processes: its answers are a function of the row.

Set BATCHINFER_ENGINE_FACTORY to ``tests/fake_engine.py:fake_engine``. FAKE_STEP is the seconds that a step
takes, FAKE_TOKENS the most tokens of a row, FAKE_LOG a file that gets a line a decoded token, FAKE_DIE a
file whose first taker exits at once. A prompt with "deadly" ends the process, one with "endless" hangs it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.types import Completion, Decoded, Rejection, Request


def length_of(row: int, sample: int) -> int:
    return 1 + (row * 7 + sample * 3) % int(os.environ.get("FAKE_TOKENS", "5"))


def token_of(row: int, sample: int, place: int) -> int:
    return (row * 31 + sample * 17 + place) % 1000


def text_of(row: int, sample: int) -> str:
    return " ".join(str(token_of(row, sample, place)) for place in range(length_of(row, sample)))


@dataclass
class Sample:
    request: Request
    index: int
    tokens: list[int]
    token_ns: list[int]
    prefill_ns: int
    own_ns: int = 0
    fresh: bool = True


@dataclass
class Stats:
    rows_ns: int = 0
    waste_ns: int = 0
    accounted_until_ns: int = field(default_factory=time.perf_counter_ns)


class FakeEngine:
    """Decodes one token a step of up to ``max_sequences`` samples; charges all the time of its steps."""

    def __init__(self, config: EngineConfig) -> None:
        self._limit = config.max_sequences
        self._step_seconds = float(os.environ.get("FAKE_STEP", "0"))
        self._waiting: deque[Sample] = deque()
        self._running: list[Sample] = []
        self._rejected: list[Rejection] = []
        self.stats = Stats()
        self._log = open(os.environ["FAKE_LOG"], "a") if "FAKE_LOG" in os.environ else None  # noqa: SIM115

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._rejected)

    def add(self, requests: Sequence[Request]) -> None:
        if not self.has_work:
            self.stats.accounted_until_ns = time.perf_counter_ns()
        for request in requests:
            if "too long" in str(request.prompt) and "FAKE_LONG" not in os.environ:
                self._rejected.append(Rejection(request.index, "too_long", "the prompt is too long"))
                continue
            for sample in request.samples or range(request.sampling.n):
                resume = request.resume.get(sample, Decoded())
                tokens = list(resume.token_ids)
                expected = [token_of(request.index, sample, place) for place in range(len(tokens))]
                assert tokens == expected, f"row {request.index} is resumed from {tokens}"
                self._waiting.append(
                    Sample(request, sample, tokens, list(resume.token_ns), resume.prefill_ns)
                )

    def step(self) -> list[Completion | Rejection]:
        done: list[Completion | Rejection] = [*self._rejected]
        self._rejected.clear()
        while self._waiting and len(self._running) < self._limit:
            self._running.append(self._waiting.popleft())
        if not self._running:
            return done
        time.sleep(self._step_seconds)
        self._die()
        prompts = [str(sample.request.prompt) for sample in self._running]
        if any("deadly" in prompt for prompt in prompts):
            os._exit(1)
        if any("endless" in prompt for prompt in prompts):
            time.sleep(3600)
        now = time.perf_counter_ns()
        spent, self.stats.accounted_until_ns = now - self.stats.accounted_until_ns, now
        share, rest = divmod(spent, len(self._running))
        still = []
        for place, sample in enumerate(self._running):
            self._advance(sample, share + (place < rest))
            if len(sample.tokens) == length_of(sample.request.index, sample.index):
                done.append(_completion(sample))
            else:
                still.append(sample)
        self._running = still
        return done

    def _advance(self, sample: Sample, nanoseconds: int) -> None:
        if sample.fresh and sample.tokens:
            self.stats.waste_ns += nanoseconds // 2
            nanoseconds -= nanoseconds // 2
        elif sample.fresh:
            sample.prefill_ns = nanoseconds // 2
            sample.own_ns += sample.prefill_ns
            self.stats.rows_ns += sample.prefill_ns
            nanoseconds -= sample.prefill_ns
        sample.fresh = False
        row, place = sample.request.index, len(sample.tokens)
        sample.tokens.append(token_of(row, sample.index, place))
        sample.token_ns.append(nanoseconds)
        sample.own_ns += nanoseconds
        self.stats.rows_ns += nanoseconds
        if self._log is not None:
            self._log.write(f"{row} {sample.index} {place}\n")
            self._log.flush()

    def settle(self) -> list[Completion | Rejection]:
        return []

    def in_flight(self) -> list[tuple[int, int, Decoded]]:
        return [
            (
                sample.request.index,
                sample.index,
                Decoded(tuple(sample.tokens), tuple(sample.token_ns), sample.prefill_ns),
            )
            for sample in [*self._running, *self._waiting]
        ]

    def drop(self, index: int) -> None:
        for sample in self._running:
            if sample.request.index == index:
                self.stats.rows_ns -= sample.own_ns
                self.stats.waste_ns += sample.own_ns
        self._running = [sample for sample in self._running if sample.request.index != index]
        self._waiting = deque(sample for sample in self._waiting if sample.request.index != index)

    def _die(self) -> None:
        if "FAKE_DIE" in os.environ:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.environ["FAKE_DIE"])
                os._exit(9)


def _completion(sample: Sample) -> Completion:
    row = sample.request.index
    return Completion(
        index=row,
        sample_index=sample.index,
        text=text_of(row, sample.index),
        token_ids=tuple(sample.tokens),
        finish_reason="stop",
        prompt_tokens=len(str(sample.request.prompt)),
        cached_tokens=0,
        prefill_ns=sample.prefill_ns,
        token_ns=tuple(sample.token_ns),
    )


def fake_engine(config: EngineConfig) -> FakeEngine:
    """The factory."""
    return FakeEngine(config)
