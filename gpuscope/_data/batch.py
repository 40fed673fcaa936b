"""
`StageBatch`, resolved stages as columns: all that exporters and reports see.

Nothing here acts. Imports nothing at run time but `dataclasses`, `enum` and `typing`, and has no hand-written method.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope._data.record import ExceptionInfo, FromAbove, LazySpan, Site, ThreadInfo


NO_WORK_NS, NO_WORK_TRIMMED_NS = 3_000, 500
"""
Stages that are no longer had no work that could be measured. The second figure is of `RowFlag.TRIMMED`.

Two events with nothing between are 1.25 to 2.5 µs apart on a busy GPU (H100). With a kernel between they are apart by
what that takes, which is about 1 µs at least, and by 2.2 µs or more besides (`benchmarks/results/clock.json`);
where neighbours share their events, the least kernel makes 3.9 µs of that (H100). On an H200 two events are 2.9 µs
apart, 99.9 % of pairs at most 3.4 µs, and 4.0 µs or more with the least kernel between.
"""


class RowFlag(IntFlag):
    """What is special about one resolved stage; a column of `StageBatch`."""

    WARMUP = 1
    """One of the first calls of its stage in this process."""
    CAPTURED = 2
    """Recorded while its stream was being captured into a CUDA graph, so it has no GPU time."""
    CLAMPED = 4
    """The GPU start was measured before the launch on the host, by more than the uncertainty, and was moved to it."""
    GIVEN_UP = 8
    """The events did not complete before the deadline, so there are host times only."""
    REMOTE_PARENT = 16
    """The parent span belongs to another process."""
    IN_GRAPH = 32
    """A stage inside a replay of a CUDA graph, which has a GPU span and no host span. Its host times are those of the
    launch, and `span_id` and `gpu_span_id` are the same."""
    UNPLACED = 64
    """The GPU's clock could not be read, so only the duration is known: the GPU span begins at the launch, and the
    uncertainty reaches to when it was seen done. `CLAMPED` is set as well."""
    SHARED = 128
    """The light span of a batch in the trace of one of its members: no stage. All rows of its `StageBatch` are such."""
    TRIMMED = 512
    """What its own two events took was taken off, because all its work was waiting when the GPU came to it."""
    NOT_ENDED = 256
    """A stage from a flight recorder that still ran; its end is the last moment that is known."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The GPU that a stage ran on."""

    index: int
    name: str
    """Of the model, exported as `hw.model`."""
    uuid: str
    """In NVIDIA's form, `GPU-xxxxxxxx-xxxx-…`; exported as `hw.id`."""
    vendor: str = "NVIDIA"
    """Others' GPUs are not timed: events are those of CUDA's driver."""


@dataclass(slots=True)
class SpanDetails:
    """What only few stages have; keyed by row in `StageBatch.details`."""

    attributes: Mapping[str, object] | None = None
    """Set by the application for this run; values of any type."""
    error: ExceptionInfo | None = None
    name: str | None = None
    """Set through OpenTelemetry's `Span.update_name`."""
    status: tuple[str, str | None] | None = None
    """`("OK" | "ERROR" | "UNSET", description)`, set through OpenTelemetry's `Span.set_status`."""
    events: tuple[tuple[str, int, Mapping[str, object]], ...] = ()
    """(name, epoch nanoseconds, attributes), from OpenTelemetry's `Span.add_event`."""
    links: tuple[tuple[int, int, Mapping[str, object]], ...] = ()
    """(trace id, span id, attributes), from OpenTelemetry's `Span.add_link`."""
    dropped: tuple[int, int] = (0, 0)
    """Events and links that came before and found no room."""
    trace_state: str | None = None
    """What other vendors say of the trace, as in the header `tracestate`."""
    members: FromAbove = None
    """Of a batch, until its members are looked at: `Members` of `_recording.batches.members`, and when it began."""
    linked: MemberLinks | None = None
    """Of a batch, then."""


@dataclass(frozen=True, slots=True, eq=False)
class MemberLinks:
    """The members of a batch, as its own span shows them."""

    size: int
    basis: str
    ids: NDArray[np.uint64]
    """Of the spans that it links to: a row for each, with both halves of the trace's id, and the span's."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedColumns:
    """What the light spans of batches have besides, a column each; of `StageBatch.shared`."""

    size: NDArray[np.int64]
    position: NDArray[np.int64]
    wait_s: NDArray[np.float64]
    share_ns: NDArray[np.int64]
    """Meaningless where the row has no GPU span."""
    batch_trace_high: NDArray[np.uint64]
    """This and the next two are the ids of the batch's span, to which they link."""
    batch_trace_low: NDArray[np.uint64]
    batch_span_id: NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class FinishedGeneration:
    """A generation that took part in many batches, for metrics. Times are since the epoch."""

    attributes: Mapping[str, str]
    """Operation, provider and model, as far as they were said."""
    error_type: str | None
    start_ns: int
    end_ns: int
    times_s: Mapping[str, float]
    """Until its first token, and per token, by both clocks as far as they are known, by the attributes' names."""
    link: tuple[int, int] | None
    """Trace id and span id, if the span is exported."""


@dataclass(frozen=True, slots=True, eq=False)
class StageBatch:
    """
    Resolved stages as columns of one length `n`. Times are nanoseconds since the epoch; 0 means absent.

    A row with `gpu_span_id` 0 has no GPU span.
    """

    sites: tuple[Site, ...]
    threads: tuple[ThreadInfo, ...]
    devices: Mapping[int, DeviceInfo]
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
    """How far off the GPU times may be, plus or minus. Durations are more exact. Of a stage that was given up at its
    deadline: how long after its end on the host its work was not done yet."""
    device: NDArray[np.int32]
    """Key into `devices`; -1 without a GPU part."""
    stream: NDArray[np.uint64]
    """The raw CUDA stream handle."""
    flags: NDArray[np.uint32]
    """Of `RowFlag`."""
    details: Mapping[int, SpanDetails]
    live: tuple[LazySpan, ...] | None = None
    """The lazy spans, one per row (None for a stage inside a graph), where spans go to the application's own
    TracerProvider; else None."""
    samples: NDArray[np.int32] | None = None
    """How often the stream was asked for work while this was the innermost stage on it; None where nothing is asked."""
    had_work: NDArray[np.int32] | None = None
    """How often it had any, queued or running."""
    device_samples: Mapping[int, tuple[int, int]] | None = None
    """Since the batch before: how often each device was asked, and how often any of the streams asked had work."""
    stream_samples: Mapping[tuple[int, int], tuple[int, int]] | None = None
    """The same of each stream that was asked, by device and raw handle."""
    shared: SharedColumns | None = None
    """Of light spans, which are not stages; None for stages."""
