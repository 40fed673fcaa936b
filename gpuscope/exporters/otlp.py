"""
The `otlp` exporter: batches straight to OTLP in protobuf, over HTTP or gRPC, without span objects.

Only puts the parts together. `export` encodes and hands over, and never waits: the sender's thread posts.
"""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING

from gpuscope._data.plain.values import as_text, clean_mapping
from gpuscope._version import __version__
from gpuscope.exporters._encoding.limits import SpanLimits
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters._encoding.otlp_message import resource_bytes, schema_url_bytes, scope_bytes, varint
from gpuscope.exporters._encoding.resource import DISTRIBUTION, resource_attributes, with_host
from gpuscope.exporters._transport.grpc_client import TRACES, client_for
from gpuscope.exporters._transport.http import Endpoint
from gpuscope.exporters._transport.sender import Limits, Sender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gpuscope._data.batch import StageBatch
    from gpuscope._data.plain.values import Clean
    from gpuscope._data.statistics import Delivery
    from gpuscope._settings.config import Config


_LEAST_DELAY_S = 0.25
"""So that all of a pass goes in one request."""


class OtlpExporter:
    """
    Sends spans to `config.traces_url`. Starts its thread at once.

    Args:
        config: its `otlp_` settings and `schedule_delay_s` are used.
        resource: the process's attributes; by default `resource_attributes()`.
        get_provider: returns the application's TracerProvider, or None. Where there is one its resource is used.
        backoff_s: the first wait before a payload is sent again, in seconds.
        limits: how much is sent at once and how much is held; the delay is `config`'s by default.

    """

    name = "otlp"

    def __init__(
        self,
        config: Config,
        resource: Mapping[str, Clean] | None = None,
        *,
        get_provider: Callable[[], object] = lambda: None,
        backoff_s: float = 1.0,
        limits: Limits | None = None,
    ) -> None:
        attributes = resource_attributes() if resource is None else resource
        envelopes = Envelopes(get_provider, lambda: attributes)
        self._encoder = SpanEncoder(limits=limits_of(get_provider()))
        interrupt = Event()
        client = client_for(Endpoint.for_traces(config), TRACES, interrupt, version=__version__, backoff_s=backoff_s)
        self._sender = Sender(client, interrupt, envelopes.wrap, limits or sending(config))

    @property
    def place(self) -> str:
        """Where spans are sent to, without secrets."""
        return self._sender.shown_url

    @property
    def pending_stages(self) -> int:
        """The stages that are encoded and not yet settled."""
        return self._sender.pending_stages

    def export(self, batch: StageBatch, delivery: Delivery) -> Iterator[None]:
        """Encode the batch, in two steps, and leave it to the sender."""
        if not len(batch.site):
            delivery.settle(0)
            return
        prepared = self._encoder.prepare(batch)
        yield
        self._sender.put(self._encoder.join(*prepared), delivery)

    def flush(self, timeout_s: float) -> bool:
        """Send what is held; return whether all of it was settled within the time."""
        return self._sender.flush(timeout_s)

    def shutdown(self, timeout_s: float) -> None:
        """Send what can be sent within the time, and settle the rest as lost."""
        self._sender.shutdown(timeout_s)


def sending(config: Config) -> Limits:
    """Return how much is sent at once, and when: a stage has waited for the collector's pass before it comes here."""
    delay_s = max(config.schedule_delay_s - config.interval_s, min(config.schedule_delay_s, _LEAST_DELAY_S))
    return Limits(delay_s=delay_s, buffer_bytes=2 * config.queue_bytes)


def limits_of(provider: object) -> SpanLimits:
    """Return the limits of a provider's spans or, without one that shows them, those that the environment sets."""
    from opentelemetry.sdk import trace

    return SpanLimits.of(getattr(provider, "_span_limits", None) or trace.SpanLimits())


class Envelopes:
    """
    The envelope of each payload, which is that of the resource of that moment.

    Args:
        get_provider: returns the application's TracerProvider, whose resource is that of the spans; or None. Where it
            names no host, the spans' resource does.
        otherwise: returns the resource's attributes where there is none.

    """

    def __init__(self, get_provider: Callable[[], object], otherwise: Callable[[], Mapping[str, Clean]]) -> None:
        self._get_provider, self._otherwise = get_provider, otherwise
        self._last: tuple[object, Envelope] | None = None

    def wrap(self, spans: list[bytes]) -> bytes:
        """Return the request that holds the encoded spans."""
        # The provider may come late, and after a fork the SDK gives it another resource.
        resource = getattr(self._get_provider(), "resource", None)
        if self._last is None or self._last[0] is not resource:
            if resource is None:
                envelope = Envelope(self._otherwise(), __version__)
            else:
                named = with_host(resource)
                envelope = Envelope(clean_mapping(named.attributes), __version__, as_text(named.schema_url or ""))
            self._last = resource, envelope
        return self._last[1].wrap(spans)


class Envelope:
    """What is put around spans to make an `ExportTraceServiceRequest`: the same resource and scope each time."""

    def __init__(self, resource: Mapping[str, Clean], version: str, schema_url: str = "") -> None:
        self._resource = resource_bytes(resource)
        self._scope = scope_bytes(DISTRIBUTION, version)
        self._schema_url = schema_url_bytes(schema_url)

    def wrap(self, spans: list[bytes]) -> bytes:
        """Return the request that holds the encoded spans."""
        scope_size = len(self._scope) + sum(map(len, spans))
        scope_spans = b"\x12" + varint(scope_size)
        size = len(self._resource) + len(scope_spans) + scope_size + len(self._schema_url)
        return b"".join([b"\x0a", varint(size), self._resource, scope_spans, self._scope, *spans, self._schema_url])
