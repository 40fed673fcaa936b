"""
A batch split by stage and kind of request: columns in, columns out.

Arithmetic only. Remembers nothing, and never visits a row in Python, except to tell recursion from requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope._data.batch import RowFlag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from gpuscope._data.batch import StageBatch

HOST, GPU, DELAY = range(3)
"""Rows of a block: host duration, GPU duration, and launch to start, in milliseconds."""
WARMUP, _IN_GRAPH, _UNPLACED = int(RowFlag.WARMUP), int(RowFlag.IN_GRAPH), int(RowFlag.UNPLACED)


class Group(NamedTuple):
    """The rows of a batch that are calls of one stage in one kind of request: its warm-up calls, or the others."""

    warmup: bool
    row: int
    """The first of its rows in the batch."""
    block: NDArray[np.float64]
    """Three rows, `HOST`, `GPU` and `DELAY`, one column per call; not a number where a call has no such part."""
    host_ms: float
    """Sum over the calls."""
    gpu_ms: float
    """Sum over the calls; those without a GPU part add nothing."""
    requests: int
    """How many of the calls are whole requests; 0 unless the stage is a root."""
    requests_ms: float
    """Host time of those."""


def split(batch: StageBatch) -> Iterator[Group]:
    """Yield the groups of a batch that has rows."""
    sites = len(batch.sites)
    codes = (batch.site.astype(np.int64) * sites + batch.root) * 2 + (batch.flags & WARMUP)
    order = codes.argsort(kind="stable")
    codes = codes[order]
    ends = [*(np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist(), len(codes)]
    starts = [0, *ends[:-1]]
    block, sums = _durations(batch, order, starts)
    for code, row, start, end, host_ms, gpu_ms in zip(
        codes[starts].tolist(), order[starts].tolist(), starts, ends, *sums, strict=True
    ):
        pair, warmup = divmod(code, 2)
        requests = 0, 0.0
        if pair // sites == pair % sites:
            requests = end - start, host_ms
            inner = _inside_themselves(batch, order[start:end])
            if inner:
                requests = end - start - len(inner), host_ms - float(block[HOST, start:end][inner].sum())
        yield Group(warmup == 1, row, block[:, start:end], host_ms, gpu_ms, *requests)


def _durations(
    batch: StageBatch, order: NDArray[np.int64], starts: list[int]
) -> tuple[NDArray[np.float64], list[list[float]]]:
    """Return the block of all rows in the given order, and the host and the GPU sum of each group."""
    block = np.empty((3, len(order)))
    host_start_ns = batch.host_start_ns
    block[HOST] = (batch.host_end_ns - host_start_ns)[order]
    block[GPU] = (batch.gpu_end_ns - batch.gpu_start_ns)[order]
    block[DELAY] = (batch.gpu_start_ns - host_start_ns)[order]
    block /= 1e6
    replayed = np.flatnonzero(batch.flags[order] & _IN_GRAPH)
    block[HOST, replayed] = 0.0
    # Without a GPU part both GPU times are 0, so the sums need no mask. Percentiles do.
    sums = np.add.reduceat(block[: GPU + 1], starts, axis=1).tolist()
    block[GPU:, batch.gpu_end_ns[order] == 0] = np.nan
    # A stage inside a replay has no host time and no launch of its own.
    block[HOST, replayed] = block[DELAY, replayed] = np.nan
    block[DELAY, np.flatnonzero(batch.flags[order] & _UNPLACED)] = np.nan
    return block, sums


def _inside_themselves(batch: StageBatch, rows: NDArray[np.int64]) -> list[int]:
    """Return which calls of a root stage are inside another call of the same stage, as far as this batch shows."""
    parents = batch.parent_id[rows]
    if not parents.any():
        return []
    # A parent that is not among these spans belongs to the application; batches do not hold its spans. Recursion whose
    # outer call comes in a later batch is taken for two requests, which is rare, and cheaper than remembering spans.
    spans = set(batch.span_id.tolist())
    return [index for index, parent in enumerate(parents.tolist()) if parent in spans]
