"""One payload to one endpoint: what is sent, what is tried again, what is a loss."""

from __future__ import annotations

import dataclasses
import datetime as dt
import gzip
import http.client
import ssl
import time
from email.utils import format_datetime

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from gpuscope._settings.config import Config
from gpuscope.exporters._transport.connection import NotHttpError
from gpuscope.exporters._transport.http import Endpoint, _failure

from .receiver import Answer, rejects

PAST = format_datetime(dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc), usegmt=True)


def test_spans_arrive(make_exporter, otlp_receiver, send, account):
    """What is exported comes to the endpoint as OTLP/HTTP, by itself and after the delay."""
    send(make_exporter(otlp_headers={"x-key": "secret"}), 3)
    (request,) = otlp_receiver.wait_for(1)
    assert request.path == "/v1/traces"
    assert request.headers["content-type"] == "application/x-protobuf"
    assert request.headers["x-key"] == "secret"
    assert request.headers["user-agent"].startswith("OTel-OTLP-Exporter-gpuscope/")
    assert [span.name for span in otlp_receiver.spans] == ["infer"] * 3


def test_gzip(make_exporter, otlp_receiver, send):
    """With compression the body is gzip and says so, and is the smaller for it."""
    exporter = make_exporter(otlp_compression="gzip")
    send(exporter, 100)
    assert exporter.flush(10)
    (request,) = otlp_receiver.requests
    assert request.headers["content-encoding"] == "gzip"
    assert len(request.raw) < len(request.body) / 4
    assert len(otlp_receiver.spans) == 100


def test_what_says_how_the_body_is_read_is_ours_to_say(make_exporter, otlp_receiver, send, account):
    """A header of the settings that would make the body unreadable is not sent; the others are."""
    wrong = {"Content-Length": "1", "transfer-encoding": "chunked", "Content-Encoding": "br", "content-type": "text/x"}
    exporter = make_exporter(otlp_headers={**wrong, "X-Key": "secret"})
    send(exporter, 3)
    assert exporter.flush(10)
    (request,) = otlp_receiver.requests
    assert request.headers["content-type"] == "application/x-protobuf"
    assert request.headers["content-length"] == str(len(request.raw))
    assert not {"content-encoding", "transfer-encoding"} & {name.lower() for name in request.headers}
    assert request.headers["x-key"] == "secret"
    assert account.exported == 3


@pytest.mark.parametrize(
    ("error", "reason", "again"),
    [
        (NotHttpError("HTTP/2"), "not_http", False),
        (ssl.SSLCertVerificationError(1, "secret"), "tls", False),
        (TimeoutError(), "timeout", True),
        (ConnectionRefusedError(111, "refused"), "unreachable", True),
        (http.client.RemoteDisconnected(), "unreachable", True),
        (http.client.BadStatusLine("secret"), "unreachable", True),
        (http.client.InvalidURL("secret"), "invalid_request", False),
        (ValueError("secret"), "invalid_request", False),
        (RuntimeError("secret"), "error", False),
    ],
)
def test_only_a_failure_that_may_pass_is_tried_again(error, reason, again):
    """What the settings or the other side's protocol are to blame for stays as it is."""
    outcome = _failure(error)
    assert (outcome.reason, outcome.retry) == (reason, again)
    assert "secret" not in outcome.detail


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_passing_failure_is_tried_again(make_exporter, otlp_receiver, send, account, status):
    """The statuses that OTLP calls retryable are retried, with the same bytes, until it works."""
    otlp_receiver.answer(status, status)
    exporter = make_exporter()
    send(exporter)
    assert exporter.flush(10)
    assert account.exported == 1
    first, *others = otlp_receiver.requests
    assert [request.raw for request in others] == [first.raw] * 2


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 301, 302, 307])
def test_a_lasting_failure_is_a_counted_loss(make_exporter, otlp_receiver, send, account, status):
    """Other statuses lose the payload at once, with the status as the reason; the next payload is sent."""
    otlp_receiver.answer(Answer(status, headers={"Location": f"{otlp_receiver.endpoint}/elsewhere"}))
    exporter = make_exporter()
    send(exporter, 2)
    assert exporter.flush(10)
    send(exporter)
    assert exporter.flush(10)
    assert account.lost == {f"http_{status}": 2}
    assert account.exported == 1
    assert len(otlp_receiver.requests) == 2


@pytest.mark.parametrize("asked", ["0", "past", "nonsense", "-5", "", "\u00b2"])
def test_no_answer_makes_a_busy_loop(make_exporter, otlp_receiver, send, account, asked):
    """Where the endpoint asks for no wait, or for nothing that can be read, ours is kept."""
    otlp_receiver.answer(*[Answer(503, headers={"Retry-After": PAST if asked == "past" else asked})] * 50)
    exporter = make_exporter(backoff_s=0.05, otlp_timeout_s=0.25)
    send(exporter)
    assert exporter.flush(10)
    assert sum(account.lost.values()) == 1  # By the status or, where the last attempt was late, by the time.
    assert 1 <= len(otlp_receiver.requests) <= 10


def test_a_longer_wait_is_honoured(make_exporter, otlp_receiver, send, account):
    """The wait that the endpoint asks for replaces a shorter one of ours."""
    otlp_receiver.answer(Answer(503, headers={"Retry-After": "1"}))
    exporter = make_exporter()
    began = time.monotonic()
    send(exporter)
    assert exporter.flush(10)
    assert account.exported == 1
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    "wait",
    [{"backoff_s": 3600}]
    + [{"headers": {"Retry-After": asked}} for asked in ("3600", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT")],
)
def test_no_wait_beyond_the_time_of_a_request(make_exporter, otlp_receiver, send, account, wait):
    """Where the wait would outlast the payload's time, the payload is lost without waiting."""
    otlp_receiver.answer(Answer(503, headers=wait.get("headers", {})))
    exporter = make_exporter(backoff_s=wait.get("backoff_s", 0.001))
    send(exporter)
    assert exporter.flush(10)
    assert account.lost == {"http_503": 1}


def test_a_dropped_connection_is_tried_again(make_exporter, otlp_receiver, send, account):
    """An endpoint that closes the connection without an answer is asked again."""
    otlp_receiver.answer(Answer(drop=True), Answer(drop=True))
    exporter = make_exporter()
    send(exporter)
    assert exporter.flush(10)
    assert account.exported == 1


def test_nobody_listens(make_exporter, otlp_receiver, send, account, caplog):
    """An endpoint that is not there loses stages as `unreachable`, with one line in the log."""
    otlp_receiver.refuse()
    exporter = make_exporter(otlp_timeout_s=0.5)
    for _ in range(2):
        send(exporter)
        assert exporter.flush(10)
    assert account.lost == {"unreachable": 2}
    assert len(caplog.records) == 1
    assert "unreachable (ConnectionRefusedError" in caplog.text


def test_an_endpoint_that_hangs_is_given_up(make_exporter, otlp_receiver, send, account):
    """A request without an answer is a loss as `timeout` when its time is over, and the next is sent."""
    otlp_receiver.answer(Answer(hang=True))
    exporter = make_exporter(otlp_timeout_s=0.1)
    send(exporter)
    assert exporter.flush(10)
    assert account.lost == {"timeout": 1}
    send(exporter)
    assert exporter.flush(10)
    assert account.exported == 1


@pytest.mark.parametrize(
    "answer",
    [
        Answer(body=b"<html>what?</html>"),
        Answer(body=b"\xff" * 1000),
        Answer(body=b"{}", headers={"Content-Type": "application/json"}),
        Answer(body=b"no gzip", headers={"Content-Encoding": "gzip"}),
        Answer(status=202),
        Answer(status=204),
        Answer(body=b"short", headers={"Content-Length": "5000"}, ends=True),
        Answer(body=b"x" * 1_000_000),
        rejects(-5),
        Answer(body=ExportTraceServiceResponse().SerializeToString()),
    ],
)
def test_an_accepted_request_is_delivered_whatever_the_answer_says(make_exporter, otlp_receiver, send, account, answer):
    """Garbage in an answer does not undo the status, and does not spoil the next request."""
    otlp_receiver.answer(answer)
    exporter = make_exporter()
    for _ in range(2):
        send(exporter)
        assert exporter.flush(10)
    assert (account.exported, account.lost) == (2, {})


def test_rejected_spans_are_counted_though_the_message_is_too_long(make_exporter, otlp_receiver, send, account):
    """The number stands at the beginning of the answer, which is not read whole."""
    response = ExportTraceServiceResponse.FromString(rejects(1).body)
    response.partial_success.error_message = "no room " * 20_000
    otlp_receiver.answer(Answer(body=response.SerializeToString()))
    exporter = make_exporter()
    send(exporter)
    assert exporter.flush(10)
    assert (account.exported, account.lost) == (0, {"rejected": 1})


def test_rejected_spans_are_counted(make_exporter, otlp_receiver, send, account, caplog):
    """Spans that the endpoint says it rejected are losses, never more than there were stages."""
    exporter = make_exporter(schedule_delay_s=3600)
    for rejected in (3, 1000):
        otlp_receiver.answer(rejects(rejected))
        for _ in range(2):
            send(exporter, 2)
        assert exporter.flush(10)
    account.check()
    assert (account.exported, account.lost) == (1, {"rejected": 7})
    assert "no room" in caplog.text


def test_rejected_spans_are_counted_in_a_compressed_answer(make_exporter, otlp_receiver, send, account):
    """Some endpoints compress what nobody asked them to."""
    body = gzip.compress(rejects(2).body)
    otlp_receiver.answer(Answer(body=body, headers={"Content-Encoding": "gzip"}))
    exporter = make_exporter()
    send(exporter, 3)
    assert exporter.flush(10)
    assert (account.exported, account.lost) == (1, {"rejected": 2})


@pytest.mark.parametrize(
    "settings",
    [
        {"otlp_endpoint": "localhost:4318"},
        {"otlp_endpoint": "http://[::1/v1"},
        {"otlp_headers": {"x-key": "secret\n"}},
        {"otlp_headers": {"x-key": "secr€t"}},
        {"otlp_certificate": "/nowhere.pem", "otlp_endpoint": "https://localhost:1"},
    ],
)
def test_settings_that_cannot_work_are_a_counted_loss(make_exporter, send, account, caplog, settings):
    """What is wrong with a setting costs spans and not the program, and its secrets stay out of the log."""
    exporter = make_exporter(**settings)
    send(exporter)
    assert exporter.flush(10)
    assert account.lost == {"invalid_request": 1}
    assert "secr" not in caplog.text


@pytest.mark.parametrize(("signal", "prefix"), [("traces", "otlp"), ("metrics", "otlp_metrics")])
def test_an_endpoint_has_the_settings_of_its_signal(signal, prefix):
    """Each part of the endpoint is the setting of the same name, of spans or of metrics."""
    texts = ("certificate", "client_certificate", "client_key")
    settings = {f"{each}_{name}": f"{each}/{name}" for each in ("otlp", "otlp_metrics") for name in texts}
    times, keys = {"otlp_timeout_s": 1.0, "otlp_metrics_timeout_s": 2.0}, {"otlp_headers": {"a": "b"}}
    config = Config().changed(**settings, **times, **keys, otlp_compression="gzip", otlp_metrics_headers={"c": "d"})
    endpoint = getattr(Endpoint, f"for_{signal}")(config)
    for field in dataclasses.fields(endpoint):
        setting = f"{signal}_url" if field.name == "url" else f"{prefix}_{field.name}"
        assert getattr(endpoint, field.name) == getattr(config, setting), field.name


def test_a_web_page_is_no_acceptance(make_exporter, otlp_receiver, send, account):
    """A server that answers whatever is asked with its start page, as Jaeger's user interface does, takes no spans."""
    otlp_receiver.answer(Answer(body=b"<!doctype html>", headers={"Content-Type": "Text/HTML; charset=utf-8"}))
    exporter = make_exporter()
    send(exporter)
    exporter.flush(10)
    assert account.lost == {"not_otlp": 1}
