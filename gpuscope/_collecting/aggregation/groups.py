"""
A batch split by stage and kind of request: columns in, columns out.

Arithmetic alone; remembers nothing, and never visits a row in Python but to tell recursion from requests.
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
WARMUP, _IN_GRAPH = int(RowFlag.WARMUP), int(RowFlag.IN_GRAPH)


class Group(NamedTuple):
    """The rows of a batch that are calls of one stage within one kind of request, warm-up or not."""

    warmup: bool
    row: int
    """The first of its rows in the batch."""
    block: NDArray[np.float64]
    """Three rows, `HOST`, `GPU` and `DELAY`, one column a call; not a number where there is no such part."""
    host_ms: float
    gpu_ms: float
    requests: int
    """How many of the calls are whole requests; 0 unless the stage is a root."""
    requests_ms: float


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
    """Return the block of all rows in the order asked for, and the host and GPU sums of each group."""
    block = np.empty((3, len(order)))
    host_start_ns = batch.host_start_ns
    block[HOST] = (batch.host_end_ns - host_start_ns)[order]
    block[GPU] = (batch.gpu_end_ns - batch.gpu_start_ns)[order]
    block[DELAY] = (batch.gpu_start_ns - host_start_ns)[order]
    block /= 1e6
    replayed = np.flatnonzero(batch.flags[order] & _IN_GRAPH)
    block[HOST, replayed] = 0.0
    # Both times are 0 without a GPU part, so the sum needs no mask; percentiles do.
    sums = np.add.reduceat(block[: GPU + 1], starts, axis=1).tolist()
    block[GPU:, batch.gpu_end_ns[order] == 0] = np.nan
    # A stage inside a replay has no time on the host, and no launch of its own.
    block[HOST, replayed] = block[DELAY, replayed] = np.nan
    return block, sums


def _inside_themselves(batch: StageBatch, rows: NDArray[np.int64]) -> list[int]:
    """Return which calls of a root stage are inside another call of it, as far as this batch shows."""
    parents = batch.parent_id[rows]
    if not parents.any():
        return []
    # A parent that is not among these spans is the application's, which batches do not hold. Recursion whose
    # outer call comes in a later batch is taken for two requests: rare, and cheaper than remembering spans.
    spans = set(batch.span_id.tolist())
    return [index for index, parent in enumerate(parents.tolist()) if parent in spans]
