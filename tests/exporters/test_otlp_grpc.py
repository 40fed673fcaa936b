"""OTLP over gRPC by gpuscope itself, against a real server."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time

import grpc
import pytest

from gpuscope._settings.config import Config
from gpuscope.exporters._transport import grpc_client
from gpuscope.exporters.otlp import OtlpExporter

from .receiver_of_grpc import GrpcReceiver

pytestmark = pytest.mark.skipif(not grpc_client.has_grpc(), reason="needs grpcio")


@pytest.fixture
def receiver():
    """A server."""
    with contextlib.closing(GrpcReceiver()) as made:
        yield made


@pytest.fixture
def make(receiver):
    """Return a function that makes an exporter for it."""
    made = []

    def exporter(backoff_s=0.001, **settings):
        given = {"otlp_protocol": "grpc", "otlp_base_endpoint": receiver.endpoint, "schedule_delay_s": 0.001}
        config = Config().changed(**{**given, **settings})
        made.append(OtlpExporter(config, {"service.name": "tests"}, backoff_s=backoff_s))
        return made[-1]

    yield exporter
    for each in made:
        each.shutdown(5)


def test_spans_arrive(make, send, account, receiver):
    """With the headers that were given, and the name of who sends."""
    exporter = make(otlp_headers={"X-Tenant": "a"})
    send(exporter, 3)
    assert exporter.flush(20)
    assert len(receiver.spans) == 3
    (resource,) = (group.resource for group in receiver.requests[0].resource_spans)
    assert resource.attributes[0].value.string_value == "tests"
    assert receiver.metadata[0]["x-tenant"] == "a"
    assert receiver.metadata[0]["user-agent"].startswith("gpuscope/")
    assert account.exported == 3


@pytest.mark.parametrize("compression", ["gzip", "none", "deflate"])
def test_compression(make, send, receiver, compression):
    """GRPC's own; it has no `deflate` in Python, and then sends plain."""
    exporter = make(otlp_compression=compression)
    send(exporter, 3)
    assert exporter.flush(20)
    assert len(receiver.spans) == 3


@pytest.mark.parametrize(("code", "taken"), [("UNAVAILABLE", True), ("ABORTED", True), ("INVALID_ARGUMENT", False)])
def test_codes_that_may_pass_are_tried_again(make, send, receiver, code, taken):
    """Those of the specification of OTLP, and no others."""
    receiver.codes = [getattr(grpc.StatusCode, code)]
    exporter = make()
    send(exporter)
    assert exporter.flush(20)
    assert len(receiver.spans) == int(taken)


@pytest.mark.parametrize("asked", [True, False])
def test_a_receiver_that_is_exhausted_says_when_to_come_again(make, send, account, receiver, asked):
    """Or it is not asked again."""
    receiver.codes, receiver.retry_s = [grpc.StatusCode.RESOURCE_EXHAUSTED], 0.05 if asked else None
    exporter = make()
    send(exporter)
    began = time.monotonic()
    assert exporter.flush(20)
    assert account.lost == ({} if asked else {"grpc_resource_exhausted": 1})
    assert time.monotonic() - began > 0.05 * asked


def test_spans_that_are_rejected_are_counted(make, send, account, receiver):
    """By the answer's `partial_success`."""
    receiver.rejects = 1
    exporter = make()
    send(exporter, 2)
    exporter.flush(20)
    assert account.lost == {"rejected": 1}


def test_nobody_answers(make, send, account):
    """The request ends with its time."""
    exporter = make(otlp_base_endpoint="http://127.0.0.1:9", otlp_timeout_s=0.2)
    send(exporter)
    began = time.monotonic()
    exporter.flush(20)
    assert time.monotonic() - began < 10
    (reason,) = account.lost
    assert reason in ("grpc_unavailable", "grpc_deadline_exceeded")


def test_without_grpcio_it_is_said_what_to_do(make, send, account, caplog, monkeypatch):
    """The extra, or the other protocol and port."""
    find = importlib.util.find_spec
    monkeypatch.setattr(grpc_client, "find_spec", lambda name: None if name == "grpc" else find(name))
    exporter = make()
    send(exporter)
    exporter.flush(20)
    exporter.shutdown(20)
    exporter._sender._thread.join(20)  # It logs last.
    assert account.lost == {"no_grpc": 1}
    assert 'pip install "gpuscope[grpc]"' in caplog.text
    assert "4318" in caplog.text


def test_a_header_that_cannot_be_sent_is_not_shown(make, send, account, caplog):
    """It may be a credential."""
    exporter = make()
    exporter._sender._client._endpoint.headers["x-key"] = "geheim\n"
    send(exporter)
    exporter.flush(20)
    exporter.shutdown(20)
    exporter._sender._thread.join(20)
    assert set(account.lost) <= {"invalid_request", "grpc_internal"}
    assert account.lost
    assert "geheim" not in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_sends_on_its_own(make, send, receiver):
    """With a channel of its own, while the parent's goes on."""
    exporter = make()
    send(exporter)
    assert exporter.flush(20)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            own = make()
            send(own)
            os._exit(0 if own.flush(10) else 1)
        os._exit(2)
    _, status = os.waitpid(child, 0)
    send(exporter)
    assert exporter.flush(20)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(receiver.spans) == 3


def test_urls():
    """A URL of gRPC has no path, and its usual port is 4317."""
    config = Config().changed(otlp_protocol="grpc")
    assert config.traces_url == "http://localhost:4317"
    assert config.changed(otlp_base_endpoint="http://collector:99").traces_url == "http://collector:99"
    assert config.metrics_url == "http://localhost:4318/v1/metrics"
    assert Config.from_env({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})[0].metrics_url == "http://localhost:4317"


def test_metrics_go_over_grpc(receiver):
    """And where the receiver has no service for them, none are sent."""
    from gpuscope import _runtime, stage

    for takes in (True, False):
        with contextlib.closing(GrpcReceiver(takes_metrics=takes)) as server:
            settings = {"otlp_metrics_protocol": "grpc", "otlp_base_endpoint": server.endpoint, "otlp_protocol": "grpc"}
            config = Config().changed(mode="on", exporters="otlp", metrics="otlp", warmup=0, **settings)
            with _runtime.period(config) as engine:
                with stage("infer"):
                    pass
                assert engine.flush(20)
            assert bool(server.metrics) is takes
            assert server.names == ["infer"]
