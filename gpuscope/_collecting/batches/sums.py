"""
Members of many batches in turn: their waits and shares are summed, and each gets one light span once all is known.

A generation is complete when it has ended and all batches that it joined have come; one that has lost some is let go
after a while, with what there is. Visits members in Python: some 2 µs per generation and batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gpuscope._data.attributes import (
    BATCH_STEPS,
    DECODE_SHARE,
    GPU_FIRST_TOKEN,
    GPU_PER_TOKEN,
    PREFILL_SHARE,
)
from gpuscope._data.batch import FinishedGeneration, RowFlag, SharedColumns, SpanDetails, StageBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from gpuscope._data.batch import DeviceInfo
    from gpuscope._data.record import Site, ThreadInfo
    from gpuscope._recording.batches.account import Faults
    from gpuscope._recording.batches.summed import Summed

_GPU_BIT = 1 << 63
_SHARED, _REMOTE, _UNPLACED = int(RowFlag.SHARED), int(RowFlag.REMOTE_PARENT), int(RowFlag.UNPLACED)
_MOST = 8192
"""Generations that are summed at one time, bounded in case a program ends none: the oldest are let go."""
_LOST = "a generation has lost %d of its %d steps; what there is of the others is exported."
_TOO_MANY = "more than %d generations are open; call `end()` of each. The oldest are not exported."


class Joined(NamedTuple):
    """One batch, as a member of it sees it: the row of its stage, and where the member is in it."""

    batch: StageBatch
    row: int
    site: Site
    """Of the light span."""
    size: int
    position: int
    share_ns: int
    began_ns: int
    """On the records' clock."""


class MemberIds(NamedTuple):
    """A member's span, and whether its trace is exported."""

    trace_high: int
    trace_low: int
    span_id: int
    kept: bool
    remote: bool
    state: str | None


class _Sum:
    """The batches of one member so far. Times are since the epoch."""

    def __init__(self, summed: Summed, ids: MemberIds, joined: Joined) -> None:
        batch, row = joined.batch, joined.row
        self.summed, self.ids, self.site, self.position = summed, ids, joined.site, joined.position  # Not the batch.
        self.thread: ThreadInfo = batch.threads[batch.thread[row]]
        self.device = int(batch.device[row])
        self.device_info: DeviceInfo | None = batch.devices.get(self.device)
        self.stream = int(batch.stream[row])
        self.batch_ids = int(batch.trace_high[row]), int(batch.trace_low[row]), int(batch.span_id[row])
        self.token_ns = int(batch.host_start_ns[row]) - (joined.began_ns - summed.token.time_ns)
        self.start_ns, self.end_ns = int(batch.host_start_ns[row]), 0
        self.gpu_start_ns = self.gpu_end_ns = self.done_ns = self.uncertainty_ns = 0
        self.in_batches_ns = self.seen = self.size = self.flags = 0
        self.prefill_ns = self.decode_ns = self.first_ns = 0
        self.undecided: list[tuple[int, int, int]] = []
        """Which batch, the share of it, and when it was done, while it is not known which makes the first token."""
        self.overdue_ns = 0

    def add(self, joined: Joined, step: int) -> None:
        batch, row = joined.batch, joined.row
        start_ns, end_ns = int(batch.host_start_ns[row]), int(batch.host_end_ns[row])
        gpu_start_ns, gpu_end_ns = int(batch.gpu_start_ns[row]), int(batch.gpu_end_ns[row])
        flags = int(batch.flags[row])
        self.start_ns, self.end_ns = min(self.start_ns, start_ns), max(self.end_ns, end_ns)
        if gpu_end_ns:
            self.gpu_start_ns = min(self.gpu_start_ns or gpu_start_ns, gpu_start_ns)
            self.gpu_end_ns = max(self.gpu_end_ns, gpu_end_ns)
            self.uncertainty_ns = max(self.uncertainty_ns, int(batch.uncertainty_ns[row]))
        done_ns = gpu_end_ns if gpu_end_ns and not flags & _UNPLACED else end_ns
        self.done_ns = max(self.done_ns, done_ns)
        self.in_batches_ns += end_ns - start_ns
        self.seen, self.size = self.seen + 1, max(self.size, joined.size)
        self.flags |= flags & ~_REMOTE
        self.undecided.append((step, joined.share_ns, done_ns))
        if self.summed.first_step is not None:
            self._decide()

    def _decide(self) -> None:
        """Tell prefill and decode apart, now that it is known which batch makes the first token."""
        first = self.summed.first_step
        for step, share_ns, done_ns in self.undecided:
            if first is None or step <= first:
                self.prefill_ns += share_ns
                self.first_ns = max(self.first_ns, done_ns)
            else:
                self.decode_ns += share_ns
        self.undecided.clear()

    def close(self) -> None:
        """Say of what has no token that all of it was prefill."""
        self._decide()

    @property
    def wait_s(self) -> float:
        """In no batch, from the token to the end of the last one."""
        return max(0, self.end_ns - self.token_ns - self.in_batches_ns) / 1e9

    def details(self) -> SpanDetails:
        said: dict[str, object] = {BATCH_STEPS: self.seen}
        if self.gpu_end_ns:
            said |= {PREFILL_SHARE: self.prefill_ns, DECODE_SHARE: self.decode_ns, **self._times_on_gpu()}
        return SpanDetails(said, trace_state=self.ids.state)

    def finished(self) -> FinishedGeneration:
        """Return what metrics are made of."""
        summed, ids = self.summed, self.ids
        link = (ids.trace_high << 64 | ids.trace_low, ids.span_id) if ids.kept else None
        end_ns = max(self.done_ns, self.end_ns)
        times_s = summed.times_s() | (self._times_on_gpu() if self.gpu_end_ns else {})
        return FinishedGeneration(dict(summed.told), summed.error_type, self.token_ns, end_ns, times_s, link)

    def _times_on_gpu(self) -> dict[str, float]:
        found, tokens = {}, self.summed.tokens
        if tokens:
            found[GPU_FIRST_TOKEN] = max(0, self.first_ns - self.token_ns) / 1e9
        if tokens > 1:
            found[GPU_PER_TOKEN] = max(0, self.done_ns - self.first_ns) / 1e9 / (tokens - 1)
        return found


class Sums:
    """
    The members of many batches that have not ended, or not come whole.

    Args:
        faults: counts those that lose some.
        clock: nanoseconds, monotonic.
        patience_ns: so long an ended one waits for batches that have not come.

    """

    def __init__(self, faults: Faults, clock: Callable[[], int], patience_ns: int) -> None:
        self._faults, self._clock, self._patience_ns = faults, clock, patience_ns
        self._open: dict[int, _Sum] = {}
        """By the member's identity, which the sum keeps alive."""

    def __len__(self) -> int:
        """How many there are."""
        return len(self._open)

    def add(self, summed: Summed, step: int, ids: MemberIds, joined: Joined) -> None:
        """Take in one batch that a member has joined."""
        if id(summed) not in self._open:
            if len(self._open) >= _MOST:
                self._faults.note("open_generations", _TOO_MANY, _MOST)
                del self._open[next(iter(self._open))]
            self._open[id(summed)] = _Sum(summed, ids, joined)
        self._open[id(summed)].add(joined, step)

    def take(self, first_id: int) -> tuple[StageBatch | None, list[FinishedGeneration]]:
        """
        Return the light spans of what is complete, and what metrics are made of; it is forgotten here.

        Args:
            first_id: the span id of the first light span; the others follow.

        """
        done = [each for each in self._open.values() if each.summed.ended and self._is_whole(each)]
        for each in done:
            each.close()
            del self._open[id(each.summed)]
        kept = [each for each in done if each.ids.kept and each.ids.span_id]
        return (_light(kept, first_id) if kept else None), [each.finished() for each in done if each.summed.told]

    def unfinished(self) -> int:
        """Return how many light spans are still to come."""
        return sum(each.ids.kept for each in self._open.values())

    def _is_whole(self, one: _Sum) -> bool:
        if one.seen >= one.summed.steps:
            return True
        one.overdue_ns = one.overdue_ns or self._clock() + self._patience_ns
        if self._clock() < one.overdue_ns:
            return False
        self._faults.note("missing_steps", _LOST, one.summed.steps - one.seen, one.summed.steps)
        return True


def _light(sums: list[_Sum], first_id: int) -> StageBatch:
    """Return one light span each, with the times from the first to the last of its batches."""

    def column(values: Iterator[object], kind: type[np.generic]) -> NDArray[Any]:
        return np.array([*values], kind)

    sites, threads = dict[object, int](), dict[object, int]()
    site = column((sites.setdefault(each.site, len(sites)) for each in sums), np.int32)
    span_id = np.arange(first_id, first_id + len(sums), dtype=np.uint64)
    on_gpu = column((each.gpu_end_ns != 0 for each in sums), np.bool_)
    return StageBatch(
        thread=column((threads.setdefault(each.thread, len(threads)) for each in sums), np.int32),
        sites=tuple(sites),  # type: ignore[arg-type]  # Sites.
        threads=tuple(threads),  # type: ignore[arg-type]  # Threads.
        devices={each.device: each.device_info for each in sums if each.device_info is not None},
        site=site,
        root=site,
        trace_high=column((each.ids.trace_high for each in sums), np.uint64),
        trace_low=column((each.ids.trace_low for each in sums), np.uint64),
        span_id=span_id,
        parent_id=column((each.ids.span_id for each in sums), np.uint64),
        gpu_span_id=np.where(on_gpu, span_id ^ np.uint64(_GPU_BIT), np.uint64(0)),
        sampled=np.ones(len(sums), np.bool_),
        host_start_ns=column((each.start_ns for each in sums), np.int64),
        host_end_ns=column((each.end_ns for each in sums), np.int64),
        gpu_start_ns=column((each.gpu_start_ns for each in sums), np.int64),
        gpu_end_ns=column((each.gpu_end_ns for each in sums), np.int64),
        uncertainty_ns=column((each.uncertainty_ns for each in sums), np.int64),
        device=column((each.device if each.gpu_end_ns else -1 for each in sums), np.int32),
        stream=column((each.stream for each in sums), np.uint64),
        flags=column((each.flags | _SHARED | _REMOTE * each.ids.remote for each in sums), np.uint32),
        details={row: each.details() for row, each in enumerate(sums)},
        shared=SharedColumns(
            size=column((each.size for each in sums), np.int64),
            position=column((each.position for each in sums), np.int64),
            wait_s=column((each.wait_s for each in sums), np.float64),
            share_ns=column((each.prefill_ns + each.decode_ns for each in sums), np.int64),
            batch_trace_high=column((each.batch_ids[0] for each in sums), np.uint64),
            batch_trace_low=column((each.batch_ids[1] for each in sums), np.uint64),
            batch_span_id=column((each.batch_ids[2] for each in sums), np.uint64),
        ),
    )
