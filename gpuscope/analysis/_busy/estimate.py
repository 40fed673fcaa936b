"""
The share of answers that found work, with an interval that is over requests and not over answers.

Answers within one request resemble each other, so many answers in few requests say little. Numbers in, numbers out;
knows no stages.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_REQUESTS = 10
"""With answers in fewer requests than this, there is no estimate."""
_Z = 1.959964
"""The 97.5th percentile of the normal distribution: intervals are of 95 %."""


class Share(NamedTuple):
    """A part of a whole, and the ends of its 95 % interval, each from 0 to 1."""

    share: float
    low: float
    high: float
    answers: int
    requests: int
    """How many requests had an answer."""


class Sums(NamedTuple):
    """Sums over requests."""

    requests: int
    hits: float
    answers: float
    hits2: float
    """This and the next are of squares, the last is of the products of both."""
    answers2: float
    both: float


def share_of(hits: NDArray[np.int64], answers: NDArray[np.int64]) -> Share | None:
    """
    Return the share of hits among all answers; None where too few requests have an answer.

    The share is a ratio of two sums over requests, and its variance is that of such a ratio: W. G. Cochran, "Sampling
    Techniques", 3rd edition, 1977, section 6.4, with the requests as the units. Where all answers are alike, that
    variance is 0 although little may be known. So the interval is computed with two more requests of average size, one
    with hits alone and one with none, as A. Agresti and B. A. Coull do for single answers ("Approximate is better than
    'exact' for interval estimation of binomial proportions", Am. Stat. 52, 119, 1998), and is Student's.

    Args:
        hits: One number per request.
        answers: The same, at least the hits.

    """
    asked = answers > 0
    hits, answers = hits[asked].astype(np.float64), answers[asked].astype(np.float64)
    squares = float(hits @ hits), float(answers @ answers), float(hits @ answers)
    return share_of_sums(Sums(len(answers), float(hits.sum()), float(answers.sum()), *squares))


def share_of_sums(sums: Sums) -> Share | None:
    """Return the same from sums over requests; what is counted may also be times."""
    count, hits, answers, hits2, answers2, both = sums
    if count < MIN_REQUESTS or answers <= 0:
        return None
    share, size, units = hits / answers, answers / count, count + 2
    middle = (hits + size) / (answers + 2 * size)
    left_over = hits2 + size**2 - 2 * middle * (both + size**2) + middle**2 * (answers2 + 2 * size**2)
    deviation = math.sqrt(units / (units - 1) * max(0.0, left_over)) / (answers + 2 * size)
    reach = _student(units - 1) * deviation
    low, high = max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach))
    return Share(share, low, high, int(answers), count)


def _student(freedom: int) -> float:
    """Return the 97.5th percentile of Student's t: M. Abramowitz and I. A. Stegun, 1964, formula 26.7.5."""
    terms = (
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
    )
    return _Z + sum(term / float(freedom) ** (place + 1) for place, term in enumerate(terms))
