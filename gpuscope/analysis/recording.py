"""
`Recording`: the stages of one or many files, as columns. It is all that reports see.

Says what each row is, once for all reports; neither reads files nor judges. It is like a `StageBatch`, but of whole
files, with the tree of stages, and of several processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gpuscope._data.batch import RowFlag
from gpuscope._data.statistics import NOT_KEPT
from gpuscope.analysis._reading.stalls import Stalls
from gpuscope.analysis._structure.ancestors import ancestors
from gpuscope.analysis._structure.batches import Batches

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gpuscope._data.plain.gpu_use import GpuUse
    from gpuscope._data.statistics import LookedStage

_UNMEASURED = RowFlag.CAPTURED | RowFlag.CLAMPED | RowFlag.GIVEN_UP
"""Flags of rows whose GPU times are absent, or not where they seem to be."""


class Process(NamedTuple):
    """One process that recorded: its resource attributes say which."""

    name: str
    """For people: the service's name, with process id and host where there are several."""
    resource: Mapping[str, object]


class Thread(NamedTuple):
    """A host thread of a process."""

    process: int
    """Index into `Recording.processes`."""
    ident: int
    name: str


class Stream(NamedTuple):
    """A CUDA stream of a process on a device."""

    process: int
    """Index into `Recording.processes`."""
    device: int
    """The process's index of the device; the uuid says which GPU that is."""
    device_name: str
    device_uuid: str
    handle: int
    """The stream's raw handle; 0 is the default stream."""


class WatchedGpu(NamedTuple):
    """What NVML said of a GPU while one process recorded."""

    process: int
    """Index into `Recording.processes`."""
    use: GpuUse


class Looked(NamedTuple):
    """What deep looks saw of a stage of one process."""

    process: int
    """Index into `Recording.processes`."""
    stage: LookedStage


@dataclass(frozen=True, slots=True)
class Losses:
    """What is missing: lines that could not be read, and stages that never reached the files."""

    skipped_lines: Mapping[str, int] = field(default_factory=dict)
    """By reason: lines that are `truncated`, `foreign` or `malformed`; and, in lines that could be read,
    `foreign spans`, `malformed spans` and `GPU spans without a host span`."""
    orphans: int = 0
    """Stages whose parent was a stage of ours, but is not in the files."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason, from the last account of each process: stages not to be exported, or refused by a full queue."""
    lost: Mapping[str, int] = field(default_factory=dict)
    """By reason: stages that should have been exported and were not."""
    untimed: Mapping[str, int] = field(default_factory=dict)
    """By reason: stages that were exported without GPU times though a GPU was in use."""

    @property
    def not_kept(self) -> int:
        """Stages of the requests that `keep` has left out, as it should: they are not missing."""
        return self.dropped.get(NOT_KEPT, 0)

    def missing(self) -> Losses:
        """Return the same without the stages of requests that `keep` has left out."""
        return replace(self, dropped={why: stages for why, stages in self.dropped.items() if why != NOT_KEPT})

    @property
    def not_kept_alone(self) -> int:
        """How many stages `keep` has left out, where nothing else is missing; else 0."""
        others = self.lost or self.orphans or self.skipped_lines or self.dropped.keys() != {NOT_KEPT}
        return 0 if others else self.dropped[NOT_KEPT]


@dataclass(frozen=True, eq=False)
class Recording:
    """
    Resolved stages as columns of one length `n`, ordered by host start. Times are nanoseconds since the epoch.

    No host or GPU part ends before it begins: reading refuses such spans. A stage may still begin before the one around
    it, or end after it.

    A row without a GPU part has `stream` -1 and GPU times 0. A stage inside a replay of a CUDA graph (`IN_GRAPH`) has
    no host part: both its host times are the launch of the replay, and one of the stages around it has a host part.

    Masks over the rows, and their callers, are worked out when they are first asked for, and kept. Nobody may write
    into one.
    """

    names: tuple[str, ...]
    """Stage names."""
    processes: tuple[Process, ...]
    threads: tuple[Thread, ...]
    streams: tuple[Stream, ...]
    stage: NDArray[np.int32]
    """Index into `names`."""
    thread: NDArray[np.int32]
    """Index into `threads`."""
    stream: NDArray[np.int32]
    """Index into `streams`, or -1."""
    parent: NDArray[np.int64]
    """Row of the enclosing stage, or -1."""
    root: NDArray[np.int64]
    """Row of the outermost enclosing stage, itself for a root: the request that a stage belongs to."""
    host_start_ns: NDArray[np.int64]
    host_end_ns: NDArray[np.int64]
    gpu_start_ns: NDArray[np.int64]
    gpu_end_ns: NDArray[np.int64]
    uncertainty_ns: NDArray[np.int64]
    """Of the GPU times' place on the wall clock, plus or minus."""
    flags: NDArray[np.uint32]
    """`RowFlag` bits."""
    error: NDArray[np.bool_]
    """Whether an exception left the stage."""
    samples: NDArray[np.int64]
    """How often its stream was asked for work while the stream was in this stage and in none inside it; mostly 0."""
    had_work: NDArray[np.int64]
    """How many of these answers found work queued or running."""
    trace_id: tuple[str, ...]
    """Hexadecimal, one per row."""
    span_id: tuple[str, ...]
    attributes: Mapping[int, Mapping[str, object]]
    """The application's own attributes by row, where there are any."""
    losses: Losses = field(default_factory=Losses)
    gpus: tuple[WatchedGpu, ...] = ()
    """Each GPU that NVML was asked about, once for each process that did."""
    looks: tuple[Looked, ...] = ()
    """What deep looks saw of each stage that were taken now and then, once for each process."""
    batches: Batches = field(default_factory=Batches)
    """Which stages worked for which others, and what was allotted to each."""
    stalls: Stalls = field(default_factory=Stalls)
    """What stalled the host: garbage collections, stalls that were found, and GPU memory that ran out."""

    @cached_property
    def in_graph(self) -> NDArray[np.bool_]:
        """Which rows are stages inside a replay: they have no host times of their own."""
        inside: NDArray[np.bool_] = ((self.flags & RowFlag.IN_GRAPH) != 0) & (self.parent >= 0)
        return inside

    @cached_property
    def callers(self) -> NDArray[np.int64]:
        """For each row inside a replay the row of the stage on the host that launched it; for any other row itself."""
        caller = np.arange(len(self.stage))
        while (still := self.in_graph[caller]).any():
            caller[still] = self.parent[caller[still]]
        return caller

    @cached_property
    def leaf(self) -> NDArray[np.bool_]:
        """Which rows have no stage inside; what is inside a replay counts with the stage around it."""
        leaf = ~self.in_graph
        leaf[self.parent[(self.parent >= 0) & leaf]] = False
        return leaf

    @cached_property
    def measured(self) -> NDArray[np.bool_]:
        """Which rows have GPU times that can be relied on."""
        timed: NDArray[np.bool_] = (self.stream >= 0) & ((self.flags & _UNMEASURED) == 0)
        return timed

    @cached_property
    def warmup(self) -> NDArray[np.bool_]:
        """
        Is this call itself a warm-up call?

        The search for late cold calls looks at the others, since it asks about single calls; the next two masks build
        on this one.
        """
        flagged: NDArray[np.bool_] = (self.flags & RowFlag.WARMUP) != 0
        return flagged

    @cached_property
    def not_ended(self) -> NDArray[np.bool_]:
        """Which stages still ran when a flight recorder was read: they count in no percentile."""
        running: NDArray[np.bool_] = (self.flags & RowFlag.NOT_ENDED) != 0
        return running

    @cached_property
    def in_warmup_request(self) -> NDArray[np.bool_]:
        """
        Is this call, or the request that it belongs to, a warm-up call?

        Figures, comparisons and the timeline's table leave these rows out: the first requests are slow in all that they
        contain, but one slow call inside does not make a request's other calls slow.
        """
        either: NDArray[np.bool_] = self.warmup | self.warmup[self.root] | self.not_ended
        return either

    @cached_property
    def around_warmup(self) -> NDArray[np.bool_]:
        """
        Is this call a warm-up call, or is there one inside it?

        Verdicts leave these rows out, and those of warm-up requests: a verdict explains all of a call's time, and the
        warm-up inside is part of that.
        """
        found: NDArray[np.bool_] = self.warmup | self.not_ended
        for rows, above in ancestors(self.parent):
            found[above[self.warmup[rows] | self.not_ended[rows]]] = True
        return found
