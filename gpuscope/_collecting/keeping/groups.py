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
_REMOTE = int(RowFlag.REMOTE_PARENT)


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


class Groups:
    """
    Some rows of a batch, by their requests; each list or column has one item per request.

    Args:
        batch: resolved stages, or light spans.
        rows: which of its rows.
        keys: of all its rows: of the request, or 0.
        is_root: of all its rows: whether it is a request's outermost stage.

    """

    def __init__(
        self, batch: StageBatch, rows: NDArray[np.int64], keys: NDArray[np.uint64], is_root: NDArray[np.bool_]
    ) -> None:
        traces = trace_keys(batch)[rows]
        own = keys[rows]
        own = np.where(own == 0, traces, own)
        order = np.argsort(own, kind="stable")
        ordered = own[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        self._rows, self._starts = rows[order], starts
        self._ends = np.append(starts[1:], len(order))
        self.keys: list[int] = ordered[starts].tolist()
        self.traces: list[int] = traces[order[starts]].tolist()
        ended = np.maximum(batch.host_end_ns, batch.gpu_end_ns)[self._rows]
        self.end_ns = np.maximum.reduceat(ended, starts)
        """Nanoseconds since the epoch, as the next."""
        self.start_ns = np.minimum.reduceat(batch.host_start_ns[self._rows], starts)
        self.root = np.full(len(starts), -1)
        """The row of the outermost stage; -1 where it is not among them."""
        roots = np.flatnonzero(is_root[self._rows])
        self.root[np.searchsorted(starts, roots, "right") - 1] = self._rows[roots]
        self.size = self._ends - starts

    def __len__(self) -> int:
        """How many requests."""
        return len(self.keys)

    def rows(self, place: int) -> NDArray[np.int64]:
        """Return the rows of one request."""
        return self._rows[self._starts[place] : self._ends[place]]

    def of_rows(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return all rows of some requests."""
        return self._rows[np.repeat(chosen, self.size)]

    def place_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return whose some of the rows are."""
        order = np.argsort(self._rows)
        at = order[np.searchsorted(self._rows, rows, sorter=order)]
        return np.searchsorted(self._starts, at, "right") - 1
