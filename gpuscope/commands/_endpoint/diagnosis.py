"""
An OTLP endpoint is sent one span; where that fails, what is there is looked at, and what to set is said.

Takes some five seconds at most. Shows neither credentials nor what a server says beyond its name.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from threading import Event
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from gpuscope._settings.environment import export, variables
from gpuscope._settings.shown import shown_url
from gpuscope._version import __version__
from gpuscope.commands._endpoint import probe
from gpuscope.commands._endpoint.advice import Asked, with_answer, without_connection
from gpuscope.exporters._encoding.otlp_message import rejected_spans, varint
from gpuscope.exporters._encoding.resource import resource_attributes
from gpuscope.exporters._transport.grpc_client import TRACES, client_for
from gpuscope.exporters._transport.http import Endpoint, Outcome
from gpuscope.exporters._transport.route import find_route
from gpuscope.exporters._transport.sender import without_instrumentation
from gpuscope.exporters.otlp import Envelope

if TYPE_CHECKING:
    from gpuscope._settings.config import Config

TEST_SPAN = "gpuscope doctor"
_SPAN_TIMEOUT_S, _CONNECT_TIMEOUT_S, _PROBE_TIMEOUT_S = 2.0, 1.5, 1.0
USUAL_PORTS = 4318, 4317
"""Of OTLP, by HTTP and by gRPC."""
_PORTS = {"http": 80, "https": 443}
_NO_CONNECTION = {None: "resolver", False: "unresolved"}
_MOST_QUOTED = 300
_VARIABLES = "Correct the variables OTEL_EXPORTER_OTLP_*."


@dataclass(frozen=True)
class Diagnosis:
    """What came of an endpoint."""

    ok: bool
    seen: str
    advice: str = ""


def diagnose(config: Config, usual_ports: tuple[int, int] = USUAL_PORTS) -> Diagnosis:
    """
    Send the endpoint of these settings a span, and say what came of it.

    Args:
        config: the settings.
        usual_ports: of OTLP, by HTTP and by gRPC: where spans may be taken if not at the endpoint.

    """
    url = config.traces_url
    shown, asked = shown_url(url), _asked(config)
    # What `grpcio` says of connections on standard error is found out here, and said in words.
    export({"GRPC_VERBOSITY": variables().get("GRPC_VERBOSITY", "NONE")})
    by = f", by the proxy {asked.proxy} of the environment" if asked.proxy else ""
    if not asked.proxy and (why := _no_connection(asked)):
        said, advice = without_connection(_with_neighbour(asked, usual_ports), why)
        return Diagnosis(ok=False, seen=f"{shown} did not take a test span ({said})", advice=advice)
    outcome = _sent(config)
    if not outcome.reason:
        return Diagnosis(ok=True, seen=f"{shown} took a test span named `{TEST_SPAN}`{by}")
    reason = f"{outcome.reason}: {outcome.detail}" if outcome.detail else outcome.reason
    seen = f"{shown} did not take a test span{by} ({reason})"
    if outcome.reason == "rejected":
        return Diagnosis(
            ok=False, seen=seen, advice="Look at the log of the receiver, or at the limits of the account."
        )
    if outcome.reason == "invalid_request":
        return Diagnosis(
            ok=False, seen=seen, advice="Correct the proxy of the environment." if asked.proxy else _VARIABLES
        )
    there = probe.There(probe.NOTHING)
    if not asked.proxy or not _no_connection(asked):
        there = probe.what_is_there(asked.host, asked.port, _PROBE_TIMEOUT_S)
    what, advice = with_answer(_with_neighbour(asked, usual_ports), there, outcome.reason)
    return Diagnosis(ok=False, seen=f"{seen}; {what}" if what else seen, advice=advice)


def _asked(config: Config) -> Asked:
    parts = urlsplit(config.traces_url)
    return Asked(
        host=str(parts.hostname),
        port=parts.port or _PORTS[parts.scheme],
        tls=parts.scheme == "https",
        grpc=config.otlp_protocol == "grpc",
        path=parts.path,
        sent_headers=tuple(config.otlp_headers),
        proxy=_proxy(parts, grpc=config.otlp_protocol == "grpc"),
    )


def _proxy(parts: SplitResult, *, grpc: bool) -> str:
    """Return the proxy that the environment has for a URL, without secrets."""
    host = str(parts.hostname)
    if grpc:  # As `grpcio` chooses it, whether with TLS or without.
        found = getproxies()
        chosen = found.get("grpc") or found.get("https") or found.get("http")
        return shown_url(chosen) if chosen and not proxy_bypass(host) else ""
    try:
        route = find_route(parts.geturl())
    except ValueError:
        return "(not usable)"  # Sending says why.
    if route.tunnel is None and not route.target.startswith(("http://", "https://")):
        return ""
    return f"http{'s' * (route.tls and route.tunnel is None)}://{route.host}:{route.port}"


def _no_connection(asked: Asked) -> str:
    """Return why there is no connection, or nothing where there is one."""
    resolved = probe.resolves(asked.host, asked.port, _CONNECT_TIMEOUT_S)
    return probe.connects(asked.host, asked.port, _CONNECT_TIMEOUT_S) if resolved else _NO_CONNECTION[resolved]


def _with_neighbour(asked: Asked, usual_ports: tuple[int, int]) -> Asked:
    """Look whether the usual port of the same host takes spans, by the protocol that is set."""
    port, service = usual_ports[asked.grpc], (probe.GRPC if asked.grpc else probe.OTLP_HTTP)
    if port == asked.port:
        return asked
    nothing = probe.There(probe.NOTHING)
    (there,) = probe.at_once(_PROBE_TIMEOUT_S, nothing, lambda: probe.what_is_there(asked.host, port, _PROBE_TIMEOUT_S))
    return replace(asked, neighbour=replace(asked, port=port).url(tls=there.tls)) if there.service == service else asked


def _sent(config: Config) -> Outcome:
    """Send one span, once."""
    endpoint = replace(Endpoint.for_traces(config), timeout_s=min(config.otlp_timeout_s, _SPAN_TIMEOUT_S))
    interrupt = Event()
    interrupt.set()  # There is no second attempt.
    client = client_for(endpoint, TRACES, interrupt, version=__version__)
    now = time.time_ns()
    span = Span(
        name=TEST_SPAN,
        trace_id=os.urandom(16),
        span_id=os.urandom(8),
        kind=Span.SPAN_KIND_INTERNAL,
        start_time_unix_nano=now - 1000,
        end_time_unix_nano=now,
    ).SerializeToString()
    with without_instrumentation():
        outcome = client.post(Envelope(resource_attributes(), __version__).wrap([b"\x12" + varint(len(span)) + span]))
    client.close()
    return outcome if outcome.reason else _judged(outcome.body)


def _judged(body: bytes) -> Outcome:
    """Return what the answer to an accepted request says: a web server accepts anything."""
    rejected, message = rejected_spans(body)
    if rejected:
        said = "".join(sign for sign in message[:_MOST_QUOTED] if sign.isprintable())
        return Outcome("rejected", said or "the endpoint does not say why")
    try:
        ExportTraceServiceResponse.FromString(body)
    except DecodeError:
        if not body.lstrip().startswith(b"{"):  # Some answer in JSON.
            return Outcome("not_otlp", "it answered 200, with something else than OTLP's answer")
    return Outcome()
