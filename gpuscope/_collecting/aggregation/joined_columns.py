"""
Columns of several batches as one, because arithmetic on a few hundred rows costs mostly the calls of numpy.

Data, and how to join it. Nothing here counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch


class Columns(NamedTuple):
    """What metrics need of stages, one row per stage; as in `StageBatch`, except for the first two."""

    stage: NDArray[np.int64]
    """Number of the stage, the same in all batches."""
    nested: NDArray[np.bool_]
    """Whether its stage differs from the outermost one of its trace."""
    device: NDArray[np.int32]
    flags: NDArray[np.uint32]
    sampled: NDArray[np.bool_]
    trace_high: NDArray[np.uint64]
    trace_low: NDArray[np.uint64]
    span_id: NDArray[np.uint64]
    parent_id: NDArray[np.uint64]
    gpu_span_id: NDArray[np.uint64]
    host_start_ns: NDArray[np.int64]
    host_end_ns: NDArray[np.int64]
    gpu_start_ns: NDArray[np.int64]
    gpu_end_ns: NDArray[np.int64]


def columns_of(batch: StageBatch, numbers: Sequence[int]) -> Columns:
    """Return a batch's columns; `numbers` has the stage's number for each of its sites."""
    stage = np.array(numbers, np.int64)[batch.site]
    return Columns(stage, batch.site != batch.root, *(getattr(batch, name) for name in Columns._fields[2:]))


def join(parts: Sequence[Columns]) -> Columns:
    """Return the columns of all parts, one after another."""
    return parts[0] if len(parts) == 1 else Columns(*map(np.concatenate, zip(*parts, strict=True)))
