"""How many tokens a whole set will generate, from what a pilot of its rows did: a total and its range."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

# Pilot rows of a stratum: the fewest whose skewness can be told, as the range of a long tail is not even.
STRATUM_ROWS = 4
TAIL = 0.9
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Range:
    """What a quantity will be: below ``p10`` and above ``p90`` one time in ten each."""

    p10: float
    p50: float
    p90: float

    def scaled(self, factor: float) -> Range:
        """The same in another unit."""
        return Range(self.p10 * factor, self.p50 * factor, self.p90 * factor)


def exactly(value: float) -> Range:
    """The range of what is known."""
    return Range(value, value, value)


@dataclass(frozen=True, slots=True)
class Stratum:
    """Rows that are alike: ``members`` are all of them, ``chosen`` those of the pilot, as places in the
    order they were cut from."""

    members: tuple[int, ...]
    chosen: tuple[int, ...]


def choose_rows(order: Sequence[int], rows: int, seed: int) -> list[Stratum]:
    """Cut ``order`` (places of rows, alike ones side by side) into strata, and choose ``rows`` of them at
    random, in each stratum in proportion to its size: about every row is as likely as any other.

    All are chosen where ``rows`` is as many or more. Raises ValueError unless ``rows`` is 1 or more.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}, but it must be 1 or more")
    rows = min(rows, len(order))
    if rows == 0:
        return []
    count = max(1, rows // STRATUM_ROWS)
    draw = random.Random(seed)
    # Which strata get the odd row is drawn too, so that no part of the order is preferred.
    odd = frozenset(draw.sample(range(count), rows % count))
    strata = []
    before = 0
    for number in range(count):
        # As large as its part of the pilot, so never smaller than it.
        wanted = rows // count + (number in odd)
        members = order[before * len(order) // rows : (before + wanted) * len(order) // rows]
        before += wanted
        strata.append(Stratum(tuple(members), tuple(sorted(draw.sample(members, wanted)))))
    return strata


def total_range(
    sizes: Sequence[float], observed: Sequence[Sequence[float]], lowest: float, highest: float
) -> Range:
    """The range of a sum over all rows of strata of ``sizes`` rows, of which some were ``observed``.

    The estimate is each stratum's mean times its size; what was observed counts as known, so that with
    every row observed the range is a point. Its variance is that of stratified random sampling without
    replacement (Cochran, Sampling Techniques, 5.5), which holds the noise of the rows not seen. Added to
    it is one row of a kind not seen yet, exponential and mostly up to twice the largest seen: a small
    sample of a long tail rarely holds the tail. The skewness bends the interval by Hall's transformation
    (Hall 1992, "On the removal of skewness by transformation"), with quantiles of Student's t for what a
    small sample says of its own spread. Both ends are kept within ``lowest`` and ``highest``.
    """
    total = variance = third = freedom = weight = 0.0
    seen = sum(len(values) for values in observed)
    largest = max((value for values in observed for value in values), default=0.0)
    unseen = 0.0
    for size, values in zip(sizes, observed, strict=True):
        count = len(values)
        if not count:
            continue
        mean = sum(values) / count
        total += size * mean
        left = max(0.0, 1.0 - count / size)
        unseen += max(0.0, size - count)
        if count > 1:
            squares = sum((value - mean) ** 2 for value in values)
            part = size**2 * left * squares / (count - 1) / count
            variance += part
            weight += part**2 / (count - 1)
        if count > 2:
            cubes = sum((value - mean) ** 3 for value in values) * count / (count - 1) / (count - 2)
            third += size**3 * left * max(0.0, 2 * left - 1.0) * cubes / count**2
    if unseen <= 0.0:
        return exactly(total)
    freedom = variance**2 / weight if weight else 1.0
    rare = unseen / (seen + 1) * min(2.0 * largest, highest / sum(sizes)) / 12.0**0.5
    variance += rare**2
    third += 2.0 * rare**3
    error = variance**0.5
    if error == 0.0:
        return exactly(min(max(total, lowest), highest))
    skewness = third / variance**1.5
    far = t_quantile(TAIL, max(freedom, 2.0))
    low, high = (total - error * _unbent(end, skewness) for end in (far, -far))
    middle = total - error * _unbent(0.0, skewness)
    low, middle, high = (min(max(value, lowest), highest) for value in (low, middle, high))
    return Range(low, middle, high)


def _unbent(value: float, skewness: float) -> float:
    """The inverse of Hall's t + A t²/3 + A² t³/27 + A/6, for the skewness A of an estimate."""
    if abs(skewness) < 1e-6:
        return value
    inner = 1.0 + skewness * (value - skewness / 6.0)
    root = abs(inner) ** (1.0 / 3.0) * (1.0 if inner >= 0 else -1.0)
    return float(3.0 / skewness * (root - 1.0))


def t_quantile(probability: float, freedom: float) -> float:
    """A quantile of Student's t for 2 degrees of freedom or more, to a part in a hundred: the expansion
    of Fisher and Cornish (Abramowitz and Stegun 26.7.5)."""
    z = _NORMAL.inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
