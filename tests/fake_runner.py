"""A runner with a real paged KV cache and no model: the next token is a hash of what the cache holds.

Any wrong block table, premature free, double writer or missing computation changes tokens, or fails
one of the runner's own checks. Steps run late, in order, whenever chance says so.
"""

import random
import zlib
from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from batchinfer.engine.types import (
    Completion,
    NewRow,
    Request,
    RowLogprobs,
    SamplingParams,
    StepCosts,
    StepPlan,
    StepResult,
)

COSTS = StepCosts(
    flops_per_token=3e6,
    flops_per_sample=1e6,
    attention_flops=2e3,
    kv_bytes_per_token=100.0,
    weight_bytes=3e6,
    flops_rate=1e12,
    bytes_rate=1e11,
)
PIECES = ["", *"abcdefghij", "ab", "bc", "ca", "abc", " x", "\n", ".", "é", "xyz"]
EOS = 0


class FakeClock:
    """Nanoseconds that pass when told to, and a little at every look."""

    def __init__(self, seed: int = 0) -> None:
        self.now = 1_000_000
        self._random = random.Random(seed)

    def __call__(self) -> int:
        self.now += self._random.randrange(40)
        return self.now


class FakeDetokenizer:
    """Holds back the last token's text until the next token comes, as real ones sometimes do."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, ids) -> str:
        text = self._held + "".join(PIECES[i] for i in ids)
        self._held = text[-1:] if text.endswith("é") else ""
        return text[: len(text) - len(self._held)]


class FakeTokenizer:
    """One token a character; token 0 ends a sequence."""

    eos_token_ids = frozenset([EOS])
    vocab_size = len(PIECES)

    def encode_batch(self, texts):
        return [[1 + ord(character) % (self.vocab_size - 1) for character in text] for text in texts]

    def apply_chat_template(self, messages):
        if any("role" not in message for message in messages):
            raise ValueError("A message has no role.")
        return self.encode_batch(["".join(f"{m['role']}:{m['content']}|" for m in messages)])[0]

    def decode(self, ids) -> str:
        return "".join(PIECES[i] for i in ids)

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer()


def next_token(context: np.ndarray, sampling: SamplingParams, index: int, sample_index: int) -> int:
    """The token after ``context``: a hash of it, and of the noise's key unless greedy."""
    key = f"{sampling.seed},{index},{sample_index}" if sampling.temperature else ""
    return zlib.crc32(key.encode(), zlib.crc32(np.asarray(context, np.int32).tobytes())) % len(PIECES)


def logprob(token: int) -> float:
    return -(token % 7) / 8.0


@dataclass
class _Step:
    plan: StepPlan
    tenants: list[int]
    slots: list[np.ndarray]
    result: StepResult | None = None


@dataclass
class _Handle:
    runner: "FakeRunner"
    step: _Step

    def result(self) -> StepResult:
        return self.runner.collect(self.step)


@dataclass
class FakeRunner:
    block_size: int = 4
    num_blocks: int = 64
    max_rows: int = 8
    max_context: int = 128
    seed: int = 0
    steps_in_flight: int = 1
    fresh_blocks_cost: bool = False
    clock: FakeClock = field(default_factory=FakeClock)
    costs: StepCosts = COSTS
    fail_at: int | None = None
    closed: bool = False

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        width = -(-self.max_context // self.block_size)
        slots = self.num_blocks * self.block_size
        # What the device has, as of the last step that ran.
        self._tokens = np.full((self.max_rows, self.max_context + 1), -1, np.int32)
        self._table = np.full((self.max_rows, width), -1, np.int32)
        self._rows: list[NewRow | None] = [None] * self.max_rows
        self._kv = np.full(slots, -1, np.int32)
        self._written_by = np.full(slots, -1, np.int64)
        # What was launched, ahead of it.
        self._launched_table = self._table.copy()
        self._tenant = [0] * self.max_rows
        self._num_tenants = 0
        self._queue: deque[_Step] = deque()
        self._uncollected: deque[_Step] = deque()
        self.steps = 0
        self.computed_tokens = 0

    def launch(self, plan: StepPlan) -> _Handle:
        assert plan.index == self.steps, "steps are numbered as they are launched"
        self.steps += 1
        for new in plan.new_rows:
            self._num_tenants += 1
            self._tenant[new.row] = self._num_tenants
            self._launched_table[new.row] = -1
        self._launched_table[plan.block_rows, plan.block_positions] = plan.block_ids
        assert len(set(plan.rows.tolist())) == len(plan.rows) > 0, "a row twice in one step"
        assert (plan.num_tokens > 0).all()
        slots = [
            self._slots(self._launched_table, row, start, start + count)
            for row, start, count in zip(plan.rows, plan.starts, plan.num_tokens, strict=True)
        ]
        tenants = [self._tenant[row] for row in plan.rows]
        written: dict[int, int] = {}
        for step in [*self._uncollected, _Step(plan, tenants, slots)]:
            for tenant, own in zip(step.tenants, step.slots, strict=True):
                for block in set((own // self.block_size).tolist()):
                    assert written.setdefault(block, tenant) == tenant, "a block has two writers"
        step = _Step(plan, tenants, slots)
        self._queue.append(step)
        self._uncollected.append(step)
        assert len(self._uncollected) <= self.steps_in_flight, "too many steps in flight"
        self._run_some()
        return _Handle(self, step)

    def collect(self, step: _Step) -> StepResult:
        assert self._uncollected.popleft() is step, "results are taken in order"
        if step.plan.index == self.fail_at:
            raise RuntimeError("the device is on fire")
        while step.result is None:
            self._run(self._queue.popleft())
        self._run_some()
        return step.result

    def close(self) -> None:
        self.closed = True

    def _run_some(self) -> None:
        while self._queue and self._random.random() < 0.5:
            self._run(self._queue.popleft())

    def _slots(self, table: np.ndarray, row: int, start: int, stop: int) -> np.ndarray:
        positions = np.arange(start, stop)
        blocks = table[row, positions // self.block_size]
        assert (blocks >= 0).all(), "a position without a block"
        return blocks * self.block_size + positions % self.block_size

    def _run(self, step: _Step) -> None:
        plan = step.plan
        for new in plan.new_rows:
            self._rows[new.row] = new
            self._tokens[new.row] = -1
            self._tokens[new.row, : len(new.tokens)] = new.tokens
            self._table[new.row] = -1
        self._table[plan.block_rows, plan.block_positions] = plan.block_ids
        entries = list(zip(plan.rows, plan.starts, plan.starts + plan.num_tokens, strict=True))
        for row, start, end in entries:
            slots = self._slots(self._table, row, start, end)
            tokens = self._tokens[row, start:end]
            assert (tokens >= 0).all(), "a token is computed before it is known"
            self._kv[slots] = tokens
            self._written_by[slots] = plan.index
            self.computed_tokens += len(slots)
        result = np.full(len(entries), -1, np.int32)
        logprobs: dict[int, RowLogprobs] = {}
        prompt_logprobs: dict[int, RowLogprobs] = {}
        for place, (row, start, end) in enumerate(entries):
            new = self._rows[row]
            assert new is not None
            before = self._slots(self._table, row, 0, start)
            assert (self._written_by[before] < plan.index).all(), "reads what the same step writes"
            context = self._kv[self._slots(self._table, row, 0, end)]
            assert end < self.max_context, "beyond the context"
            if new.sampling.prompt_logprobs is not None:
                following = self._tokens[row, start + 1 : min(end + 1, new.num_prompt_tokens)]
                if len(following):
                    prompt_logprobs[place] = _logprobs(following, new.sampling.prompt_logprobs)
            if plan.samples[place]:
                assert self._tokens[row, end] == -1, "a token is sampled twice"
                token = next_token(context, new.sampling, new.index, new.sample_index)
                result[place] = self._tokens[row, end] = token
                if new.sampling.logprobs is not None:
                    logprobs[place] = _logprobs(np.array([token]), new.sampling.logprobs)
        self.clock.now += 100 + int(plan.num_tokens.sum()) * 7 + self._random.randrange(50)
        step.result = StepResult(result, self.clock(), logprobs, prompt_logprobs)


def _logprobs(tokens: np.ndarray, width: int) -> RowLogprobs:
    top_ids = (tokens[:, None] + np.arange(width)[None, :]).astype(np.int32)
    chosen = np.array([logprob(int(token)) for token in tokens], np.float32)
    return RowLogprobs(chosen, top_ids, (top_ids / -4.0).astype(np.float32))


def expected_completion(
    request: Request, prompt: list[int], sample_index: int, max_context: int
) -> Completion:
    """What a request must give, computed directly: no batch, no cache, no blocks; no cost."""
    sampling = request.sampling
    limit = max_context
    if sampling.max_tokens is not None:
        limit = min(limit, len(prompt) + sampling.max_tokens)
    stop_ids = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    tokens: list[int] = []
    hidden = 0
    reason = "length"
    cut = None
    while len(prompt) + len(tokens) < limit and cut is None and reason == "length":
        token = next_token(np.array(prompt + tokens), sampling, request.index, sample_index)
        tokens.append(token)
        text = _settled(tokens)
        if len(tokens) < sampling.min_tokens:
            continue
        if token in stop_ids:
            reason, hidden = "stop", 0 if sampling.include_stop else 1
            break
        for end in range(len(_settled(tokens[:-1])) + 1, len(text) + 1):
            ends = [stop for stop in sampling.stop if text[:end].endswith(stop)]
            if ends:
                cut = end if sampling.include_stop else end - max(map(len, ends))
                reason = "stop"
                break
    text = FakeTokenizer().decode(tokens[: len(tokens) - hidden]) if cut is None else _settled(tokens)[:cut]
    return Completion(
        index=request.index,
        sample_index=sample_index,
        text=text,
        token_ids=tuple(tokens),
        finish_reason=reason,
        prompt_tokens=len(prompt),
        cached_tokens=0,
        prefill_ns=0,
        token_ns=(),
    )


def _settled(tokens: list[int]) -> str:
    return FakeDetokenizer().push(tokens)


def without_cost(completion: Completion) -> Completion:
    """The parts of a completion that don't depend on how it was computed."""
    return replace(
        completion, cached_tokens=0, prefill_ns=0, token_ns=(), logprobs=None, prompt_logprobs=None
    )
