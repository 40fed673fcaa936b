"""
What each member of a batch is allotted: whole nanoseconds by weight, which add up to the whole exactly.

Exact for any finite weights, because they are made whole numbers first. Nothing here is a measurement.
"""

from __future__ import annotations

import math
from numbers import Integral, Rational, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def fault_in(weights: Sequence[Any]) -> int:
    """
    Return the place of the first weight that is not a finite number of 0 or more, or -1 for none.

    The number of weights stands for weights of which each is 0. Asks nothing that is not a number of Python or numpy,
    because the number of a tensor may be on the GPU.
    """
    for place, weight in enumerate(weights):
        if not (isinstance(weight, Real) and math.isfinite(weight) and float(weight) >= 0):
            return place
    return -1 if any(weights) else len(weights)


def whole(weights: Sequence[Any]) -> list[int]:
    """Return whole numbers of the same proportions as weights without a fault."""
    if all(isinstance(weight, Integral) for weight in weights):
        return [int(weight) for weight in weights]
    ratios = [
        (int(weight.numerator), int(weight.denominator))
        if isinstance(weight, Rational)
        else float(weight).as_integer_ratio()
        for weight in weights
    ]
    common = math.lcm(*(below for _, below in ratios))
    return [above * (common // below) for above, below in ratios]


def shares(total: int, count: int, weights: Sequence[int] | None) -> list[int]:
    """
    Divide a whole number by weight, by the method of the largest remainder; of equal remainders the first gets more.

    Args:
        total: what is divided, 0 or more.
        count: among how many.
        weights: whole numbers of 0 or more, of which one at least is more; None for equal ones.

    Returns:
        So many whole numbers, whose sum is the total.

    """
    if weights is None:
        each, left = divmod(total, count)
        return [each + 1] * left + [each] * (count - left)
    of_all = sum(weights)
    parts, remainders = map(list, zip(*(divmod(total * weight, of_all) for weight in weights), strict=True))
    for place in sorted(range(count), key=lambda place: -remainders[place])[: total - sum(parts)]:
        parts[place] += 1
    return parts
