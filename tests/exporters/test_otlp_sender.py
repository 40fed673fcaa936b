"""The road to the endpoint: retries, refusals and hangs; every stage is accounted for, and nobody waits."""

from __future__ import annotations

import datetime as dt
import logging
import threading
import time
from email.utils import format_datetime

import pytest
from opentelemetry import context
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from gpuscope._config import Config
from gpuscope.exporters._http import HttpClient, Outcome
from gpuscope.exporters._sender import Limits, Sender
from gpuscope.exporters.otlp import OtlpExporter

from .batches import Row, make_batch
from .receiver import Answer, rejects

RESOURCE = {"service.name": "tests"}


@pytest.fixture
def make_exporter(otlp_receiver):
    """Return a function that makes an exporter for the receiver; shut down at the end."""
    made = []

    def make(limits=None, backoff_s=0.001, **settings):
        config = Config().changed(**{"otlp_endpoint": otlp_receiver.url, "schedule_delay_s": 0.001, **settings})
        made.append(OtlpExporter(config, RESOURCE, backoff_s=backoff_s, limits=limits))
        return made[-1]

    yield make
    otlp_receiver.release()
    for exporter in made:
        exporter.shutdown(5)


@pytest.fixture
def send(account):
    """Return a function that exports so many stages as one batch."""

    def export(exporter, stages=1):
        batch = make_batch(*(Row(span_id=number + 1) for number in range(stages)))
        exporter.export(batch, account.open(batch))

    return export


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


def test_flush_sends_what_waits(make_exporter, otlp_receiver, send, account):
    """A flush does not wait for the delay, puts what waits into one request, and returns when it is settled."""
    exporter = make_exporter(schedule_delay_s=3600)
    for _ in range(5):
        send(exporter)
    assert exporter.pending_stages == 5
    assert exporter.flush(10)
    assert (account.exported, exporter.pending_stages, len(otlp_receiver.requests)) == (5, 0, 1)
    assert exporter.flush(10)


def test_many_stages_do_not_wait_for_the_delay(make_exporter, otlp_receiver, send):
    """A full payload goes at once, and no payload holds more than its limit."""
    exporter = make_exporter(limits=Limits(delay_s=3600, payload_stages=10))
    for _ in range(5):
        send(exporter, 4)
    otlp_receiver.wait_for(2)
    assert exporter.flush(10)
    sizes = [len(request.message.resource_spans[0].scope_spans[0].spans) for request in otlp_receiver.requests]
    assert sum(sizes) == 20
    assert max(sizes) <= 10


def test_a_batch_over_the_limit_goes_alone(make_exporter, otlp_receiver, send, account):
    """A single batch that is larger than a payload may be is sent all the same."""
    exporter = make_exporter(limits=Limits(delay_s=0, payload_stages=2, payload_bytes=10))
    send(exporter, 5)
    assert exporter.flush(10)
    assert account.exported == 5


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


@pytest.mark.parametrize("status", [400, 401, 404, 413, 500, 301])
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


@pytest.mark.parametrize("asked", ["0", "date", "nonsense"])
def test_retry_after_is_honoured(make_exporter, otlp_receiver, send, account, asked):
    """The wait that the endpoint asks for replaces ours, in seconds or as a date; what is neither is ignored."""
    past = format_datetime(dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc), usegmt=True)
    otlp_receiver.answer(Answer(503, headers={"Retry-After": past if asked == "date" else asked}))
    exporter = make_exporter(backoff_s=0.001 if asked == "nonsense" else 3600)
    send(exporter)
    assert exporter.flush(10)
    assert account.exported == 1


@pytest.mark.parametrize("wait", [{"backoff_s": 3600}, {"headers": {"Retry-After": "3600"}}])
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
    exporter = make_exporter(otlp_timeout_s=0.05)
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


def test_a_full_buffer_refuses_the_newest(make_exporter, otlp_receiver, send, account):
    """While the endpoint hangs, the buffer fills to its bound and then loses the newest; the older are kept."""
    otlp_receiver.answer(Answer(hang=True))
    exporter = make_exporter(limits=Limits(delay_s=0, buffer_bytes=3000), otlp_timeout_s=60)
    for _ in range(50):
        send(exporter)
    assert account.lost["buffer_full"] == 50 - exporter.pending_stages
    assert 5 < exporter.pending_stages < 15
    assert [bool(delivery.reports) for delivery in account.deliveries] == sorted(
        bool(delivery.reports) for delivery in account.deliveries
    )


def test_flush_keeps_its_deadline(make_exporter, otlp_receiver, send, account):
    """A flush of an endpoint that hangs returns False in time and loses nothing."""
    otlp_receiver.answer(Answer(hang=True))
    exporter = make_exporter(otlp_timeout_s=60)
    send(exporter)
    assert not exporter.flush(0.05)
    assert (account.pending, account.lost) == (1, {})


def test_shutdown_keeps_its_deadline(make_exporter, otlp_receiver, send, account):
    """At shutdown what hangs and what waits behind it is lost as `shutdown`, in time, each settled once."""
    otlp_receiver.answer(Answer(hang=True))
    exporter = make_exporter(otlp_timeout_s=60)
    send(exporter)
    otlp_receiver.wait_for(1)
    send(exporter, 2)
    began = time.monotonic()
    exporter.shutdown(0.05)
    assert time.monotonic() - began < 5
    assert account.lost == {"shutdown": 3}
    otlp_receiver.release()
    exporter._sender._thread.join(20)
    assert not exporter._sender._thread.is_alive()
    account.check()


def test_shutdown_sends_what_waits(make_exporter, otlp_receiver, send, account):
    """A shutdown within its time delivers everything and ends the thread; what comes later is lost, not kept."""
    exporter = make_exporter(schedule_delay_s=3600)
    send(exporter, 3)
    exporter.shutdown(10)
    assert account.exported == 3
    send(exporter)
    assert account.lost == {"shutdown": 1}
    exporter._sender._thread.join(20)
    assert not exporter._sender._thread.is_alive()
    exporter.shutdown(10)
    account.check()


def test_shutdown_ends_a_wait_with_a_last_attempt(make_exporter, otlp_receiver, send, account):
    """A payload that waits to be sent again is sent once more at shutdown, without the rest of the wait."""
    otlp_receiver.answer(503)
    exporter = make_exporter(backoff_s=1000, otlp_timeout_s=3600)
    send(exporter)
    otlp_receiver.wait_for(1)
    exporter.shutdown(20)
    assert account.exported == 1
    assert len(otlp_receiver.requests) == 2


def test_shutdown_does_not_insist(make_exporter, otlp_receiver, send, account):
    """At shutdown an endpoint that still fails is not asked a third time."""
    otlp_receiver.answer(*[503] * 5)
    exporter = make_exporter(backoff_s=1000, otlp_timeout_s=3600)
    send(exporter)
    otlp_receiver.wait_for(1)
    exporter.shutdown(20)
    assert account.lost == {"http_503": 1}
    assert len(otlp_receiver.requests) == 2


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


def test_the_log_says_it_once(make_exporter, otlp_receiver, send, caplog):
    """The first success is one line, the first failure of a kind is one line, and the rest is silence."""
    caplog.set_level(logging.INFO, "gpuscope")
    otlp_receiver.answer(200, 400, 400, 404)
    url = otlp_receiver.url.replace("http://", "http://user:secret@") + "?key=secret"
    exporter = make_exporter(otlp_endpoint=url)
    for _ in range(6):
        send(exporter)
        assert exporter.flush(10)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "WARNING"]
    assert f"exporting spans to {otlp_receiver.url}." in caplog.text
    assert "http_400" in caplog.text
    assert "secret" not in caplog.text


class OddClient:
    """A client that raises what no client should, and looks at the OpenTelemetry context it is called in."""

    shown_url = "nowhere"

    def __init__(self):
        self.seen = []

    def post(self, payload):
        self.seen.append(context.get_value("suppress_instrumentation"))
        if len(self.seen) == 1:
            raise MemoryError("odd")
        return Outcome()

    def close(self):
        pass


@pytest.fixture
def odd_sender():
    """A sender with a client that fails once."""
    sender = Sender(OddClient(), threading.Event(), b"".join, Limits(delay_s=0))
    yield sender
    sender.shutdown(5)


def test_the_thread_outlives_what_is_unforeseen(odd_sender, account):
    """An error of a kind that nobody thought of loses its payload, and the next is sent."""
    for _ in range(2):
        odd_sender.put(b"x", account.open(1))
        assert odd_sender.flush(10)
    assert (account.exported, account.lost) == (1, {"error": 1})


def test_requests_are_not_traced(odd_sender, account):
    """The sender's thread asks OpenTelemetry's instrumentation of HTTP clients to leave it alone."""
    odd_sender.put(b"x", account.open(1))
    assert odd_sender.flush(10)
    assert odd_sender._client.seen == [True]
    assert context.get_value("suppress_instrumentation") is None


def test_a_failing_log_handler_does_not_end_the_thread(make_exporter, otlp_receiver, send, account):
    """An application's log handler that raises costs nothing but the line."""

    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("no disk")

    handler = Broken()
    logger = logging.getLogger("gpuscope")
    logger.addHandler(handler)
    try:
        otlp_receiver.answer(400)
        exporter = make_exporter()
        for _ in range(2):
            send(exporter)
            assert exporter.flush(10)
    finally:
        logger.removeHandler(handler)
    assert (account.exported, account.lost) == (1, {"http_400": 1})


def test_many_threads_may_put(make_exporter, otlp_receiver, account):
    """Chunks put while others are sent arrive whole and are each settled once."""
    exporter = make_exporter(limits=Limits(delay_s=0, payload_stages=7))
    batch = make_batch(Row(), Row())
    body = exporter._encoder.encode(batch)
    deliveries = [account.open(batch) for _ in range(200)]

    def put(mine):
        for delivery in mine:
            exporter._sender.put(body, delivery)

    threads = [threading.Thread(target=put, args=(deliveries[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exporter.flush(30)
    account.check()
    assert account.exported == len(otlp_receiver.spans) == 400


def test_client_certificates_are_passed_on():
    """Certificate settings become what `requests` takes: one file, a pair, or the system's."""

    def client(**settings):
        made = HttpClient(Config().changed(**settings), threading.Event(), version="1")
        made.close()
        return made._verify, made._cert

    assert client() == (True, None)
    assert client(otlp_certificate="ca.pem", otlp_client_certificate="me.pem") == ("ca.pem", "me.pem")
    assert client(otlp_client_certificate="me.pem", otlp_client_key="me.key") == (True, ("me.pem", "me.key"))
