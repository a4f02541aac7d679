"""A sequence: one sample of one request on its way through the engine."""

from __future__ import annotations

from enum import Enum

import numpy as np
import numpy.typing as npt

from batchinfer.engine.blocks import BlockIds
from batchinfer.engine.prefix import Chain
from batchinfer.engine.stops import StopCondition
from batchinfer.engine.types import Decoded, SamplingParams, TokenLogprobs


class State(Enum):
    """Where a sequence is. ENDING: all its tokens are planned, the last of them still in flight."""

    WAITING = 0
    RUNNING = 1
    ENDING = 2
    DONE = 3


class Sequence:
    """One sample of a request: its tokens, what the scheduler plans for it, and what it cost.

    ``prompt`` is int32 token ids, ``tokens`` the generated ones known so far (with those decoded
    elsewhere, which ``resume`` holds). ``limit`` is the number of prompt and generated tokens at which
    it ends at the latest.

    ``ticket`` is its place in the order of arrival; ``in_flight`` counts launched steps it is part of;
    positions below ``computed_before`` were computed once before, here or elsewhere, and are waste to
    compute again. ``charged_ns`` is what this engine charged it; ``prefill_ns`` and ``token_ns``
    include what was charged elsewhere.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "chain",
        "charged_ns",
        "computed_before",
        "in_flight",
        "index",
        "limit",
        "logprobs",
        "prefill_ns",
        "prompt",
        "prompt_logprobs",
        "row",
        "sample_index",
        "sampling",
        "state",
        "stops",
        "ticket",
        "token_ns",
        "tokens",
    )

    def __init__(
        self,
        index: int,
        sample_index: int,
        prompt: npt.NDArray[np.int32],
        sampling: SamplingParams,
        limit: int,
        stops: StopCondition,
        resume: Decoded,
    ) -> None:
        self.index = index
        self.sample_index = sample_index
        self.prompt = prompt
        self.sampling = sampling
        self.limit = limit
        self.stops = stops
        self.tokens: list[int] = list(resume.token_ids)
        self.token_ns: list[int] = list(resume.token_ns)
        self.prefill_ns = resume.prefill_ns
        self.charged_ns = 0
        self.logprobs: list[TokenLogprobs] = list(resume.logprobs)
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.cached_tokens: int | None = None
        # The last decoded token's position was not computed by whoever sampled it.
        self.computed_before = len(prompt) + len(self.tokens) - 1 if self.tokens else 0

        self.state = State.WAITING
        self.ticket = -1
        self.row = -1
        self.in_flight = 0
        self.chain: Chain | None = None
        # Only while ENDING: before that the scheduler's block table has them.
        self.blocks: BlockIds | None = None

    @property
    def num_known(self) -> int:
        """Prompt tokens and generated tokens known so far."""
        return len(self.prompt) + len(self.tokens)

    def known(self) -> npt.NDArray[np.int32]:
        """Prompt and generated tokens known so far, int32 [num_known], a new array."""
        if not self.tokens:
            return self.prompt.copy()
        return np.concatenate([self.prompt, np.array(self.tokens, np.int32)])

    def slice_bytes(self, start: int, stop: int) -> bytes:
        """The int32 token ids at positions start:stop, as bytes."""
        size = len(self.prompt)
        if stop <= size:
            return self.prompt[start:stop].tobytes()
        generated = np.array(self.tokens[max(start - size, 0) : stop - size], np.int32)
        return self.prompt[start:size].tobytes() + generated.tobytes()

    def decoded(self) -> Decoded:
        """What is decoded so far, to go on from elsewhere."""
        return Decoded(tuple(self.tokens), tuple(self.token_ns), self.prefill_ns, tuple(self.logprobs))
