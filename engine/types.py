"""The nouns that the parts of the engine share; no torch, no tokenizer, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

FinishReason = Literal["stop", "length"]
Message = Mapping[str, Any]


class ModelError(Exception):
    """A model that can't be loaded as asked, as one sentence that names it and says what to do."""


class EngineError(Exception):
    """A step that failed, as one sentence that names the request or the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and penalties at their defaults
    are off. ``logprobs``: None for none, 0 for the sampled token's, k for the k most likely beside it;
    ``prompt_logprobs`` the same for the prompt's tokens. Log-probabilities are of the raw logits.
    ``max_tokens`` None generates up to the context length.

    Raises ValueError naming the field that is out of range.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""

        def require(condition: bool, name: str, rule: str) -> None:
            if not condition:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but it must be {rule}")

        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more")
        require(self.min_tokens >= 0, "min_tokens", "0 or more")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            "at most max_tokens",
        )
        require(0.0 <= self.temperature < float("inf"), "temperature", "0 or more")
        require(self.top_k >= 0, "top_k", "0 (off) or more")
        require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        require(self.repetition_penalty > 0.0, "repetition_penalty", "above 0")
        require(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        require(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        require(0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1")
        require(all(self.stop), "stop", "free of empty strings")
        require(self.n >= 1, "n", "1 or more")
        require(self.logprobs is None or self.logprobs >= 0, "logprobs", "null, 0 or more")
        require(
            self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "prompt_logprobs",
            "null, 0 or more",
        )

    @property
    def keeps_logits(self) -> bool:
        """Whether tokens are chosen from the model's logits as they are: nothing is added or masked."""
        return (
            not self.logit_bias
            and self.min_tokens == 0
            and (self.top_k, self.top_p, self.min_p) == (0, 1.0, 0.0)
            and self.repetition_penalty == 1.0
            and (self.presence_penalty, self.frequency_penalty) == (0.0, 0.0)
        )


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: the token's own, and the most likely tokens there, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Decoded:
    """The part of one sample that is decoded so far: enough to go on from its last token elsewhere.

    ``token_ns`` is what each token cost and ``prefill_ns`` what its prompt cost, in nanoseconds as
    charged by whoever computed them.
    """

    token_ids: tuple[int, ...] = ()
    token_ns: tuple[int, ...] = ()
    prefill_ns: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete.

    ``prompt`` is text, token ids, or chat messages (a sequence of mappings with ``role`` and ``content``).
    ``index`` names the request among those of one engine and, with the seed and the sample's number,
    keys its sampling noise: a job passes the row's index in the whole input. ``resume`` holds the
    decoded part of samples begun elsewhere, by sample index; ``samples`` the sample indexes to run
    (None: all ``sampling.n``).
    """

    index: int
    prompt: str | tuple[int, ...] | Sequence[Message]
    sampling: SamplingParams = SamplingParams()
    resume: Mapping[int, Decoded] = field(default_factory=dict)
    samples: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample of a request.

    ``prefill_ns`` + sum(``token_ns``) is the engine time charged to it, in nanoseconds;
    ``decode_ns`` is that sum. ``cached_tokens`` counts prompt tokens read from the prefix cache.
    ``prompt_logprobs`` has one entry a prompt token, the first None.
    """

    index: int
    sample_index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    prefill_ns: int
    token_ns: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def decode_ns(self) -> int:
        """Nanoseconds charged to the generated tokens."""
        return sum(self.token_ns)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A request that this engine can't run: ``code`` such as ``too_long``, and one sentence why."""

    index: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class NewRow:
    """A device row given to a sample that enters (or re-enters) the batch.

    ``tokens`` is the prompt plus all tokens decoded so far; ``num_prompt_tokens`` says where the
    prompt ends, for penalties and min_tokens.
    """

    row: int
    tokens: npt.NDArray[np.int32]
    num_prompt_tokens: int
    sampling: SamplingParams
    index: int
    sample_index: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes: some tokens of some rows. There are no phases.

    Entry i computes ``num_tokens[i]`` tokens, 1 or more, of device row ``rows[i]`` from position
    ``starts[i]`` on (all int32, [num_sequences]). The input tokens are read from the row's own token
    table, where the sampler of an earlier step wrote them, so a plan never carries a sampled token.
    Where ``samples[i]`` (bool) is set the logits at the last computed position choose the token at
    position ``starts[i] + num_tokens[i]``.

    Before the step, in this order: ``new_rows`` are set up (their block tables emptied), then block
    ``block_ids[j]`` becomes block number ``block_positions[j]`` of row ``block_rows[j]``.
    """

    index: int
    rows: npt.NDArray[np.int32]
    num_tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    samples: npt.NDArray[np.bool_]
    new_rows: tuple[NewRow, ...] = ()
    block_rows: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    block_positions: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    block_ids: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def total_tokens(self) -> int:
        """Tokens that the step computes."""
        return int(self.num_tokens.sum())


class RowLogprobs(NamedTuple):
    """Log-probabilities of one plan entry, raw: of the sampled token, or of a chunk of its prompt.

    ``chosen`` float32 [k], ``top_ids`` int32 [k, width], ``top`` float32 [k, width]; k is 1 for a
    sampled token. For a prompt chunk entry j is the token at position ``starts + j + 1``, for as many
    positions as are still inside the prompt.
    """

    chosen: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed: ``tokens`` int32 [num_sequences], -1 where the plan samples none.

    ``logprobs`` and ``prompt_logprobs`` are keyed by the entry's place in the plan.
    ``completed_ns`` is when the step was done, on the clock ``time.perf_counter_ns``.
    """

    tokens: npt.NDArray[np.int32]
    completed_ns: int
    logprobs: Mapping[int, RowLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, RowLogprobs] = field(default_factory=dict)


class StepHandle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step and return its result; raises what the step raised."""
        ...


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Rates and sizes by which a step's time is split over its sequences.

    ``flops_per_token`` and ``flops_per_sample`` (the output head) are floating-point operations;
    ``attention_flops`` those of one query token against one cached token; ``kv_bytes_per_token`` and
    ``weight_bytes`` bytes; the rates are per second, measured at load or taken from tables.
    """

    flops_per_token: float
    flops_per_sample: float
    attention_flops: float
    kv_bytes_per_token: float
    weight_bytes: float
    flops_rate: float
    bytes_rate: float


class Runner(Protocol):
    """Executes step plans in the order they are launched; the scheduler's view of a device.

    ``steps_in_flight`` is how many steps are launched before the first one's result is awaited.
    ``fresh_blocks_cost`` says that a block's first use takes time, as the system finds memory for it.
    """

    steps_in_flight: int
    fresh_blocks_cost: bool
    block_size: int
    num_blocks: int
    max_rows: int
    max_context: int
    costs: StepCosts

    def launch(self, plan: StepPlan) -> StepHandle:
        """Queue a step behind those launched before; returns at once where the device allows it."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...
