"""
Several runs of a program in the same files: processes that ran one after the other, told apart by time.

Processes that ran at the same time, as the workers of a server do, are one run. Judges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gpuscope.analysis._structure.kinds import end_to_end_ns
from gpuscope.analysis._structure.parts import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gpuscope.analysis.recording import Recording


@dataclass(frozen=True, eq=False)
class Run:
    """One run: some processes."""

    processes: tuple[int, ...]
    names: tuple[str, ...]
    start_ns: int
    """Since the epoch."""
    requests: int
    median_ms: float | None
    """Of its requests, if they are of one kind."""


def runs_of(recording: Recording) -> tuple[Run, ...]:
    """Return the runs, the earliest first."""
    process = _process(recording)
    end_ns = np.maximum(recording.host_end_ns, recording.gpu_end_ns)
    spans = [
        (int(recording.host_start_ns[rows].min()), int(end_ns[rows].max()), number)
        for number in range(len(recording.processes))
        if len(rows := np.flatnonzero(process == number))
    ]
    together: list[list[int]] = []
    until_ns = -1
    for start_ns, last_ns, number in sorted(spans):
        if not together or start_ns > until_ns:
            together.append([])
        together[-1].append(number)
        until_ns = max(until_ns, last_ns)
    return tuple(_run(recording, process, numbers) for numbers in together)


def _run(recording: Recording, process: NDArray[np.int64], numbers: list[int]) -> Run:
    rows = np.flatnonzero(np.isin(process, numbers))
    roots = rows[recording.parent[rows] < 0]
    alike = len(np.unique(recording.stage[roots])) == 1
    took_ns = end_to_end_ns(recording)[counted(recording, roots)]
    return Run(
        processes=tuple(numbers),
        names=tuple(recording.processes[number].name for number in numbers),
        start_ns=int(recording.host_start_ns[rows].min()),
        requests=len(roots),
        median_ms=float(np.median(took_ns)) / 1e6 if alike else None,
    )


def only(recording: Recording, run: Run) -> Recording:
    """Return the part of a recording that is of one run; what is missing from the files is not told by run."""
    rows = np.flatnonzero(np.isin(_process(recording), run.processes))
    place = np.full(len(recording.stage) + 1, -1)  # The last is for those without a parent.
    place[rows] = np.arange(len(rows))
    columns = ("stage", "thread", "stream", "host_start_ns", "host_end_ns", "gpu_start_ns", "gpu_end_ns")
    more = ("uncertainty_ns", "flags", "error", "samples", "had_work")
    return replace(
        recording,
        **{name: getattr(recording, name)[rows] for name in (*columns, *more)},
        parent=place[recording.parent[rows]],
        root=place[recording.root[rows]],
        trace_id=tuple(recording.trace_id[row] for row in rows.tolist()),
        span_id=tuple(recording.span_id[row] for row in rows.tolist()),
        gpus=tuple(each for each in recording.gpus if each.process in run.processes),
        looks=tuple(each for each in recording.looks if each.process in run.processes),
        attributes={int(place[row]): values for row, values in recording.attributes.items() if place[row] >= 0},
        batches=recording.batches.kept(place),
        stalls=recording.stalls.kept(place),
    )


def _process(recording: Recording) -> NDArray[np.int64]:
    """Return the process of each row: that of its request, so that no request is torn apart."""
    of_thread = np.array([thread.process for thread in recording.threads], np.int64)
    return of_thread[recording.thread[recording.root]]
