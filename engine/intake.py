"""From requests to sequences that the engine can run, or to the reason why it can't."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from batchinfer.engine.sequence import Sequence
from batchinfer.engine.stops import Detokenizer, StopCondition
from batchinfer.engine.types import Decoded, Message, Rejection, Request


class Tokenizer(Protocol):
    """What the engine needs of a model's tokenizer. Token ids are below ``vocab_size``."""

    eos_token_ids: frozenset[int]
    vocab_size: int

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with the tokenizer's default special tokens."""
        ...

    def apply_chat_template(self, messages: Seq[Message]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        ...

    def decode(self, ids: Seq[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        ...

    def detokenizer(self) -> Detokenizer:
        """An incremental detokenizer of one sample."""
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """What one sequence may take: ``max_context`` prompt and generated tokens, and a KV cache of
    ``num_blocks`` blocks of ``block_size`` tokens."""

    max_context: int
    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request that can run: its prompt's token ids, int32, and its samples."""

    request: Request
    prompt: npt.NDArray[np.int32]
    samples: list[Sequence]


def take_in(
    requests: Seq[Request], tokenizer: Tokenizer, limits: Limits
) -> tuple[list[Accepted], list[Rejection]]:
    """Tokenize and check ``requests``; both lists keep their order.

    Raises ValueError if a request's ``resume`` contradicts itself or its sampling.
    """
    prompts = _tokenize(requests, tokenizer)
    accepted: list[Accepted] = []
    rejected: list[Rejection] = []
    for request, tokens in zip(requests, prompts, strict=True):
        if isinstance(tokens, Rejection):
            rejected.append(tokens)
            continue
        problem = _problem(request, tokens, tokenizer, limits)
        if problem is not None:
            rejected.append(problem)
            continue
        prompt = np.array(tokens, np.int32)
        accepted.append(Accepted(request, prompt, _samples(request, prompt, tokenizer, limits)))
    return accepted, rejected


def _tokenize(requests: Seq[Request], tokenizer: Tokenizer) -> list[Seq[int] | Rejection]:
    texts = [request.prompt for request in requests if isinstance(request.prompt, str)]
    encoded = iter(tokenizer.encode_batch(texts) if texts else [])
    prompts: list[Seq[int] | Rejection] = []
    for request in requests:
        prompt: Any = request.prompt
        if isinstance(prompt, str):
            prompts.append(next(encoded))
        elif len(prompt) and not isinstance(prompt[0], int | np.integer):
            try:
                prompts.append(tokenizer.apply_chat_template(prompt))
            except ValueError as error:
                prompts.append(Rejection(request.index, "chat_template", str(error)))
        else:
            prompts.append(prompt)
    return prompts


def _limit(request: Request, num_prompt_tokens: int, limits: Limits) -> int:
    """Prompt and generated tokens at which a sample ends at the latest."""
    if request.sampling.max_tokens is None:
        return limits.max_context
    return min(limits.max_context, num_prompt_tokens + request.sampling.max_tokens)


def _problem(request: Request, tokens: Seq[int], tokenizer: Tokenizer, limits: Limits) -> Rejection | None:
    size = len(tokens)
    if size == 0:
        return Rejection(request.index, "empty_prompt", "The prompt is empty; give it at least one token.")
    if min(tokens) < 0 or max(tokens) >= tokenizer.vocab_size:
        outside = min(tokens) if min(tokens) < 0 else max(tokens)
        message = (
            f"The prompt holds token id {outside}, but the model's ids end at {tokenizer.vocab_size - 1}."
        )
        return Rejection(request.index, "bad_token", message)
    biased = next(
        (token for token in request.sampling.logit_bias if not 0 <= token < tokenizer.vocab_size), None
    )
    if biased is not None:
        message = (
            f"logit_bias names token id {biased}, but the model's ids end at {tokenizer.vocab_size - 1}."
        )
        return Rejection(request.index, "bad_token", message)
    if size >= limits.max_context:
        message = (
            f"The prompt has {size} tokens, but the context holds {limits.max_context}, one of them for "
            "the answer; shorten the prompt, or raise max_context if the model allows it."
        )
        return Rejection(request.index, "too_long", message)
    limit, capacity = _limit(request, size, limits), limits.num_blocks * limits.block_size
    if limit - 1 > capacity:
        message = (
            f"The prompt has {size} tokens and up to {limit - size} are to be generated, but the KV cache "
            f"holds {capacity} tokens; lower max_tokens, shorten the prompt or raise kv_bytes."
        )
        return Rejection(request.index, "too_long", message)
    return None


def _samples(
    request: Request, prompt: npt.NDArray[np.int32], tokenizer: Tokenizer, limits: Limits
) -> list[Sequence]:
    sampling = request.sampling
    limit = _limit(request, len(prompt), limits)
    numbers = range(sampling.n) if request.samples is None else request.samples
    samples = []
    for number in numbers:
        resume = request.resume.get(number, Decoded())
        if len(resume.token_ns) != len(resume.token_ids):
            raise ValueError(
                f"request {request.index} resumes sample {number} with {len(resume.token_ids)} token_ids "
                f"but {len(resume.token_ns)} token_ns"
            )
        if sampling.logprobs is not None and len(resume.logprobs) != len(resume.token_ids):
            raise ValueError(
                f"request {request.index} asks for logprobs and resumes sample {number} with "
                f"{len(resume.token_ids)} token_ids but {len(resume.logprobs)} logprobs"
            )
        stops = StopCondition(sampling, tokenizer.eos_token_ids, tokenizer)
        samples.append(Sequence(request.index, number, prompt, sampling, limit, stops, resume))
    return samples
