"""
The two kinds of data: `StageRecord`, raw, and `StageBatch`, resolved; with the small facts both refer to.

Nothing here acts. Imports nothing at run time but `dataclasses`, `enum` and `typing`, and has no hand-written method.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


class RowFlag(IntFlag):
    """What is special about one resolved stage; a column of `StageBatch`."""

    WARMUP = 1
    """One of the first calls of its stage in this process."""
    CAPTURED = 2
    """Recorded while its stream was being captured into a CUDA graph, so it has no GPU time."""
    CLAMPED = 4
    """The GPU start lay before the host launch by more than the uncertainty and was moved to it."""
    GIVEN_UP = 8
    """The events did not complete before the deadline: host times only."""
    REMOTE_PARENT = 16
    """The parent span belongs to another process."""


@dataclass(slots=True, eq=False)
class Site:
    """What is known of a stage before it runs: made once per name and attributes, shared by all its records."""

    name: str
    attributes: Mapping[str, Any]
    function: str | None = None
    """The qualified name of the decorated function (`code.function.name`), if there is one."""
    nvtx: Any = None
    """What the NVTX door prepared for this name."""
    calls: int = 0
    """Resolved calls so far; counted by the collector, for the warm-up flag."""


@dataclass(slots=True, eq=False)
class ThreadFacts:
    """The thread that a stage ran on."""

    ident: int
    """`threading.get_ident()`: `thread.id`."""
    name: str


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """The GPU that a stage ran on."""

    index: int
    name: str
    uuid: str
    """In NVIDIA's form, `GPU-xxxxxxxx-xxxx-…`: `hw.id`."""


class Trace:
    """
    The trace a stage belongs to, shared by a stage and those inside it.

    `sampled` is None until somebody asks; then it is decided once.
    """

    __slots__ = ("parent_id", "remote", "root", "sampled", "trace_id")
    trace_id: int
    parent_id: int
    """Span id of the application's span above the outermost stage; 0 if there is none."""
    remote: bool
    """Whether that span belongs to another process."""
    root: Site
    """The outermost stage of ours."""
    sampled: bool | None


class StageRecord:
    """
    One run of a stage, as the application thread saw it. Times are `time.perf_counter_ns()`.

    Its facts never change once it is queued. Made without `__init__`, which would cost as much as the rest
    of the allocation; `_stage.begin` sets every slot.
    """

    __slots__ = (
        "attributes",
        "end_ns",
        "error",
        "lane",
        "outer",
        "pair",
        "range",
        "recorder",
        "restore",
        "site",
        "span",
        "span_id",
        "start_ns",
        "thread",
        "trace",
    )
    site: Site
    recorder: Any
    outer: StageRecord | None
    """The enclosing stage."""
    trace: Trace
    span_id: int
    span: Any
    """The lazy span that stands for this stage in the application's OpenTelemetry context, or None."""
    restore: Any
    """The OpenTelemetry context to put back, or None."""
    thread: ThreadFacts
    start_ns: int
    end_ns: int
    """0 while the stage runs."""
    lane: Any
    """The device door's handle of (device, stream), or None."""
    pair: Any
    """The device door's start and end event, or None."""
    range: Any
    """The open NVTX range, or None."""
    attributes: dict[str, Any] | None
    error: ErrorFacts | None


@dataclass(frozen=True, slots=True)
class ErrorFacts:
    """An exception that left a stage: no reference to it or to its frames is kept, they may hold GPU memory."""

    type: str
    message: str
    frames: tuple[tuple[str, int, str], ...]
    """(file, line, function), outermost first."""


@dataclass(slots=True)
class Details:
    """What few stages have; keyed by row in `StageBatch.details`."""

    attributes: Mapping[str, Any] | None = None
    """Set by the application for this run; values of any type."""
    error: ErrorFacts | None = None
    name: str | None = None
    """Set through OpenTelemetry's `Span.update_name`."""
    status: tuple[str, str | None] | None = None
    """`("OK" | "ERROR" | "UNSET", description)`, set through OpenTelemetry's `Span.set_status`."""
    events: tuple[tuple[str, int, Mapping[str, Any]], ...] = ()
    """(name, epoch nanoseconds, attributes), from OpenTelemetry's `Span.add_event`."""
    links: tuple[tuple[int, int, Mapping[str, Any]], ...] = ()
    """(trace id, span id, attributes), from OpenTelemetry's `Span.add_link`."""


@dataclass(frozen=True, slots=True, eq=False)
class StageBatch:
    """
    Resolved stages as columns of one length `n`. Times are nanoseconds since the epoch; 0 means absent.

    A row with `gpu_span_id` 0 has no GPU span.
    """

    sites: tuple[Site, ...]
    threads: tuple[ThreadFacts, ...]
    devices: Mapping[int, DeviceFacts]
    site: NDArray[np.int32]
    """Index into `sites`."""
    root: NDArray[np.int32]
    """Index into `sites`: the outermost stage of the trace."""
    thread: NDArray[np.int32]
    """Index into `threads`."""
    trace_high: NDArray[np.uint64]
    trace_low: NDArray[np.uint64]
    span_id: NDArray[np.uint64]
    parent_id: NDArray[np.uint64]
    gpu_span_id: NDArray[np.uint64]
    sampled: NDArray[np.bool_]
    host_start_ns: NDArray[np.int64]
    host_end_ns: NDArray[np.int64]
    gpu_start_ns: NDArray[np.int64]
    gpu_end_ns: NDArray[np.int64]
    uncertainty_ns: NDArray[np.int64]
    """Of the GPU placement, plus or minus; durations are better."""
    device: NDArray[np.int32]
    """Key into `devices`; -1 without a GPU part."""
    stream: NDArray[np.uint64]
    """The raw CUDA stream handle."""
    flags: NDArray[np.uint32]
    """Of `RowFlag`."""
    details: Mapping[int, Details]
    live: tuple[Any, ...] | None = None
    """The lazy spans, one a row, when the application's own TracerProvider is exported to; else None."""
