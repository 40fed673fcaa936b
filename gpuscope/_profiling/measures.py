"""
Measures where the time of each stage goes: unions of intervals of GPU work, against what the host did meanwhile.

Adds up; judges nothing. Times are nanoseconds, summed over a stage's calls. A call's *window* is from its start on the
host to the end of all its work.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope._profiling.attribution import attribute
from gpuscope._profiling.kineto import COPY
from gpuscope.analysis._structure.intervals import Intervals, covered, gaps, intersection, length, union

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpuscope._profiling.attribution import LinkedCall
    from gpuscope._profiling.kineto import Call, HostThread, Range, Trace, Work


STAGED_BYTES = 2**16
"""
Up to this size a copy from pageable memory may return once the driver has staged it. Source: CUDA Runtime API, "API
synchronization behavior".
"""


ON_THE_WAY_NS = 20_000
"""What lies between two launches that are not farther apart is Python's way from one to the next, and is theirs."""


class StageInRequest(NamedTuple):
    """A stage within a kind of request."""

    root: str
    name: str
    depth: int


class Times(NamedTuple):
    """The sum of a stage's windows, and the parts of it."""

    window: int
    host: int
    compute: int
    """The GPU computes, whichever stage launched that."""
    transfer: int
    """It copies between host and GPU, and nothing else."""
    dispatch: int
    """It has nothing to do while the host calls CUDA or an operator that does, or when the host has gone on."""
    sync: int
    """It has nothing to do while the host is in a call that waits."""
    host_only: int
    """It has nothing to do while the host does something else."""
    computing: int
    """The part of that in which the host is in operators of PyTorch, which compute on the host."""
    wait: int
    """The host waits while the GPU computes: a part of `compute`, as `copy_wait` is of `transfer`."""
    copy_wait: int
    """The host waits while the GPU only copies."""


@dataclass(frozen=True)
class _Host:
    """What one thread of the host did."""

    waiting: Intervals
    """Calls that return when the GPU is done."""
    around: Intervals
    """
    The innermost operators around the waiting calls, such as `aten::_local_scalar_dense`, which exist only to wait.
    Operators that copy to the GPU are not among them: making a tensor is work, and waiting only a part of it.
    """
    launching: Intervals
    """
    CUDA calls, and the outermost operators that make one: the host works for the GPU. So it does on the way from one to
    the next, where that is short.
    """
    computing: Intervals
    """All other operators: the host computes itself, in PyTorch."""


class Measures:
    """A trace, added up by stage."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.attribution = attribute(trace)
        self.runs = self.attribution.runs
        self.compute = _union(work for work in trace.work if work.kind != COPY)
        self._linked = [*self.attribution.outside, *(each for run in self.runs for each in run.calls)]
        self.busy = _union([*trace.work, *(each.call for each in self._linked if _is_staged(each))])
        calls: dict[HostThread, list[LinkedCall]] = defaultdict(list)
        for each in self._linked:
            calls[each.call.thread].append(each)
        self._hosts = {
            thread: _host(thread, calls[thread], trace) for thread in {run.stage.thread for run in self.runs}
        }

    @cached_property
    def kinds(self) -> dict[StageInRequest, list[int]]:
        """The runs of each stage that are wholly in the trace, by index."""
        found: dict[StageInRequest, list[int]] = defaultdict(list)
        for index, run in enumerate(self.runs):
            if run.whole and self.runs[run.root].whole:
                found[StageInRequest(self.runs[run.root].stage.name, run.stage.name, run.depth)].append(index)
        return found

    @cached_property
    def calls(self) -> dict[StageInRequest, list[LinkedCall]]:
        """The CUDA calls in each stage, including those of stages inside it."""
        return {
            kind: [each for index in indices for each in self.attribution.within(index)]
            for kind, indices in self.kinds.items()
        }

    def times(self, kind: StageInRequest) -> Times:
        """Return where the time of a stage goes."""
        total = np.zeros(len(Times._fields), np.int64)
        for thread, indices in self._by_thread(kind).items():
            total += self._times_on(thread, indices)
        return Times(*total.tolist())

    def by_request(self, kind: StageInRequest) -> list[tuple[int, int]]:
        """Return for each request the stage's windows in it, and for how much of them the GPU worked."""
        found: dict[int, list[int]] = defaultdict(list)
        for index in self.kinds[kind]:
            found[self.runs[index].root].append(index)
        times = [Times(*self._times_on(self.runs[each[0]].stage.thread, each)) for each in found.values()]
        return [(each.window, each.compute + each.transfer) for each in times]

    def _by_thread(self, kind: StageInRequest) -> dict[HostThread, list[int]]:
        found: dict[HostThread, list[int]] = defaultdict(list)
        for index in self.kinds[kind]:
            found[self.runs[index].stage.thread].append(index)
        return found

    def _times_on(self, thread: HostThread, indices: Sequence[int]) -> Sequence[int]:
        host, tail, on = (
            self._hosts[thread],
            self._tails(indices),
            _intervals(self.runs[index].stage for index in indices),
        )
        busy, compute = _sum(on, self.busy), _sum(on, self.compute)
        tail_ns = int((tail.end - tail.start).sum())
        tail_busy, tail_compute = _sum(tail, self.busy), _sum(tail, self.compute)
        host_ns = int((on.end - on.start).sum())
        sync = _idle(on, host.around, self.busy)
        waiting = intersection(host.waiting, self.busy)
        wait = _sum(on, intersection(waiting, self.compute))
        dispatch = _idle(on, union(_both(host.launching, host.around)), self.busy) - sync
        host_only = host_ns - busy - sync - dispatch
        return (
            host_ns + tail_ns,
            host_ns,
            compute + tail_compute,
            busy - compute + tail_busy - tail_compute,
            dispatch + tail_ns - tail_busy,
            sync,
            host_only,
            min(host_only, _idle(on, host.computing, self.busy)),
            wait,
            _sum(on, waiting) - wait,
        )

    def _tails(self, indices: Sequence[int]) -> Intervals:
        """Return for each run the time from its end on the host to the end of all its work, if that is later."""
        starts = np.array([self.runs[index].stage.end_ns for index in indices], np.int64)
        ends = [
            max((work.end_ns for call in self.attribution.within(i) for work in call.work), default=0) for i in indices
        ]
        return Intervals(starts, np.maximum(starts, np.array(ends, np.int64)))

    def gaps(self, kind: StageInRequest) -> int:
        """
        Return how often the GPU ran out of work within the stage's windows.

        That is a gap before work that was launched when all before it was done. A GPU with a full queue has gaps, too:
        between any two kernels.
        """
        runs = self.kinds[kind]
        tails, found, between = self._tails(runs), 0, self._ran_out
        for index, end_ns in zip(runs, tails.end.tolist(), strict=True):
            start_ns = self.runs[index].stage.start_ns
            found += int(((between.start >= start_ns) & (between.end <= end_ns)).sum())
        return found

    @cached_property
    def _ran_out(self) -> Intervals:
        between = gaps(self.busy)
        began = {work.start_ns: each.call.end_ns for each in self._linked for work in each.work}
        launched_ns = np.array([began.get(end_ns, end_ns) for end_ns in between.end.tolist()], np.int64)
        late = launched_ns > between.start
        return Intervals(between.start[late], between.end[late])

    def waits_for(self, kind: StageInRequest) -> tuple[str | None, int]:
        """Return the other stage whose kernels the host waits for longest, and the time it waits for all others."""
        own = self._kernels(self.calls[kind])
        by_stage: Counter[str] = Counter()
        for other in self.kinds:
            if other.root == kind.root and other.name != kind.name and other.depth and not self._nested(kind, other):
                by_stage[other.name] += self._waits_within(kind, self._kernels(self.calls[other]))
        everything = self._waits_within(kind, self.compute) - self._waits_within(kind, own)
        name, ns = by_stage.most_common(1)[0] if by_stage else (None, 0)
        return (name if ns else None), everything

    def _nested(self, one: StageInRequest, other: StageInRequest) -> bool:
        """Whether a run of either stage is inside a run of the other, at any depth."""
        for inner, outer in ((one, other), (other, one)):
            around = set(self.kinds[outer])
            for index in self.kinds[inner]:
                parent = self.runs[index].parent
                while parent >= 0:
                    if parent in around:
                        return True
                    parent = self.runs[parent].parent
        return False

    def _waits_within(self, kind: StageInRequest, work: Intervals) -> int:
        return sum(
            _sum(_intervals(self.runs[i].stage for i in indices), intersection(self._hosts[thread].waiting, work))
            for thread, indices in self._by_thread(kind).items()
        )

    def _kernels(self, calls: Iterable[LinkedCall]) -> Intervals:
        return _union(work for each in calls for work in each.work if work.kind != COPY)

    def kernel_ns(self, kind: StageInRequest) -> int:
        """Return the time in which at least one of the stage's kernels runs."""
        return length(self._kernels(self.calls[kind]))

    def between(self, root: str) -> tuple[int, int]:
        """Return the time between requests in which the GPU has nothing to do, and the time from start to start."""
        idle_ns = total_ns = 0
        for thread in self._hosts:
            runs = [run.stage for run in self.runs if run.parent < 0 and run.stage.thread == thread]
            for one, other in itertools.pairwise(runs):
                if one.name == other.name == root and other.start_ns >= one.end_ns:
                    gap = Intervals(np.array([one.end_ns]), np.array([other.start_ns]))
                    idle_ns += other.start_ns - one.end_ns - _sum(gap, self.busy)
                    total_ns += other.start_ns - one.start_ns
        return idle_ns, total_ns


def _is_staged(each: LinkedCall) -> bool:
    """Whether the driver copies it through pinned memory piece by piece, so that the whole call is the copy."""
    return any(work.pageable and work.bytes > STAGED_BYTES for work in each.work)


def _host(thread: HostThread, calls: Sequence[LinkedCall], trace: Trace) -> _Host:
    waiting = [each for each in calls if each.waits]
    sending = {each.operator for each in calls if any(work.direction == "HtoD" for work in each.work)}
    around = [each.operator or each.call for each in waiting if each.operator is None or each.operator not in sending]
    tops = _union(each for each in trace.operators if each.thread == thread)
    # An operator that only asks something of CUDA, and launches nothing, is not work for the GPU.
    made = _union(each.call for each in calls)
    used = covered(tops, made) > 0
    return _Host(
        waiting=_union(each.call for each in waiting),
        around=_union(around),
        launching=_with_ways(union(_both(Intervals(tops.start[used], tops.end[used]), made))),
        computing=Intervals(tops.start[~used], tops.end[~used]),
    )


def _with_ways(launching: Intervals) -> Intervals:
    ways = gaps(launching)
    short = ways.end - ways.start <= ON_THE_WAY_NS
    return union(_both(launching, Intervals(ways.start[short], ways.end[short])))


def _both(one: Intervals, other: Intervals) -> Intervals:
    return Intervals(np.concatenate([one.start, other.start]), np.concatenate([one.end, other.end]))


def _intervals(of: Iterable[Range | Call | Work]) -> Intervals:
    both = np.array([(each.start_ns, each.end_ns) for each in of], np.int64).reshape(-1, 2)
    return Intervals(both[:, 0], both[:, 1])


def _union(of: Iterable[Range | Call | Work]) -> Intervals:
    return union(_intervals(of))


def _sum(intervals: Intervals, by: Intervals) -> int:
    return int(covered(intervals, by).sum())


def _idle(intervals: Intervals, during: Intervals, busy: Intervals) -> int:
    """Return how much of the intervals is `during` something and not `busy`."""
    return _sum(intervals, during) - _sum(intervals, intersection(during, busy))
