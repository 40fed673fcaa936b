"""
The `memory` exporter: spans as objects in a list, for tests and notebooks.

The list is unbounded, so this is not for production.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from gpuscope.exporters._encoding.details import CleanDetails, links_of
from gpuscope.exporters._encoding.rows import rows_of
from gpuscope.exporters._encoding.spans import resolve, spans_of

if TYPE_CHECKING:
    from gpuscope._data.batch import StageBatch
    from gpuscope._data.record import ExceptionInfo
    from gpuscope._data.statistics import Delivery
    from gpuscope.exporters._encoding.rows import SpanRow
    from gpuscope.exporters._encoding.spans import Group, SpanTemplate

_STATUS: tuple[Literal["UNSET", "OK", "ERROR"], ...] = ("UNSET", "OK", "ERROR")
_NOTHING = CleanDetails()
Attributes: TypeAlias = dict[str, Any]
"""Values as OTLP can carry them. `Any`, so that a test may compare them and compute with them as they are."""


@dataclass(frozen=True, slots=True)
class CapturedSpan:
    """One span. Times are nanoseconds since the epoch; `parent_id` is 0 where there is no parent."""

    name: str
    kind: Literal["host", "gpu"]
    trace_id: int
    span_id: int
    parent_id: int
    start_ns: int
    end_ns: int
    attributes: Attributes
    status: Literal["UNSET", "OK", "ERROR"] = "UNSET"
    description: str = ""
    """Of the status."""
    events: tuple[tuple[str, int, Attributes], ...] = ()
    """(name, nanoseconds since the epoch, attributes)."""
    links: tuple[tuple[int, int, Attributes], ...] = ()
    """(trace id, span id, attributes)."""
    error: ExceptionInfo | None = field(default=None)
    """The exception that left the stage."""

    @property
    def duration_ns(self) -> int:
        """End minus start."""
        return self.end_ns - self.start_ns


class MemoryExporter:
    """Appends `CapturedSpan`s to a list of the caller's."""

    name = "memory"
    every_gpu_span = True
    """Tests have GPU times of any length."""

    def __init__(self, spans: list[CapturedSpan]) -> None:
        self._spans = spans
        self._templates: dict[Group, tuple[SpanTemplate | None, SpanTemplate | None]] = {}

    def export(self, batch: StageBatch, delivery: Delivery) -> None:
        """Append the batch's spans, each stage's GPU span after its host span."""
        spans = spans_of(batch)
        shared = resolve(spans, self._templates, lambda host, gpu: (host, gpu))
        for host, gpu in rows_of(spans, shared):
            if host is not None:
                self._spans.append(_captured(host, "host"))
            if gpu is not None:
                self._spans.append(_captured(gpu, "gpu"))
        delivery.settle(delivery.stages)

    def flush(self, timeout_s: float) -> bool:  # noqa: ARG002
        """Return True: nothing is held."""
        return True

    def shutdown(self, timeout_s: float) -> None:
        """Do nothing: the list is the caller's."""


def _captured(row: SpanRow[SpanTemplate], kind: Literal["host", "gpu"]) -> CapturedSpan:
    template, details = row.shared, row.details or _NOTHING
    measured = zip(template.measured, row.measured, strict=True)
    code, description = details.status
    return CapturedSpan(
        name=template.name,
        kind=kind,
        trace_id=row.trace_id,
        span_id=row.span_id,
        parent_id=row.parent_id,
        start_ns=row.start_ns,
        end_ns=row.end_ns,
        attributes={**template.attributes, **dict(measured), **details.attributes},
        status=_STATUS[code],
        description=description,
        events=tuple(details.events),
        links=tuple(links_of(details)),
        error=details.error,
    )
