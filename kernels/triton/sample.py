"""Sampling with Philox noise: the reference's fp64 choice at the cost of fp32.

Two passes. The first bounds every token's score from both sides in fp32 and keeps, of each stretch of the
vocabulary, the highest upper and lower bound. The second computes in fp64 only the stretches that can
still hold the best token: nearly always one.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What fp32 may get wrong: of the noise, and of the quotient of logit and temperature. Both generous.
_NOISE_ERROR = tl.constexpr(1e-4)
_SCORE_ERROR = tl.constexpr(1e-6)


@triton.jit
def philox(c0, c1, k0, k1):
    """Philox4x32-10 (Salmon et al., SC 2011) at counter (c0, c1, 0, 0): four uint32 tensors."""
    c2 = c1 * 0
    c3 = c1 * 0
    for _ in tl.static_range(10):
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def noise_words(keys, positions, row, start, WIDTH: tl.constexpr):
    """Bits of the noise of the tokens ``start`` .. ``start + WIDTH`` of a row: int32 below 2**24."""
    quads = (start // 4 + tl.arange(0, WIDTH // 4)).to(tl.uint32)
    k0 = tl.load(keys + row * 2).to(tl.uint32)
    k1 = tl.load(keys + row * 2 + 1).to(tl.uint32)
    position = tl.load(positions + row).to(tl.uint32)
    w0, w1, w2, w3 = philox(quads * 0 + position, quads, k0, k1)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 8).to(tl.int32)


@triton.jit
def gumbel32(bits):
    """-log(-log(u)), u = (bits + 0.5) / 2**24, to about 1e-5 in fp32.

    Above one half the inner logarithm is that of 1 - v by a series in v / (2 - v), since v is exact.
    """
    unit: tl.constexpr = 5.9604644775390625e-08
    low = (bits.to(tl.float32) + 0.5) * unit
    v = ((16777216 - bits).to(tl.float32) - 0.5) * unit
    z = v / (2.0 - v)
    zz = z * z
    series = 1.0 + zz * (
        0.3333333333
        + zz * (0.2 + zz * (0.1428571429 + zz * (0.1111111111 + zz * (0.0909090909 + zz * 0.0769230769))))
    )
    inner = tl.where(bits < 8388608, -tl.log(low), 2.0 * z * series)
    return -tl.log(inner)


@triton.jit
def bound_kernel(
    logits,  # fp32 [S, V]
    temperature,  # fp32 [S]
    keys,  # int64 [S, 2]
    positions,  # int64 [S]
    upper,  # fp32 [S, stretches]
    lower,
    stride,
    vocabulary,
    WIDTH: tl.constexpr,
):
    """Program (r, c): the highest bounds of row r's scores in stretch c of WIDTH tokens."""
    row, stretch = tl.program_id(0), tl.program_id(1)
    start = stretch * WIDTH
    token = start + tl.arange(0, WIDTH)
    logit = tl.load(
        logits + row.to(tl.int64) * stride + token, mask=token < vocabulary, other=float("-inf")
    )
    heat = tl.load(temperature + row)
    at = row.to(tl.int64) * tl.num_programs(1) + stretch
    if heat == 0.0:
        best = tl.max(logit, 0)
        tl.store(upper + at, best)
        tl.store(lower + at, best)
    else:
        score = logit / heat
        error = _NOISE_ERROR + tl.abs(score) * _SCORE_ERROR
        score += gumbel32(noise_words(keys, positions, row, start, WIDTH))
        masked = logit == float("-inf")
        tl.store(upper + at, tl.max(tl.where(masked, float("-inf"), score + error), 0))
        tl.store(lower + at, tl.max(tl.where(masked, float("-inf"), score - error), 0))


@triton.jit
def choose_kernel(
    logits,
    temperature,
    keys,
    positions,
    upper,
    lower,
    tokens,  # int64 [S]
    stride,
    vocabulary,
    stretches,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Program r: the best token of row r, among the stretches whose upper bound reaches every lower one."""
    row = tl.program_id(0)
    heat = tl.load(temperature + row)
    which = tl.arange(0, PADDED)
    at = row.to(tl.int64) * stretches
    lows = tl.load(lower + at + which, mask=which < stretches, other=float("-inf"))
    bar = tl.max(lows, 0)
    best = tl.full([], float("-inf"), tl.float64)
    chosen = tl.full([], 0, tl.int32)
    for stretch in range(stretches):
        if tl.load(upper + at + stretch) >= bar:
            start = stretch * WIDTH
            token = start + tl.arange(0, WIDTH)
            logit = tl.load(
                logits + row.to(tl.int64) * stride + token, mask=token < vocabulary, other=float("-inf")
            ).to(tl.float64)
            score = logit
            if heat != 0.0:
                unit = (noise_words(keys, positions, row, start, WIDTH).to(tl.float64) + 0.5) / 16777216.0
                score = logit / heat.to(tl.float64) - tl.log(-tl.log(unit))
            highest = tl.max(score, 0)
            if highest > best:
                best = highest
                chosen = tl.min(tl.where(score == highest, token, 1 << 30), 0)
    tl.store(tokens + row, chosen.to(tl.int64))
