"""
The `application` exporter: batches as columns, through the application's own OTLP exporters.

For a provider that is stock (`_otel/stock.py`): the spans have its resource, and were sampled by its sampler. They go
past its span processors, which would only have passed them on, one by one.
"""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING

from gpuscope._data.statistics import Delivery
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters._encoding.readable import readable_spans
from gpuscope.exporters._encoding.resource import with_host
from gpuscope.exporters._transport.sender import Sender
from gpuscope.exporters._transport.through import ApplicationClient
from gpuscope.exporters.otlp import Envelopes, limits_of, sending

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

    from gpuscope._data.batch import StageBatch
    from gpuscope._otel.bridge import Bridge
    from gpuscope._otel.stock import Target
    from gpuscope._settings.config import Config


class ApplicationExporter:
    """
    Sends spans through exporters of the application's. Starts a thread for each at once.

    Args:
        bridge: knows the provider.
        config: its `schedule_delay_s` and `queue_bytes` are used.

    """

    name = "application"

    def __init__(self, bridge: Bridge, config: Config) -> None:
        self._bridge, self._config = bridge, config
        self._encoder = SpanEncoder(limits=limits_of(bridge.provider))
        self._envelopes = Envelopes(lambda: bridge.provider, dict)
        self._senders: dict[int, tuple[Target, Sender]] = {}
        """By the `id` of the exporter, which is held here."""
        for target in bridge.judgement().targets:
            self._sender(target)

    def endpoints(self) -> list[str]:
        """Return where spans go, without secrets."""
        return [sender.shown_url for _, sender in self._senders.values()]

    @property
    def place(self) -> str:
        """The same, for people."""
        return f"{', '.join(self.endpoints())} (by the program's own exporter)"

    def export(self, batch: StageBatch, delivery: Delivery) -> Iterator[None]:
        """Encode the batch, in two steps, and leave it to the senders."""
        if self._bridge.provider_has_ended():
            delivery.settle(0, {"provider_shutdown": delivery.stages})
            return
        prepared = self._encoder.prepare(batch)
        yield
        encoded = self._encoder.join(*prepared)
        # The last that were known, where the provider has others now: the next batch goes another way.
        targets = self._bridge.judgement().targets or tuple(target for target, _ in self._senders.values())
        shared = Delivery(lambda _, exported, lost: delivery.settle(exported, lost), delivery.stages, len(targets))
        for target in targets:
            self._sender(target).put(encoded, shared)

    def flush(self, timeout_s: float) -> bool:
        """Send what is held; return whether all of it was settled within the time."""
        results = [sender.flush(timeout_s) for _, sender in self._senders.values()]
        return all(results)

    def shutdown(self, timeout_s: float) -> None:
        """Send what can be sent within the time, and settle the rest as lost. The exporters stay open."""
        for _, sender in self._senders.values():
            sender.shutdown(timeout_s)

    def _sender(self, target: Target) -> Sender:
        key = id(target.exporter)
        if key not in self._senders:
            interrupt = Event()
            client = ApplicationClient(target.protocol, target.exporter, self._readable, interrupt.wait)
            self._senders[key] = target, Sender(client, interrupt, self._envelopes.wrap, sending(self._config))
        return self._senders[key][1]

    def _readable(self, payload: bytes) -> list[ReadableSpan]:
        resource: Resource = with_host(getattr(self._bridge.provider, "resource"))  # noqa: B009 - of the SDK's, not of the API's
        return readable_spans(payload, resource)
