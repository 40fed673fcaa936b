"""
The way from each stage up to the outermost one, for all rows at once.

Arithmetic on the column of parents; knows nothing else of a recording.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


def ancestors(parent: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (rows, stage around each): first every row with its parent, then with its parent's parent, and so on."""
    rows = np.flatnonzero(parent >= 0)
    above = parent[rows]
    while rows.size:
        yield rows, above
        higher = parent[above] >= 0
        rows, above = rows[higher], parent[above[higher]]
