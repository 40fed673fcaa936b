"""
What is said of an endpoint that takes no spans, and what to set, by what is there.

Only words: asks nothing and shows no credentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuscope.commands._endpoint import probe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuscope.commands._endpoint.probe import There

START = (
    "Start an OpenTelemetry Collector or Jaeger there, set OTEL_EXPORTER_OTLP_ENDPOINT, or write to a file: "
    "GPUSCOPE_EXPORTER=file."
)
_ENDPOINT, _PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
_USUAL = "OTLP's usual ports are 4318 (http/protobuf) and 4317 (grpc)."
_DENIED = ("http_401", "http_403", "grpc_unauthenticated", "grpc_permission_denied")
_BUSY = ("http_429", "http_502", "http_503", "http_504", "grpc_resource_exhausted")
_SLOW = ("timeout", "grpc_deadline_exceeded")
_MISLIKED = ("http_400", "http_415", "http_422", "grpc_invalid_argument")
_WITHOUT = {
    "unresolved": "the host `{host}` has no address",
    "resolver": "the resolver did not say in time whether the host `{host}` has an address",
    "refused": "unreachable: nothing listens on {host}:{port}",
    "timeout": "timeout: {host}:{port} does not answer at all",
    "unreachable": "unreachable: there is no way to {host}:{port}",
}
_NAMES = {
    probe.OTLP_HTTP: "there is a receiver of OTLP over HTTP",
    probe.GRPC: "there is a gRPC server",
    probe.JAEGER: "there is Jaeger's user interface, which takes no spans",
    probe.PROMETHEUS: "there is Prometheus, which takes no spans",
    probe.METRICS: "there is a page of metrics for Prometheus, which takes no spans",
    probe.WEB: "there is a web server{server}",
    probe.SILENT: "{host}:{port} takes connections and says nothing",
    probe.OTHER: "what is there speaks neither HTTP nor gRPC",
    probe.NOTHING: "",
}
_OTHERWISE = {
    probe.JAEGER: f"Jaeger takes spans on other ports. {_USUAL}",
    probe.PROMETHEUS: f"Send spans to an OpenTelemetry Collector or to Jaeger. {_USUAL}",
    probe.METRICS: f"Spans go to another port. {_USUAL}",
    probe.GRPC: f"Check that its OTLP receiver is on, for traces. {_USUAL}",
    probe.OTLP_HTTP: "Look at its log: it takes an empty request, and not this one.",
    probe.SILENT: f"Correct host and port: what is there may be waiting for something else. {_USUAL}",
    probe.NOTHING: START,
}
_CERTIFICATE = (
    "Set OTEL_EXPORTER_OTLP_CERTIFICATE to a file with the certificate that signed the server's, and use a host name "
    "that is in it."
)


@dataclass(frozen=True)
class Asked:
    """What was asked, and where."""

    host: str
    port: int
    tls: bool
    grpc: bool
    path: str = ""
    sent_headers: tuple[str, ...] = ()
    """Their names."""
    proxy: str = ""
    """By which it was asked, without secrets, or nothing."""
    neighbour: str = ""
    """The URL of another port of the host that takes spans, if any."""

    def url(self, *, tls: bool) -> str:
        """Return the endpoint as it should be set."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * tls}://{host}:{self.port}"


def without_connection(asked: Asked, why: str) -> tuple[str, str]:
    """Return what is said, and what to do, where there was not even a connection."""
    said = _WITHOUT[why].format(host=asked.host, port=asked.port)
    if why in ("unresolved", "resolver"):
        advice = (
            "Correct the host in the endpoint: from within a container it is another container's name, not localhost."
        )
    elif asked.neighbour:
        advice = f"{_neighbour(asked)} Or write to a file: GPUSCOPE_EXPORTER=file."
    elif why == "refused":
        advice = START
    else:
        advice = f"Correct host and port, or have the firewall let them through. {_USUAL}"
    return said, advice


def with_answer(asked: Asked, there: There, reason: str) -> tuple[str, str]:
    """Return what is there, and what to set, where a connection came about and the span was not taken for a reason."""
    server = f" ({there.server})" if there.server else ""
    what = _NAMES[there.service].format(host=asked.host, port=asked.port, server=server)
    if what and there.tls != asked.tls and there.service not in (probe.SILENT, probe.OTHER):
        what += ", with TLS" if there.tls else ", without TLS"
    return what, next(_fitting(asked, there, reason))


def _fitting(asked: Asked, there: There, reason: str) -> Iterator[str]:
    """Yield what to do, the most fitting first."""
    if asked.proxy and there.service in (probe.OTLP_HTTP, probe.GRPC):
        yield f"It answers without the proxy: set NO_PROXY={asked.host}, beside what that has."
    if asked.proxy:
        yield f"Correct the proxy, or set NO_PROXY={asked.host} if the endpoint can be reached without it."
    yield from _by_reason(asked, there, reason)
    changes = _changes(asked, there)
    if changes:
        yield f"Set {' and '.join(changes)}{_other_port(asked, there)}."
    if asked.neighbour:
        yield _neighbour(asked)
    yield _OTHERWISE.get(there.service, f"Correct host, port and path: this is not a receiver of OTLP. {_USUAL}")


def _by_reason(asked: Asked, there: There, reason: str) -> Iterator[str]:
    """Yield what to do where a receiver, or a web server that may be one, gave its reason, or the way to it did."""
    receives = there.service in (probe.OTLP_HTTP, probe.GRPC, probe.WEB)
    if reason in _DENIED:
        yield _credentials(asked)
    if reason in _BUSY and receives:
        yield "It is there, and does not take spans now: look at its log, and try again."
    if reason in _SLOW and receives and (there.service == probe.GRPC) == asked.grpc:
        yield "It is there, and slow: look at its log, or try again. Programs wait OTEL_EXPORTER_OTLP_TIMEOUT."
    if reason in _MISLIKED:
        yield "It refuses what was sent: a header may be missing, such as MLflow's x-mlflow-experiment-id."
    if reason == "no_grpc":
        yield f'pip install "gpuscope[grpc]", or set {_PROTOCOL}=http/protobuf and the port for HTTP, usually 4318.'
    if reason == "tls" and there.tls:
        yield _CERTIFICATE


def _changes(asked: Asked, there: There) -> list[str]:
    """Return the variables that would make the same port take spans."""
    if there.service not in (probe.OTLP_HTTP, probe.GRPC):
        if there.tls != asked.tls and there.service == probe.WEB:
            return [f"{_ENDPOINT}={asked.url(tls=there.tls)}{asked.path.removesuffix(probe.TRACES)}"]
        return []
    grpc = there.service == probe.GRPC
    wrong_path = not grpc and not asked.grpc and asked.path != probe.TRACES
    changes = []
    if there.tls != asked.tls or wrong_path:
        changes.append(f"{_ENDPOINT}={asked.url(tls=there.tls)}")
    if grpc != asked.grpc:
        changes.append(f"{_PROTOCOL}={'grpc' if grpc else 'http/protobuf'}")
    return changes


def _other_port(asked: Asked, there: There) -> str:
    if (there.service == probe.GRPC) == asked.grpc:
        return ""
    if asked.neighbour:
        return f", or {_ENDPOINT}={asked.neighbour}"
    return f", or the port for {'grpc, usually 4317' if asked.grpc else 'HTTP, usually 4318'}"


def _neighbour(asked: Asked) -> str:
    protocol = " (with grpc)" if asked.grpc else ""
    return f"Set {_ENDPOINT}={asked.neighbour}{protocol}: spans are taken there."


def _credentials(asked: Asked) -> str:
    example = "OTEL_EXPORTER_OTLP_HEADERS=authorization=Bearer%20KEY"
    if asked.sent_headers:
        return (
            f"It refuses the credentials: correct OTEL_EXPORTER_OTLP_HEADERS (sent: {', '.join(asked.sent_headers)})."
        )
    return f"It wants credentials: set {example}, or the header that it asks for."
