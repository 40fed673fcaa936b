"""Tools that set up tracing themselves: which way stages go beside each, and that they come."""

from __future__ import annotations

import json

import pytest

from .conftest import NAME
from .test_by_hand import BATCHES, BY_HAND, HTTP
from .whole import assert_nothing_lost, assert_whole, groups_of

SENTRY = """
import sentry_sdk
from sentry_sdk.integrations.otlp import OTLPIntegration

sentry_sdk.init(
    dsn=sys.argv[2].replace("//", "//public@", 1) + "/7",
    default_integrations=False,
    integrations=[OTLPIntegration()],
)
"""
PHOENIX = f"""
from opentelemetry.sdk.resources import Resource
from phoenix.otel import register

register(
    endpoint=urls[0],
    batch=BATCH,
    project_name="a project",
    protocol=sys.argv[2],
    verbose=False,
    resource=Resource.create({{"service.name": {NAME!r}}}),
)
"""
LOGFIRE = f"""
import logfire
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

logfire.configure(
    service_name={NAME!r},
    send_to_logfire=False,
    console=False,
    inspect_arguments=False,
    metrics=False,
    additional_span_processors=[SimpleSpanProcessor(OTLPSpanExporter(urls[0]))] if BY == "processor" else [],
)
"""
DATADOG = """
from ddtrace.trace import TraceFilter, tracer as datadog

kept = []


class Keep(TraceFilter):
    def process_trace(self, trace):
        kept.extend(trace)  # And nothing is sent.


datadog.configure(trace_processors=[Keep()])
from ddtrace.opentelemetry import TracerProvider

trace.set_tracer_provider(TracerProvider())
import atexit
atexit.register(lambda: print(json.dumps([[s.resource, s.span_id, s.parent_id, str(s.trace_id)] for s in kept])))
"""


def test_sentry_beside_the_applications_exporter(told, http, other_http):
    """Two targets, each with the whole trace; Sentry's has its credential."""
    pytest.importorskip("sentry_sdk")
    account = told(BY_HAND + HTTP + BATCHES.replace("urls", "urls[:1]") + SENTRY, http.url, other_http.endpoint)
    assert_nothing_lost(account, way="application", said=f"{http.url}, {other_http.endpoint}/api/7/")
    for receiver in (http, other_http):
        assert_whole(receiver, service=NAME)
    assert all("sentry_key=public" in request.headers["x-sentry-auth"] for request in other_http.requests)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_phoenix(told, http, grpc, protocol, batch):
    """Its tracer puts the session and the user of a context on every span, so stages' are made one by one."""
    pytest.importorskip("phoenix.otel")
    receiver, url = (grpc, grpc.endpoint) if protocol == "grpc" else (http, http.url)
    account = told(PHOENIX.replace("BATCH", str(batch)), url, protocol)
    assert_nothing_lost(account, way="sdk", said="its tracer is a `openinference.instrumentation")
    assert_whole(receiver, service=NAME)
    assert any(item.key == "openinference.project.name" for item in groups_of(receiver)[0].resource.attributes)


@pytest.mark.parametrize("by", ["processor", "environment"])
def test_logfire(told, http, by):
    """It wraps every processor, to scrub spans, and makes ids of its own; so spans are made one by one."""
    pytest.importorskip("logfire")
    environment = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": http.url} if by == "environment" else {}
    account = told(LOGFIRE.replace("BY", repr(by)), http.url, **environment)
    assert_nothing_lost(account, way="sdk", said="the provider is a `logfire.")
    assert_whole(http, service=NAME)


@pytest.mark.parametrize(
    ("contexts", "above"), [("contextvars_context", "attention"), ("ddcontextvars_context", "request")]
)
def test_datadog(play, contexts, above):
    """
    Its provider is none of OpenTelemetry's: stages are made one by one, as spans of Datadog's traces.

    In its own contexts, its spans are no children of stages; `tests/coexistence/test_ddtrace.py` says why.
    """
    pytest.importorskip("ddtrace")
    how = {"DD_TRACE_OTEL_ENABLED": "true", "OTEL_PYTHON_CONTEXT": contexts}
    account, spans = map(json.loads, play(DATADOG, **how).splitlines()[-2:])
    assert_nothing_lost(account, way="sdk", said="the provider is a `ddtrace.")
    names = {span_id: name for name, span_id, _, _ in spans}
    parents = {"request": None, "infer": "request", "attention": "infer", "look up": above}
    assert {name: names.get(parent_id) for name, _, parent_id, _ in spans} == parents
    assert len(spans) == 4
    assert len({trace_id for *_, trace_id in spans}) == 1
