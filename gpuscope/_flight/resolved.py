"""
What became of stages, as records of the ring: a batch's columns into 64 bytes per stage, without a loop over them.

Pure, but that names get their numbers in the ring. The reader is `analysis/_reading/flight_ring.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data import flight as layout
from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch
    from gpuscope._flight.ring import Ring

_MANTISSA, _EXPONENT_AT = 2047, 11


def records_of(batch: StageBatch, ring: Ring, offset: NDArray[np.int64]) -> bytes:
    """
    Return a batch's records: of each stage how it is resolved, and before that, of one in a graph, that it was.

    Args:
        batch: resolved stages.
        ring: gives numbers to names.
        offset: by so many nanoseconds the batch's times are later than the records'; one number, or one per row.

    """
    threads = np.array([ring.thread(thread) for thread in batch.threads], np.uint64)
    numbers = np.array([ring.site(site) for site in batch.sites], np.uint64)[batch.site]
    rows = np.zeros((len(batch.site), 8), np.uint64)
    has_gpu = batch.gpu_end_ns != 0
    gpu_ns = np.where(has_gpu, np.clip(batch.gpu_end_ns - batch.gpu_start_ns, 0, layout.LOW_48), 0)
    rows[:, 0], rows[:, 1], rows[:, 2] = batch.trace_high, batch.trace_low, batch.span_id
    rows[:, 3] = (batch.host_start_ns - offset).astype(np.uint64)
    rows[:, 4] = np.where(has_gpu, batch.gpu_start_ns - offset, 0).astype(np.uint64)
    rows[:, 5] = np.where(has_gpu, batch.device + 1, 0).astype(np.uint64) << np.uint64(48) | gpu_ns.astype(np.uint64)
    uncertainty_ns = np.where(has_gpu, batch.uncertainty_ns, 0)
    rows[:, 6] = rounded(uncertainty_ns) << np.uint64(48) | batch.stream & np.uint64(layout.LOW_48)
    flags = batch.flags & layout.ROW_FLAGS | np.where(batch.sampled, layout.SAMPLED, 0).astype(np.uint32)
    sites = numbers << np.uint64(layout.SITE_AT)
    rows[:, 7] = np.uint64(layout.RESOLVED) | flags.astype(np.uint64) << np.uint64(layout.FLAGS_AT) | sites
    inside = (batch.flags & RowFlag.IN_GRAPH) != 0
    if not inside.any():
        return rows.tobytes()
    launched = np.zeros((int(inside.sum()), 8), np.uint64)
    launched[:, :3], launched[:, 3] = rows[inside, :3], batch.parent_id[inside]
    launched[:, 4], launched[:, 5] = rows[inside, 3], 1
    launched[:, 6] = threads[batch.thread[inside]]
    launched[:, 7] = np.uint64(layout.STAGE) | sites[inside]
    return launched.tobytes() + rows.tobytes()


def rounded(ns: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return nanoseconds in 16 bits, rounded up by one part in 1,024 at most: eleven, and five to shift them by."""
    exponent = np.maximum(0, np.ceil(np.log2((np.maximum(ns, 1) + 1) / _MANTISSA))).astype(np.int64)
    mantissa = -(-ns >> exponent)
    over = mantissa > _MANTISSA
    exponent, mantissa = np.where(over, exponent + 1, exponent), np.where(over, _MANTISSA // 2 + 1, mantissa)
    exponent = np.minimum(exponent, 31)
    bits: NDArray[np.uint64] = (np.minimum(mantissa, _MANTISSA) | exponent << _EXPONENT_AT).astype(np.uint64)
    return bits
