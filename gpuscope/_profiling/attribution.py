"""
Finds the stage of each CUDA call, and so of each piece of GPU work: the innermost one at the time of the call.

What counts is when and on which thread the work was launched, not when the GPU ran it. Relates; measures and judges
nothing.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from gpuscope._profiling.kineto import COPY

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gpuscope._profiling.kineto import Call, HostThread, Range, Trace, Work

WAITS = frozenset(
    {
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cuStreamSynchronize",
        "cuCtxSynchronize",
        "cuEventSynchronize",
        "cudaMemcpy",
        "cudaMemcpy2D",
        "cudaMemcpyToSymbol",
        "cudaMemcpyFromSymbol",
    }
)
"""CUDA calls that return when the GPU is done. `cudaStreamWaitEvent` lets a stream wait, not the host."""


@dataclass
class LinkedCall:
    """A CUDA call, the operator around it, and what it launched."""

    call: Call
    operator: Range | None
    """The innermost one."""
    outermost: str
    """Name of the outermost operator around it, as the program called it; without one, the name of the call."""
    work: list[Work] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Whether it returns when the GPU is done: by its name, or because the driver stages pageable memory."""
        return self.call.name in WAITS or any(each.kind == COPY and each.pageable for each in self.work)

    @property
    def launches(self) -> bool:
        """Whether its purpose is to launch kernels."""
        return "Launch" in self.call.name


@dataclass
class Run:
    """One run of a stage."""

    stage: Range
    parent: int
    """Index of the run around it, or -1."""
    root: int
    """Index of the outermost run around it; its own for an outermost one."""
    depth: int
    whole: bool
    """Whether all of it, and all of the runs around it, is in the trace."""
    calls: list[LinkedCall] = field(default_factory=list)
    """Its own calls, without those of runs inside it."""


@dataclass
class Attribution:
    """All runs of stages, by start on each thread, and the calls outside any stage."""

    runs: list[Run]
    outside: list[LinkedCall]
    unlaunched: int
    """Pieces of GPU work whose launch is not in the trace: launched before it began."""

    def within(self, index: int) -> Iterator[LinkedCall]:
        """Yield the calls of a run and of all runs inside it, which follow it in `runs`."""
        top = self.runs[index]
        yield from top.calls
        inside = {index}
        for number in range(index + 1, len(self.runs)):
            run = self.runs[number]
            if run.root != top.root:
                return
            if run.parent in inside:
                inside.add(number)
                yield from run.calls


def attribute(trace: Trace) -> Attribution:
    """Give every call to the innermost stage on its thread, and every piece of GPU work to its call."""
    runs = _runs(trace)
    linked = _linked_calls(trace)
    by_thread: dict[HostThread, list[int]] = defaultdict(list)
    for index, run in enumerate(runs):
        by_thread[run.stage.thread].append(index)
    outside: list[LinkedCall] = []
    for thread, calls in linked.items():
        indices = by_thread.get(thread, [])
        places = _innermost([runs[index].stage for index in indices], [each.call for each in calls])
        for each, place in zip(calls, places, strict=True):
            (runs[indices[place]].calls if place >= 0 else outside).append(each)
    launched = sum(len(each.work) for calls in linked.values() for each in calls)
    return Attribution(runs, outside, len(trace.work) - launched)


def _runs(trace: Trace) -> list[Run]:
    runs: list[Run] = []
    for ranges in _by_thread(trace.stages).values():
        open_runs: list[int] = []
        for stage in ranges:
            while open_runs and runs[open_runs[-1]].stage.end_ns <= stage.start_ns:
                open_runs.pop()
            index, parent = len(runs), open_runs[-1] if open_runs else -1
            # A stage that is outermost here but never was in the program lost the one around it, which began earlier.
            whole = stage.finished and (
                runs[parent].whole if parent >= 0 else trace.requests is None or stage.name in trace.requests
            )
            root = runs[parent].root if parent >= 0 else index
            runs.append(Run(stage, parent, root, runs[parent].depth + 1 if parent >= 0 else 0, whole))
            open_runs.append(index)
    return runs


def _linked_calls(trace: Trace) -> dict[HostThread, list[LinkedCall]]:
    work: dict[int, list[Work]] = defaultdict(list)
    for each in trace.work:
        work[each.correlation].append(each)
    operators, found = _by_thread(trace.operators), {}
    for thread, calls in _by_thread(trace.calls).items():
        around = operators.get(thread, [])
        inner, outer = _innermost(around, calls), _innermost(_outermost(around), calls)
        tops = _outermost(around)
        found[thread] = [
            LinkedCall(
                call,
                around[low] if low >= 0 else None,
                tops[high].name if high >= 0 else call.name,
                work.pop(call.correlation, []) if call.correlation >= 0 else [],
            )
            for call, low, high in zip(calls, inner, outer, strict=True)
        ]
    return found


Placed = TypeVar("Placed", "Range", "Call")


def _by_thread(ranges: Iterable[Placed]) -> dict[HostThread, list[Placed]]:
    """Return ranges or calls by thread, each in order of start, the longer first."""
    found: dict[HostThread, list[Placed]] = defaultdict(list)
    for each in sorted(ranges, key=lambda one: (one.start_ns, -one.end_ns)):
        found[each.thread].append(each)
    return found


def _outermost(ranges: Sequence[Range]) -> list[Range]:
    found: list[Range] = []
    for each in ranges:
        if not found or each.start_ns >= found[-1].end_ns:
            found.append(each)
    return found


def _innermost(ranges: Sequence[Range], calls: Sequence[Call]) -> list[int]:
    """Return for each call the index of the range that was entered last of those around it, or -1; both in order."""
    places, open_ranges, following = [], [], 0
    for call in calls:
        while following < len(ranges) and ranges[following].start_ns <= call.start_ns:
            open_ranges.append(following)
            following += 1
        open_ranges = [index for index in open_ranges if ranges[index].end_ns > call.start_ns]
        places.append(open_ranges[-1] if open_ranges else -1)
    return places
