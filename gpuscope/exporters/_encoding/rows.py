"""
A batch's spans one by one, as plain Python values, for exporters that cannot work by columns.

Costs a few microseconds per span, so it is not for the default path. Knows no format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from gpuscope._data.attributes import BATCH_POSITION, BATCH_SIZE, BATCH_WAIT, GPU_SHARE
from gpuscope.exporters._encoding.details import CleanDetails

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from gpuscope.exporters._encoding.spans import Spans

T = TypeVar("T")
_SHARED = "size", "position", "wait_s", "share_ns", "batch_trace_high", "batch_trace_low", "batch_span_id"
Cell: TypeAlias = Any
"""A whole number or a float, as its column has it: numpy's `tolist` does not say which."""


@dataclass(slots=True, eq=False)
class SpanRow(Generic[T]):
    """One span."""

    shared: T
    """What was made of the template that it shares with its group."""
    details: CleanDetails | None
    """What only it has; None for nearly all spans."""
    trace_id: int
    span_id: int
    parent_id: int
    """0 where there is no parent."""
    start_ns: int
    end_ns: int
    measured: tuple[float, ...]
    """
    In the order of `HOST_MEASURED` or `GPU_MEASURED`; a host span without a GPU part has the first only. Where there
    are samples a GPU span has those of `GPU_SAMPLED`, too, of which the last is whole.
    """


def rows_of(
    spans: Spans, shared: Sequence[tuple[T | None, T | None]]
) -> Iterator[tuple[SpanRow[T] | None, SpanRow[T] | None]]:
    """
    Yield each row's host span and GPU span, where it has them.

    Args:
        spans: of a batch.
        shared: what `resolve` made of each group's templates, for the host span and for the GPU span.

    """
    batch = spans.batch
    host = _lists((batch.span_id, batch.parent_id, batch.host_start_ns, batch.host_end_ns, spans.host_s))
    gpu = _lists((batch.gpu_span_id, spans.gpu_parent_id, batch.gpu_start_ns, batch.gpu_end_ns))
    seconds = _lists((spans.gpu_s, spans.launch_s, spans.uncertainty_s))
    traces = _lists((batch.trace_high, batch.trace_low))
    had_work = {} if spans.samples is None or spans.had_work is None else _sampled(spans.samples, spans.had_work)
    light = None if batch.shared is None else _lists(getattr(batch.shared, name) for name in _SHARED)
    for row, group in enumerate(spans.groups.tolist()):
        for_host, for_gpu = shared[group]
        high, low = next(traces)
        trace_id = high << 64 | low
        span_id, parent_id, start_ns, end_ns, host_s = next(host)
        gpu_span_id, gpu_parent_id, gpu_start_ns, gpu_end_ns = next(gpu)
        gpu_s, launch_s, uncertainty_s = next(seconds)
        host_row = gpu_row = None
        if for_host is not None:
            measured = (host_s,) if for_gpu is None else (host_s, gpu_s, launch_s)
            details = spans.details_by_row.get(row)
            if light is not None:
                details = _of_light(next(light), details, has_gpu=for_gpu is not None)
            host_row = SpanRow(for_host, details, trace_id, span_id, parent_id, start_ns, end_ns, measured)
        if for_gpu is not None:
            of_gpu = (gpu_s, launch_s, uncertainty_s, *had_work.get(row, ()))
            gpu_row = SpanRow(for_gpu, None, trace_id, gpu_span_id, gpu_parent_id, gpu_start_ns, gpu_end_ns, of_gpu)
        yield host_row, gpu_row


def _of_light(cells: tuple[Cell, ...], details: CleanDetails | None, *, has_gpu: bool) -> CleanDetails:
    """Return what a light span has besides: its columns, and the link to the batch's span."""
    size, position, wait_s, share_ns, high, low, span_id = cells
    details = CleanDetails() if details is None else details
    details.attributes |= {BATCH_SIZE: size, BATCH_POSITION: position, BATCH_WAIT: wait_s}
    if has_gpu:
        details.attributes[GPU_SHARE] = share_ns
    details.links.append((high << 64 | low, span_id, {}))
    return details


def _lists(columns: Iterable[NDArray[np.generic]]) -> Iterator[tuple[Cell, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)


def _sampled(samples: NDArray[np.int32], had_work: NDArray[np.float64]) -> dict[int, tuple[Cell, Cell]]:
    """Return what `GPU_SAMPLED` names, of the rows that have it."""
    rows = samples.nonzero()[0]
    return dict(zip(rows.tolist(), _lists((had_work[rows], samples[rows])), strict=True))
