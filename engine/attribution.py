"""One step's time split over its sequences, in integer nanoseconds, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchinfer.engine.types import StepCosts

Counts = npt.NDArray[np.int32]
Nanoseconds = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepWork:
    """What the entries of one step computed; all arrays have one entry a sequence.

    Entry i computed positions ``starts[i]`` to ``starts[i] + num_tokens[i]``. Those below
    ``computed_before[i]`` were computed by an earlier step too; those from ``prompt_tokens[i]`` on
    belong to generated tokens. ``samples`` (bool) marks a sampled token, ``useful`` (bool) is False
    where the result is of no use to anyone (over-run tokens, dropped requests).
    """

    starts: Counts
    num_tokens: Counts
    samples: npt.NDArray[np.bool_]
    prompt_tokens: Counts
    computed_before: Counts
    useful: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class StepShares:
    """A step's nanoseconds by entry, int64: they sum to the step's time.

    ``decode`` is the output head of a sampled token and the step that computed a generated token's
    position; ``waste`` is tokens computed before and entries of no use.
    """

    prefill: Nanoseconds
    decode: Nanoseconds
    waste: Nanoseconds


def split_step(costs: StepCosts, interval_ns: int, work: StepWork) -> StepShares:
    """Split ``interval_ns`` (0 or more) in proportion to each entry's estimated cost.

    An entry costs its operations over the measured rate, plus its own KV bytes over the measured
    bandwidth (spread evenly over its tokens), plus the weights' bytes shared by all tokens of the
    step. Rounded by the largest remainder, so that the parts sum to ``interval_ns`` exactly.
    """
    starts = work.starts.astype(np.float64)
    ends = starts + work.num_tokens
    count = len(starts)
    if count == 0:
        raise ValueError("a step without sequences has no time to split")
    recomputed = np.clip(work.computed_before.astype(np.float64), starts, ends)
    prompt_end = np.clip(work.prompt_tokens.astype(np.float64), recomputed, ends)

    kv_seconds = costs.kv_bytes_per_token * ends / costs.bytes_rate / work.num_tokens
    weight_seconds = costs.weight_bytes / costs.bytes_rate / float(work.num_tokens.sum())
    token_seconds = costs.flops_per_token / costs.flops_rate + weight_seconds + kv_seconds
    attention_seconds = costs.attention_flops / costs.flops_rate

    def seconds(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # A query at position p attends to p + 1 tokens: their sum over low <= p < high.
        attended = (high * (high + 1.0) - low * (low + 1.0)) / 2.0
        return (high - low) * token_seconds + attended * attention_seconds

    weights = np.empty((3, count))
    weights[0] = seconds(recomputed, prompt_end)
    weights[1] = seconds(prompt_end, ends) + work.samples * (costs.flops_per_sample / costs.flops_rate)
    weights[2] = seconds(starts, recomputed)
    useless = ~work.useful
    if useless.any():
        weights[2, useless] += weights[0, useless] + weights[1, useless]
        weights[:2, useless] = 0.0
    parts = split_by_largest_remainder(interval_ns, weights.ravel()).reshape(3, count)
    return StepShares(parts[0], parts[1], parts[2])


def split_by_largest_remainder(total: int, weights: npt.NDArray[np.float64]) -> Nanoseconds:
    """Integers in proportion to ``weights`` (float64, 0 or more, not all 0) that sum to ``total``.

    Where remainders are equal the first gets the unit. A weight of 0 gets 0. Raises ValueError if no
    weight is positive, or one is negative or not finite.
    """
    whole = float(weights.sum())
    if not 0.0 < whole < float("inf") or float(weights.min()) < 0.0:
        raise ValueError("weights must be finite, 0 or more, and not all 0")
    exact = weights / whole * total
    parts = np.floor(exact).astype(np.int64)
    left = total - int(parts.sum())
    if left > 0:
        positive = np.flatnonzero(weights)
        ranked = positive[np.argsort(-(exact - parts)[positive], kind="stable")]
        each, rest = divmod(left, len(ranked))
        parts[ranked] += each
        parts[ranked[:rest]] += 1
    elif left < 0:  # only by the rounding of floats, where total is beyond 2**50
        parts[np.argmax(parts)] += left
    return parts
