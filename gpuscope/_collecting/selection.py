"""Some rows of a batch, as a batch."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch

_TABLES = ("sites", "threads", "devices", "details", "live", "device_samples", "stream_samples", "shared")
"""Fields of `StageBatch` that are not columns."""


def select(batch: StageBatch, mask: NDArray[np.bool_]) -> StageBatch:
    """Return the rows of a batch for which the mask holds."""
    kept = np.flatnonzero(mask)
    # `Any`, because `replace` wants a type of its own for each field.
    changes: dict[str, Any] = {
        name: column[kept]
        for name in (field.name for field in fields(batch))
        if name not in _TABLES and (column := getattr(batch, name)) is not None
    }
    positions = {int(old): new for new, old in enumerate(kept)}
    changes["details"] = {positions[row]: details for row, details in batch.details.items() if row in positions}
    changes["live"] = tuple(batch.live[row] for row in kept) if batch.live is not None else None
    return replace(batch, **changes)
