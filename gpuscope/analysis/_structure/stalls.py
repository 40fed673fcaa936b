"""
What stalled the host, as stages tell it: garbage collections, and GPU memory that ran out.

Data; reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


class Collected(NamedTuple):
    """One garbage collection that a stage was open in."""

    start_ns: int
    """Since the epoch."""
    took_ns: int
    generation: int


@dataclass(frozen=True, slots=True)
class Stalls:
    """By row of the recording, where there are any."""

    collections: Mapping[int, tuple[Collected, ...]] = field(default_factory=dict)
    out_of_memory: tuple[int, ...] = ()
    """Rows of stages that PyTorch's `OutOfMemoryError` left."""

    def kept(self, place: NDArray[np.int64]) -> Stalls:
        """Return them of those rows that have a place, which is not negative, in another recording."""
        return Stalls(
            {int(place[row]): found for row, found in self.collections.items() if place[row] >= 0},
            tuple(int(place[row]) for row in self.out_of_memory if place[row] >= 0),
        )
