"""Top-k, top-p and min-p without sorting: each leaves the tokens above a threshold, which is searched for.

The bits of a float, turned so that they order as integers do, are fixed from the highest to the lowest:
32 passes over a row, which stays in the L2 cache, where a sort would write it out many times.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ordered(score):
    """uint32 that order as the fp32 scores do."""
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ tl.where(bits < 0, -1, -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _scores(row, start, heat, vocabulary, WIDTH: tl.constexpr):
    token = start + tl.arange(0, WIDTH)
    return tl.load(row + token, mask=token < vocabulary, other=float("-inf")) / heat


@triton.jit
def filter_kernel(
    logits,  # fp32 [n, V], masked in place
    places,  # int64 [m]: the rows to filter
    temperature,  # fp32 [m], above 0
    top_k,  # int64 [m], V for all
    top_p,  # fp32 [m], 1 for all
    min_p,  # fp32 [m], 0 for all
    stride,
    vocabulary,
    WIDTH: tl.constexpr,
):
    """Program i: the row ``places[i]``."""
    item = tl.program_id(0)
    row = logits + tl.load(places + item) * stride
    heat = tl.load(temperature + item)
    k, p, least = tl.load(top_k + item), tl.load(top_p + item), tl.load(min_p + item)
    highest = tl.full([], float("-inf"), tl.float32)
    for start in range(0, vocabulary, WIDTH):
        highest = tl.maximum(highest, tl.max(_scores(row, start, heat, vocabulary, WIDTH), 0))
    # The highest number that at least k scores reach: the k-th best, whose equals stay.
    bar = tl.full([], 0, tl.uint32)
    if k < vocabulary:
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            count = tl.full([], 0, tl.int32)
            for start in range(0, vocabulary, WIDTH):
                order = _ordered(_scores(row, start, heat, vocabulary, WIDTH))
                count += tl.sum((order >= (bar | bit)).to(tl.int32), 0)
            if count >= k:
                bar = bar | bit
            bit = bit >> 1
    # The highest number above which, itself included, p of the weight lies: what is below may go.
    if p < 1.0:
        total = tl.full([], 0.0, tl.float32)
        for start in range(0, vocabulary, WIDTH):
            score = _scores(row, start, heat, vocabulary, WIDTH)
            total += tl.sum(tl.where(_ordered(score) >= bar, tl.exp(score - highest), 0.0), 0)
        nucleus = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            weight = tl.full([], 0.0, tl.float32)
            for start in range(0, vocabulary, WIDTH):
                score = _scores(row, start, heat, vocabulary, WIDTH)
                order = _ordered(score)
                counted = (order >= bar) & (order >= (nucleus | bit))
                weight += tl.sum(tl.where(counted, tl.exp(score - highest), 0.0), 0)
            if weight >= p * total:
                nucleus = nucleus | bit
            bit = bit >> 1
        bar = tl.maximum(bar, nucleus)
    for start in range(0, vocabulary, WIDTH):
        token = start + tl.arange(0, WIDTH)
        score = _scores(row, start, heat, vocabulary, WIDTH)
        kept = (_ordered(score) >= bar) & (tl.exp(score - highest) >= least)
        tl.store(row + token, float("-inf"), mask=(token < vocabulary) & (kept == 0))
