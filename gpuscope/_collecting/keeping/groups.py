"""
The rows of one batch by their requests: which rows, from when to when, and where the outermost stage is.

Arithmetic on columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch

_ODD = 0x9E37_79B9_7F4A_7C15
_LOW = (1 << 64) - 1
_REMOTE, _GIVEN_UP = int(RowFlag.REMOTE_PARENT), int(RowFlag.GIVEN_UP)
_NEVER_NS = (1 << 63) - 1


def trace_keys(batch: StageBatch) -> NDArray[np.uint64]:
    """
    Return a number per row that stands for its trace.

    A light span in another process's trace counts as one of the batch's: no stage here can decide for it.
    """
    keys: NDArray[np.uint64] = batch.trace_low ^ batch.trace_high * np.uint64(_ODD)
    if batch.shared is None:
        return keys
    of_batch = batch.shared.batch_trace_low ^ batch.shared.batch_trace_high * np.uint64(_ODD)
    return np.where(batch.flags & _REMOTE, of_batch, keys)


def trace_key(trace_id: int) -> int:
    """Return that number of one trace."""
    return trace_id & _LOW ^ (trace_id >> 64) * _ODD & _LOW


class Arrived:
    """
    Rows of a batch that have come, and what is known of each. Times are nanoseconds of the records' clock.

    A step of the world's clock between two batches must not make a request longer.

    Args:
        batch: resolved stages, or light spans.
        keys: of the requests; 0 where one is not known.
        is_root: whether a row is the outermost stage of its request.
        offset_ns: by so much the times of the batch are later than the records'.

    """

    def __init__(
        self,
        batch: StageBatch,
        keys: NDArray[np.uint64],
        is_root: NDArray[np.bool_],
        offset_ns: NDArray[np.int64],
    ) -> None:
        self.batch, self.keys, self.is_root = batch, keys, is_root
        self.start_ns, self.ended_ns = batch.host_start_ns - offset_ns, batch.host_end_ns - offset_ns
        waited_ns = np.where(batch.flags & _GIVEN_UP, batch.uncertainty_ns, 0)
        self.done_ns = np.maximum(self.ended_ns + waited_ns, batch.gpu_end_ns - offset_ns)
        """On the host and on the GPU; where that was given up, the moment at which it was not done yet."""

    @classmethod
    def light(cls, batch: StageBatch) -> Arrived:
        """Return light spans, which have times since the epoch alone; nothing compares them with others."""
        count = len(batch.site)
        return cls(batch, np.zeros(count, np.uint64), np.zeros(count, np.bool_), np.zeros(count, np.int64))


class Groups:
    """
    Some rows of a batch, by their requests; each list or column has one item per request.

    Args:
        arrived: the rows of the batch.
        rows: which of them.

    """

    def __init__(self, arrived: Arrived, rows: NDArray[np.int64]) -> None:
        traces = trace_keys(arrived.batch)[rows]
        own = arrived.keys[rows]
        own = np.where(own == 0, traces, own)
        order = np.argsort(own, kind="stable")
        ordered = own[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        self.all_rows, self.first = rows[order], starts
        """The rows, request by request, and where each one's begin."""
        self.keys: list[int] = ordered[starts].tolist()
        self.traces: list[int] = traces[order[starts]].tolist()
        self.size = np.append(starts[1:], len(order)) - starts
        self.start_ns = np.minimum.reduceat(arrived.start_ns[self.all_rows], starts)
        self.root = np.full(len(starts), -1)
        """The row of the outermost stage; -1 where it is not among them."""
        roots = np.flatnonzero(arrived.is_root[self.all_rows])
        self.root[np.searchsorted(starts, roots, "right") - 1] = self.all_rows[roots]
        ended_ns, done_ns = arrived.ended_ns[self.all_rows], arrived.done_ns[self.all_rows]
        self.ended_ns = np.maximum.reduceat(ended_ns, starts)
        """When the last of the rows ended on the host."""
        until_ns = np.where(self.root < 0, _NEVER_NS, arrived.ended_ns[self.root])
        if (self.ended_ns > until_ns).any():
            done_ns = np.where(ended_ns > np.repeat(until_ns, self.size), 0, done_ns)
        self.end_ns = np.maximum.reduceat(done_ns, starts)
        """When all was done, without rows that outlived the outermost stage."""

    def __len__(self) -> int:
        """How many requests."""
        return len(self.keys)

    def of_rows(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return all rows of some requests."""
        return self.all_rows[np.repeat(chosen, self.size)]

    def place_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return whose some of the rows are."""
        order = np.argsort(self.all_rows)
        at = order[np.searchsorted(self.all_rows, rows, sorter=order)]
        return np.searchsorted(self.first, at, "right") - 1
