"""
A stretch of time given out to whatever covers it: at each instant to what comes first.

Whole numbers in, whole numbers out: what is given out adds up to the stretch. Knows no stages.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    Part = TypeVar("Part", bound=Hashable)


class Claim(NamedTuple):
    """What an interval is said to be, and how much that counts."""

    start_ns: int
    end_ns: int
    rank: tuple[float, ...]
    """The least comes first."""
    part: object


def given_out(start_ns: int, end_ns: int, claims: Iterable[Claim], rest: Part) -> dict[object, int]:
    """
    Return the nanoseconds of each part; what nothing covers is the rest.

    Args:
        start_ns: where the stretch begins.
        end_ns: where it ends; before the start, it is empty.
        claims: any intervals, in any order; those of equal rank come in the order given.
        rest: the part of what nothing covers.

    """
    clipped = [
        (max(start_ns, claim.start_ns), min(end_ns, claim.end_ns), claim.rank, number, claim.part)
        for number, claim in enumerate(claims)
    ]
    waiting = sorted(each for each in clipped if each[0] < each[1])
    parts: dict[object, int] = {}
    current: list[tuple[tuple[float, ...], int, int, object]] = []
    now_ns, place = start_ns, 0
    while now_ns < end_ns:
        while place < len(waiting) and waiting[place][0] <= now_ns:
            _, until_ns, rank, number, part = waiting[place]
            heapq.heappush(current, (rank, number, until_ns, part))
            place += 1
        while current and current[0][2] <= now_ns:
            heapq.heappop(current)
        next_ns = waiting[place][0] if place < len(waiting) else end_ns
        part, until_ns = (current[0][3], min(current[0][2], next_ns)) if current else (rest, next_ns)
        parts[part] = parts.get(part, 0) + until_ns - now_ns
        now_ns = until_ns
    return parts
