"""
The `processors` exporter: stages as finished spans, straight to the application's own span processors.

For a provider whose processors do nothing before a span's end (`_otel/stock.py`): nobody misses the span that was never
started. That leaves out more than half of what a span costs with `sdk`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.plain.values import shown
from gpuscope._log import inform, logger
from gpuscope.exporters._encoding.finished import SpanMaker
from gpuscope.exporters._encoding.resource import with_host
from gpuscope.exporters._encoding.rows import rows_of
from gpuscope.exporters._encoding.spans import resolve, spans_of
from gpuscope.exporters.otlp import limits_of
from gpuscope.exporters.sdk import SdkExporter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.statistics import Delivery
    from gpuscope._otel.bridge import Bridge
    from gpuscope.exporters._encoding.finished import Made
    from gpuscope.exporters._encoding.rows import SpanRow
    from gpuscope.exporters._encoding.spans import Group

_STEP_ROWS = 4


class ProcessorsExporter(SdkExporter):
    """
    Hands finished spans to the provider's processors; flushes and ends as `sdk` does.

    Args:
        bridge: knows the provider.

    """

    name = "processors"
    place = "the span processors of the program's TracerProvider"

    def __init__(self, bridge: Bridge) -> None:
        super().__init__(bridge)
        self._maker = SpanMaker(getattr(bridge.tracer, "_instrumentation_scope", None))
        self._limits = limits_of(bridge.provider)
        self._resource: object = None
        self._finished: dict[Group, tuple[Made | None, Made | None]] = {}

    def export(self, batch: StageBatch, delivery: Delivery) -> Iterator[None]:
        """Make the spans of a few stages per step, and hand them on."""
        provider, failed, ended = self._bridge.provider, 0, 0
        processor = getattr(provider, "_active_span_processor", None)
        if processor is None:  # The provider is another by now; the next batch goes another way.
            delivery.settle(0, {"no_provider": delivery.stages})
            return
        resource = getattr(provider, "resource", None)
        if resource is not self._resource:
            self._resource, self._maker.resource = resource, with_host(resource)
        spans = spans_of(batch, self._limits)
        shared = resolve(spans, self._finished, lambda host, gpu: (self._maker.shared(host), self._maker.shared(gpu)))
        for number, (host, gpu) in enumerate(rows_of(spans, shared)):
            if self._bridge.provider_has_ended():
                ended += 1
            else:
                failed += not self._hand_on(processor.on_end, host, gpu)
            if number % _STEP_ROWS == _STEP_ROWS - 1:
                yield
        exported = delivery.stages - failed - ended
        if exported and not self._succeeded:
            self._succeeded = True
            inform("exporting finished spans to the processors of the application's %s.", type(provider).__name__)
        reasons = {"provider_shutdown": ended, "no_span": failed}
        delivery.settle(exported, {reason: count for reason, count in reasons.items() if count})

    def _hand_on(
        self, on_end: Callable[[object], object], host: SpanRow[Made] | None, gpu: SpanRow[Made] | None
    ) -> bool:
        """Return whether the processors took the spans of a stage, the GPU's first, as with `sdk`."""
        try:
            if gpu is not None:
                on_end(self._maker.make(gpu, None if host is None else host.details))
            if host is not None:
                on_end(self._maker.make(host, host.details))
        except Exception as error:  # Of the application's processors; the other stages go on.
            logger.debug("a span processor failed: %s", shown(error))
            return False
        return True
