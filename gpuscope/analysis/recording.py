"""
`Recording`: the stages of one or many files, as columns; all that reports see.

Nothing here acts or judges; it says which rows are what, once for all. Like a `StageBatch`, but of whole files, with
the tree of stages and several processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuscope._data.batch import RowFlag
from gpuscope.analysis._structure.ancestors import ancestors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

_UNMEASURED = RowFlag.CAPTURED | RowFlag.CLAMPED | RowFlag.GIVEN_UP
"""Rows whose GPU times are absent, or not where they seem to be."""


class Process(NamedTuple):
    """One process that recorded: its resource attributes say which."""

    name: str
    """For people: service name, process id and host where there are several."""
    resource: Mapping[str, Any]


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
    """The process's index of the device; the uuid says which it is."""
    device_name: str
    device_uuid: str
    handle: int
    """The stream's raw handle; 0 is the default stream."""


@dataclass(frozen=True, slots=True)
class Losses:
    """What is missing: lines that could not be read, and stages that never reached the files."""

    skipped_lines: Mapping[str, int] = field(default_factory=dict)
    """By reason. Lines that are `truncated`, `foreign` or `malformed`; and in lines that could be read `foreign spans`,
    `malformed spans`, and each `GPU span without a host span`."""
    orphans: int = 0
    """Stages whose parent is not in the files though it is a stage of ours."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """By reason, as the last account of each process in the files says."""
    lost: Mapping[str, int] = field(default_factory=dict)
    untimed: Mapping[str, int] = field(default_factory=dict)
    """By reason: stages that went out without GPU times."""


@dataclass(frozen=True, eq=False)
class Recording:
    """
    Resolved stages as columns of one length `n`, ordered by host start. Times are nanoseconds since the epoch.

    A row without a GPU part has `stream` -1 and GPU times 0. A stage in a replay of a CUDA graph (`IN_GRAPH`) has no
    host part: both its host times are the launch of the replay, and somewhere above it is a row that has one.

    Masks over the rows are worked out when they are first asked for, and kept. Nobody may write into one.
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
    """Of the GPU times' place on the wall clock."""
    flags: NDArray[np.uint32]
    """`RowFlag` bits."""
    error: NDArray[np.bool_]
    """Whether an exception left the stage."""
    trace_id: tuple[str, ...]
    """Hexadecimal, a row each."""
    span_id: tuple[str, ...]
    attributes: Mapping[int, Mapping[str, Any]]
    """The application's own attributes by row, where there are any."""
    losses: Losses = field(default_factory=Losses)

    @cached_property
    def in_graph(self) -> NDArray[np.bool_]:
        """Which rows are stages inside a replay: they have GPU times alone."""
        inside: NDArray[np.bool_] = ((self.flags & RowFlag.IN_GRAPH) != 0) & (self.parent >= 0)
        return inside

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
        """Which rows are themselves warm-up calls."""
        flagged: NDArray[np.bool_] = (self.flags & RowFlag.WARMUP) != 0
        return flagged

    @cached_property
    def in_warmup_request(self) -> NDArray[np.bool_]:
        """Which rows are warm-up calls, or of a request that is one. Figures and comparisons leave them out."""
        either: NDArray[np.bool_] = self.warmup | self.warmup[self.root]
        return either

    @cached_property
    def around_warmup(self) -> NDArray[np.bool_]:
        """Which rows are warm-up calls, or have some inside. Verdicts leave them out."""
        found: NDArray[np.bool_] = self.warmup.copy()
        for rows, above in ancestors(self.parent):
            found[above[self.warmup[rows]]] = True
        return found
