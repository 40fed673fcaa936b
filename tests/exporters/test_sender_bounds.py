"""What the sender holds and what it sends at once, to the stage and to the byte; and how long it waits to try again."""

from __future__ import annotations

import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from gpuscope._settings.config import Config
from gpuscope.exporters._pieces import Chunk, post
from gpuscope.exporters._transport.http import Endpoint, HttpClient, Outcome
from gpuscope.exporters._transport.sender import Limits, Sender

from .conftest import free_port
from .receiver import rejects


class HeldClient:
    """Takes a payload and keeps its request in progress until released."""

    shown_url = "nowhere"

    def __init__(self):
        """Hold everything."""
        self.payloads, self.asked, self.released = [], threading.Semaphore(0), threading.Event()

    def post(self, payload):
        """Say that a request is in progress, and wait."""
        self.payloads.append(payload)
        self.asked.release()
        self.released.wait(60)
        return Outcome()

    def close(self):
        """Do nothing."""


@pytest.fixture
def new_sender(account):
    """Return a function that makes a sender, and one that gives it bytes for so many stages."""
    senders = []

    def new(**limits):
        client = HeldClient()
        sender = Sender(client, threading.Event(), b"|".join, Limits(**limits))
        senders.append(sender)

        def put(size, stages=1):
            delivery = account.open(stages)
            sender.put(b"x" * size, delivery)
            return delivery

        return sender, client, put

    yield new
    for sender in senders:
        sender._client.released.set()
        sender.shutdown(10)


def test_the_buffer_is_bounded_with_the_request_in_progress(new_sender, account):
    """What hangs in a request is still held, so it counts, to the byte."""
    sender, client, put = new_sender(delay_s=0, buffer_bytes=10)
    put(4, stages=3)
    assert client.asked.acquire(timeout=60)
    put(4)
    assert sender.pending_stages == 4
    put(3)
    assert account.lost == {"buffer_full": 1}
    put(2)
    assert account.lost == {"buffer_full": 1}
    assert sender.pending_stages == 5
    put(1)
    assert account.lost == {"buffer_full": 2}
    client.released.set()
    assert sender.flush(60)
    assert sender.pending_stages == 0
    assert account.exported == 5


@pytest.mark.parametrize(
    ("limits", "sizes", "sent"),
    [
        ({"payload_stages": 10}, [(1, 5), (2, 5), (3, 1)], [[1, 2], [3]]),
        ({"payload_stages": 10}, [(1, 5), (2, 6), (3, 4)], [[1], [2, 3]]),
        ({"payload_stages": 10}, [(1, 30), (2, 9), (3, 1)], [[1], [2, 3]]),
        ({"payload_bytes": 6}, [(2, 1), (4, 1), (1, 1)], [[2, 4], [1]]),
        ({"payload_bytes": 6}, [(3, 1), (4, 1), (2, 1)], [[3], [4, 2]]),
    ],
)
def test_a_payload_is_filled_up_to_its_limit(new_sender, limits, sizes, sent):
    """Batches are joined in their order as long as they fit."""
    sender, client, put = new_sender(delay_s=3600, buffer_bytes=1000, **{"payload_stages": 1000, **limits})
    with sender._changed:  # The thread begins when all are there.
        for size, stages in sizes:
            put(size, stages)
    client.released.set()
    assert sender.flush(60)
    assert [[len(part) for part in payload.split(b"|")] for payload in client.payloads] == sent


@pytest.mark.parametrize(("limits", "size", "stages"), [({"payload_stages": 10}, 1, 5), ({"payload_bytes": 10}, 5, 1)])
def test_a_full_payload_does_not_wait_for_its_delay(new_sender, limits, size, stages):
    """It goes when the limit is reached, and not when there is one missing."""
    sender, client, put = new_sender(delay_s=3600, **limits)
    put(size, stages)
    put(size - 1 or 1, stages - 1 or 1)
    assert not sender._is_due()
    assert not client.payloads
    put(1, 1)
    assert client.asked.acquire(timeout=60)
    client.released.set()


def test_what_comes_first_waits_its_delay_for_others(new_sender):
    """And no less; then it goes with what has come meanwhile."""
    _, client, put = new_sender(delay_s=0.2)
    began_s = time.monotonic()
    put(2)
    put(3)
    assert client.asked.acquire(timeout=60)
    assert time.monotonic() - began_s >= 0.2
    assert client.payloads == [b"xx|xxx"]


def test_an_endpoint_that_hangs_does_not_keep_the_process(new_sender):
    """Nobody joins the sender's thread when the interpreter ends."""
    sender, client, put = new_sender(delay_s=0)
    put(1)
    assert client.asked.acquire(timeout=60)
    assert sender._thread.is_alive()
    assert sender._thread.daemon


def test_what_is_not_sent_is_told_of_with_its_reason(new_sender, account, caplog):
    """Once for each: what had no room, what was left at the end, and what came after it."""
    sender, client, put = new_sender(delay_s=0, buffer_bytes=2)
    put(1)
    assert client.asked.acquire(timeout=60)
    for _ in range(2):
        put(2)
    sender.shutdown(0)
    put(1)
    assert account.lost == {"buffer_full": 2, "shutdown": 2}
    full, shut = (record.getMessage() for record in caplog.records)
    assert full.startswith("cannot export to nowhere: buffer_full (")
    assert shut.startswith("cannot export to nowhere: shutdown (the time ran out with spans unsent).")


def test_rejected_spans_are_taken_from_the_first_batches():
    """A stage for each, and no more than a batch has."""
    reports = []

    def settled(rejected, *batches):
        reports.clear()
        chunks = [
            Chunk(b"", SimpleNamespace(stages=stages, settle=lambda *report: reports.append(report)), 0.0)
            for stages in batches
        ]
        client = SimpleNamespace(post=lambda _: Outcome(body=rejects(rejected).body))
        outcome = post(chunks, client, b"".join, lambda: True)
        for chunk in chunks:
            chunk.settle(outcome.reason)
        return reports

    assert settled(3, 2, 2, 5) == [(0, {"rejected": 2}), (1, {"rejected": 1}), (5, {})]
    assert settled(9, 2) == [(0, {"rejected": 2})]


class Interrupt:
    """Notes the waits between attempts, in place of waiting; set after so many."""

    def __init__(self, waits):
        """Choose how many."""
        self.most, self.waits = waits, []

    def is_set(self):
        """Tell whether there were enough."""
        return len(self.waits) >= self.most

    def wait(self, seconds):
        """Note it."""
        self.waits.append(seconds)


@pytest.mark.parametrize("attempt", range(3))
def test_waits_grow_until_half_a_minute(attempt):
    """The first is at most as long as was set, each further one twice as long; chance shortens them by up to a half."""
    interrupt = Interrupt(8)
    config = Config().changed(otlp_endpoint=f"http://127.0.0.1:{free_port()}", otlp_timeout_s=3600)
    client = HttpClient(Endpoint.for_traces(config), interrupt, version="0", backoff_s=0.5)
    assert client.post(b"x").reason == "unreachable"
    client.close()
    assert len(interrupt.waits) == 8
    for wait_s, longest_s in zip(interrupt.waits, [0.5, 1, 2, 4, 8, 16, 30, 30], strict=True):
        assert longest_s / 2 <= wait_s <= longest_s
    assert len(Counter(interrupt.waits)) == 8
