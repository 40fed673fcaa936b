"""Under `opentelemetry-instrument`, which makes a provider of the environment's variables before the program runs."""

from __future__ import annotations

import json

import pytest

from .conftest import NAME
from .whole import assert_nothing_lost, assert_whole

pytest.importorskip("opentelemetry.instrumentation.auto_instrumentation")
pytest.importorskip("opentelemetry.distro")
COMMON = {
    "OTEL_SERVICE_NAME": NAME,
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    # What else is installed here, for other tests.
    "OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "fastapi,asgi",
}


def test_over_grpc_which_is_its_default(told, grpc):
    """The distribution sets the protocol itself, and nobody is told of a variable that he has not set."""
    account = told("", instrumented=True, **COMMON, OTEL_EXPORTER_OTLP_ENDPOINT=grpc.endpoint)
    assert_nothing_lost(account, way="application", said=str(grpc.port), quiet=True)
    assert_whole(grpc, service=NAME)


def test_over_grpc_without_a_scheme(told, grpc):
    """`host:port` is an endpoint of gRPC's."""
    endpoint = f"127.0.0.1:{grpc.port}"
    how = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_INSECURE": "true"}
    account = told("", instrumented=True, **COMMON, **how)
    assert_nothing_lost(account, way="application", said=endpoint, quiet=True)
    assert_whole(grpc, service=NAME)


def test_over_http(told, http):
    """By the two variables that everybody sets."""
    how = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    account = told("", instrumented=True, **COMMON, **how)
    assert_nothing_lost(account, way="application", said=http.url, quiet=True)
    assert_whole(http, service=NAME)


def test_it_starts_recording_itself(told, http):
    """Without `GPUSCOPE`, too."""
    how = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    account = told("", instrumented=True, **COMMON, **how, GPUSCOPE="")
    assert_nothing_lost(account, way="application", said=http.url, quiet=True)
    assert_whole(http, service=NAME)


def test_the_console_as_exporter(told, http):
    """Beside OTLP; then finished spans go to both."""
    how = {"OTEL_EXPORTER_OTLP_ENDPOINT": http.endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    # The console's lines are the program's output, so the account is not the last of them.
    account = told(
        "", instrumented=True, **COMMON, **how, OTEL_TRACES_EXPORTER="otlp,console", OTEL_BSP_SCHEDULE_DELAY="60000"
    )
    assert_nothing_lost(
        account, way="processors", said="ConsoleSpanExporter` is not OpenTelemetry's for OTLP", quiet=True
    )
    assert_whole(http, service=NAME)


def doctor(play, **environment):
    """What `gpuscope doctor` finds, by subject."""
    found = json.loads(play("", instrumented=True, command=("-m", "gpuscope", "doctor", "--json"), **environment))
    return {finding["subject"]: finding for finding in found["findings"]}


def test_the_doctor_says_which_way_it_is(play, grpc):
    """And has no complaint of settings that are not the user's."""
    found = doctor(play, **COMMON, OTEL_EXPORTER_OTLP_ENDPOINT=f"127.0.0.1:{grpc.port}")
    assert found["exporter"]["seen"].endswith("this process has a TracerProvider, so: application")
    assert {subject: finding["seen"] for subject, finding in found.items() if finding["verdict"] != "ok"} == {}


def test_the_doctor_says_why_it_is_the_other_way(play, http):
    """By the part that may do something to a span."""
    found = doctor(play, **COMMON, OTEL_TRACES_EXPORTER="console")
    assert "ConsoleSpanExporter` is not" in found["exporter"]["seen"]
    assert found["exporter"]["seen"].endswith("so: processors")
