"""
Sends one payload to one OTLP/gRPC endpoint, with the retries that the protocol prescribes.

By `grpcio`, which the extra `gpuscope[grpc]` brings and which only the sender's thread imports. The payloads are bytes
already, so no stub and no message is made of them.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gpuscope._settings.shown import shown_url
from gpuscope.exporters._transport.http import HttpClient, Outcome, backoff

if TYPE_CHECKING:
    from threading import Event

    from gpuscope.exporters._transport.http import Endpoint

NO_GRPC = (
    'OTLP over gRPC needs `pip install "gpuscope[grpc]"`; or set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf and the '
    "collector's HTTP port, usually 4318"
)
TRACES = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
METRICS = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
_RETRYABLE = frozenset(("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"))
"""As the specification of OTLP has them; `RESOURCE_EXHAUSTED` only where the receiver says when to come again."""
_RETRY_INFO = "google.rpc.retryinfo-bin"
_TOO_LARGE = "larger than max"
_OPTIONS = (
    # A child after a fork must not go on with its parent's connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)


def has_grpc() -> bool:
    """Tell whether `grpcio` is installed; imports nothing."""
    return find_spec("grpc") is not None


def client_for(
    endpoint: Endpoint, method: str, interrupt: Event, *, version: str, backoff_s: float = 1.0
) -> GrpcClient | HttpClient:
    """Return a client by the endpoint's protocol; `method` is the name that gRPC has for what HTTP has in the URL."""
    if endpoint.protocol == "grpc":
        return GrpcClient(endpoint, method, interrupt, version=version, backoff_s=backoff_s)
    return HttpClient(endpoint, interrupt, version=version, backoff_s=backoff_s)


class GrpcClient:
    """
    Posts payloads to an endpoint, whose URL without secrets is `shown_url`.

    Args:
        endpoint: where they go.
        method: the full name of the method, such as `TRACES`.
        interrupt: once set, ends the waits between attempts: one last attempt is made at once.
        version: of gpuscope, for the user agent.
        backoff_s: the first wait in seconds.

    """

    def __init__(
        self, endpoint: Endpoint, method: str, interrupt: Event, *, version: str, backoff_s: float = 1.0
    ) -> None:
        self.shown_url = shown_url(endpoint.url)
        self._endpoint, self._method, self._interrupt, self._version = endpoint, method, interrupt, version
        self._backoff_s = backoff_s
        self._channel: Any = None
        self._call: Any = None

    def post(self, payload: bytes) -> Outcome:
        """Send the payload, and again where that may help, within the endpoint's `timeout_s`."""
        if not has_grpc():
            return Outcome("no_grpc", NO_GRPC)
        deadline_s, attempt = monotonic() + self._endpoint.timeout_s, 0
        while True:
            last = self._interrupt.is_set()
            outcome = self._attempt(payload, max(0.001, deadline_s - monotonic()))
            wait_s = backoff(self._backoff_s, attempt, outcome.retry_after_s)
            if last or not outcome.retry or monotonic() + wait_s >= deadline_s:
                return outcome
            self._interrupt.wait(wait_s)
            attempt += 1

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()

    def _attempt(self, payload: bytes, timeout_s: float) -> Outcome:
        import grpc

        try:
            if self._call is None:
                self._open(grpc)
            return Outcome(body=self._call(payload, metadata=self._metadata, timeout=timeout_s))
        except grpc.RpcError as error:
            return _judge(error)
        except OSError as error:
            return Outcome("invalid_request", f"{type(error).__name__}: check the certificate files")
        except Exception as error:  # Of what was given to it: a header, say. Its message may quote that.
            return Outcome("invalid_request", f"{type(error).__name__}: check the endpoint's URL and the headers")

    def _open(self, grpc: Any) -> None:
        endpoint, parts = self._endpoint, urlsplit(self._endpoint.url)
        options = (*_OPTIONS, ("grpc.primary_user_agent", f"gpuscope/{self._version}"))
        compression = grpc.Compression.Gzip if endpoint.compression == "gzip" else grpc.Compression.NoCompression
        target = parts.netloc.rpartition("@")[2]
        if parts.scheme == "https":
            roots, key, chain = map(_read, (endpoint.certificate, endpoint.client_key, endpoint.client_certificate))
            credentials = grpc.ssl_channel_credentials(roots, key, chain)
            self._channel = grpc.secure_channel(target, credentials, options=options, compression=compression)
        else:
            self._channel = grpc.insecure_channel(target, options=options, compression=compression)
        self._metadata = tuple((name.lower(), value) for name, value in endpoint.headers.items())
        self._call = self._channel.unary_unary(self._method)  # Bytes in, bytes out.


def _judge(error: Any) -> Outcome:
    code = error.code().name
    reason = f"grpc_{code.lower()}"
    # The library's words for what it saw itself; a receiver's own may hold anything.
    detail = code if code != "UNAVAILABLE" else f"{code}: nobody answers there as gRPC does"
    if code == "RESOURCE_EXHAUSTED":
        if _TOO_LARGE in str(error.details()):
            return Outcome("http_413", "the message is larger than the receiver takes")
        told = dict(error.trailing_metadata() or ()).get(_RETRY_INFO)
        return Outcome(reason, detail, retry=told is not None, retry_after_s=_delay_s(told))
    return Outcome(reason, detail, retry=code in _RETRYABLE)


def _delay_s(info: bytes | None) -> float | None:
    """Return the delay of a `google.rpc.RetryInfo`, bounded as a `Retry-After` is."""
    if info is None:
        return None
    try:
        from google.rpc.error_details_pb2 import RetryInfo

        delay = RetryInfo.FromString(info).retry_delay
    except Exception:  # Whatever it sent instead, and also where that package is not installed.
        return None
    return max(0.0, float(delay.seconds) + float(delay.nanos) / 1e9)


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None
