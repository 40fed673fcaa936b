"""The sender's thread: what waits, what is refused, what shutdown does; each stage is settled once, nobody waits."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from opentelemetry import context
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans

from gpuscope._data.batch import RowFlag, SpanDetails
from gpuscope.exporters._encoding.otlp_bytes import SpanEncoder
from gpuscope.exporters._encoding.otlp_message import split_stages
from gpuscope.exporters._transport.http import Outcome
from gpuscope.exporters._transport.sender import Limits, Sender

from .batches import Row, batches, make_batch
from .receiver import Answer


def test_a_batch_without_rows_is_settled_and_not_sent(make_exporter, otlp_receiver, send, account):
    """An empty batch costs no request."""
    exporter = make_exporter()
    send(exporter, 0)
    assert exporter.flush(10)
    account.check()
    assert otlp_receiver.requests == []


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


def test_without_a_thread_a_flush_sends(make_exporter, otlp_receiver, send, account, no_threads):
    """And so does the shutdown; what is refused then is lost, once."""
    exporter = make_exporter(schedule_delay_s=3600)
    send(exporter, 3)
    assert exporter.flush(10)
    send(exporter, 2)
    exporter.shutdown(10)
    assert account.exported == 5
    assert len(otlp_receiver.requests) == 2
    account.check()


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_without_a_thread_an_interrupt_is_the_programs(make_exporter, send, account, monkeypatch, error):
    """It comes out of the flush that sends, and what it broke off is lost once."""
    exporter = make_exporter()

    def interrupted(*_):
        raise error

    monkeypatch.setattr(exporter._sender._client, "post", interrupted)
    send(exporter)
    with pytest.raises(error):
        exporter.flush(10)
    assert account.lost == {"error": 1}
    account.check()


def test_without_a_thread_the_deadline_is_kept(make_exporter, otlp_receiver, send, account, no_threads):
    """A request that hangs ends with its own timeout, and no further one begins after the deadline."""
    otlp_receiver.answer(Answer(hang=True))
    exporter = make_exporter(limits=Limits(delay_s=0, payload_stages=1), otlp_timeout_s=0.1)
    for _ in range(3):
        send(exporter)
    exporter.shutdown(0.05)
    assert account.exported + sum(account.lost.values()) == 3
    assert account.lost["shutdown"] == 2
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
    assert caplog.text.count("Further warnings of this kind are suppressed. `gpuscope.statistics()` counts") == 2
    assert "secret" not in caplog.text


class OddClient:
    """A client that raises what no client should, and looks at the OpenTelemetry context it is called in."""

    shown_url = "nowhere"

    def __init__(self):
        self.seen = []

    def post(self, payload):
        """Fail the first time."""
        self.seen.append(context.get_value("suppress_instrumentation"))
        if len(self.seen) == 1:
            raise MemoryError("odd")
        return Outcome()

    def close(self):
        """Do nothing."""


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


@pytest.mark.parametrize("error", [RuntimeError("no disk"), SystemExit(1)], ids=repr)
def test_a_failing_log_handler_does_not_end_the_thread(make_exporter, otlp_receiver, send, account, error):
    """An application's log handler that raises costs nothing but the line."""

    class Broken(logging.Handler):
        def emit(self, record):
            raise error

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


def with_gpu(number, text=""):
    """Return a stage that has a GPU span."""
    details = SpanDetails({"prompt": text}) if text else None
    return Row(span_id=number, gpu_span_id=number | 1 << 63, details=details)


def test_what_is_too_large_goes_in_halves(make_exporter, otlp_receiver, account):
    """After a 413 only the stage that is too large alone is lost; the others arrive, in order and once."""
    otlp_receiver.most_bytes = 20_000
    exporter = make_exporter(schedule_delay_s=3600)
    for first in (1, 101):
        rows = [with_gpu(first + n, "x" * 50_000 * (first + n == 50)) for n in range(100)]
        batch = make_batch(*rows)
        list(exporter.export(batch, account.open(batch)))
    assert exporter.flush(20)
    assert (account.exported, account.lost) == (199, {"http_413": 1})
    account.check()
    hosts = [span for span in otlp_receiver.spans if not span.name.endswith("[gpu]")]
    assert [int.from_bytes(span.span_id, "big") for span in hosts] == [n for n in range(1, 201) if n != 50]
    assert len(otlp_receiver.spans) == 2 * 199


def test_an_endpoint_that_finds_everything_too_large_is_not_asked_for_ever(make_exporter, otlp_receiver, account, send):
    """A few dozen requests for one payload; all of it is lost."""
    otlp_receiver.most_bytes = 0
    exporter = make_exporter()
    send(exporter, 1000)
    assert exporter.flush(20)
    assert account.lost == {"http_413": 1000}
    assert otlp_receiver.refused <= 130


def test_a_shutdown_ends_the_halving(make_exporter, otlp_receiver, account, send):
    """What is sent in halves when the time is over counts by what is known: delivered, too large, or shut down."""
    otlp_receiver.most_bytes = 20_000
    otlp_receiver.answer(200, Answer(hang=True))
    exporter = make_exporter(schedule_delay_s=3600, otlp_timeout_s=60)
    send(exporter, 200)
    assert not exporter.flush(0)
    otlp_receiver.wait_for(2)
    exporter.shutdown(0.05)
    assert account.lost == {"shutdown": 200 - account.exported}
    assert 0 < account.exported < 200
    otlp_receiver.release()
    exporter._sender._thread.join(20)
    assert len(otlp_receiver.requests) <= 3  # The one that hung is tried a last time.
    account.check()


@settings(max_examples=50, deadline=None)
@given(batches())
def test_each_stage_is_a_part(batch):
    """The parts of an encoded batch are the stages, whatever they hold, and together they are the batch."""
    rows = make_rows_whole(batch)
    encoded = SpanEncoder().encode(rows)
    parts = split_stages(encoded)
    assert b"".join(parts) == encoded
    spans = [ScopeSpans.FromString(part).spans for part in parts]
    own = [[span.span_id for span in stage] for stage in spans]
    assert [int.from_bytes(ids[0], "big") for ids in own] == rows.span_id.tolist()
    assert all(len(stage) == 1 + bool(gpu) for stage, gpu in zip(spans, rows.gpu_span_id.tolist(), strict=True))


def make_rows_whole(batch):
    """Return the batch with ids as the collector gives them: below the bit that tells GPU spans; no inner stages."""
    count = len(batch.site)
    span_id = np.arange(1, count + 1, dtype=np.uint64)
    gpu_span_id = np.where(batch.gpu_span_id != 0, span_id | np.uint64(1 << 63), np.uint64(0))
    flags = batch.flags & ~np.uint32(RowFlag.IN_GRAPH)
    return replace(batch, span_id=span_id, gpu_span_id=gpu_span_id, flags=flags)
