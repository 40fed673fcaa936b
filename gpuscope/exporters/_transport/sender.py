"""
The thread that sends encoded spans, with a bounded buffer before it.

Never looks inside the bytes, and never makes its caller wait for the network, except in `flush` and `shutdown`, which
take a timeout. Settles each delivery exactly once.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from threading import Condition, Event, Thread
from time import monotonic
from typing import TYPE_CHECKING

from gpuscope._log import COUNTED, WarnOnce, inform
from gpuscope.exporters._pieces import Chunk, post
from gpuscope.exporters._transport.http import Client, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextvars import Token

    from opentelemetry.context import Context

    from gpuscope._data.statistics import Delivery

SUPPRESS = "suppress_instrumentation"
"""The key in OpenTelemetry's context by which its instrumentation of HTTP clients leaves a thread alone."""
_REFUSED = {
    "buffer_full": "the endpoint takes spans more slowly than they are recorded",
    "shutdown": "the exporter is shut down already",
}
"""Why `put` takes no batch, for the log."""
_ADVICE = {
    "unreachable": " Does an OpenTelemetry Collector or Jaeger listen there? With GPUSCOPE_EXPORTER=file stages go to "
    "a file instead, for `gpuscope report`."
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is sent at once and how much is held."""

    delay_s: float
    """How long the first batch of a payload waits for others."""
    payload_stages: int = 4096
    """This and the following bound a payload; a batch that exceeds them is sent alone."""
    payload_bytes: int = 3 << 20
    """Many receivers of gRPC take 4 MiB at most."""
    buffer_bytes: int = 32 << 20
    """Of all that is held, the request in progress included; what comes on top is lost as `buffer_full`."""


class Sender:
    """
    Holds chunks and sends them, several at a time, from a daemon thread of its own.

    Args:
        client: sends one payload. Only the sender's thread uses it.
        interrupt: is set at shutdown, to end the client's waits.
        wrap: makes a payload of the bytes of several chunks.
        limits: bounds and delay.

    """

    def __init__(self, client: Client, interrupt: Event, wrap: Callable[[list[bytes]], bytes], limits: Limits) -> None:
        self._client = client
        self._interrupt = interrupt
        self._wrap = wrap
        self._limits = limits
        self._changed = Condition()
        self._waiting: deque[Chunk] = deque()
        self._in_flight: list[Chunk] = []
        self._bytes = 0
        self._stages = 0
        self._put = 0
        self._settled = 0
        self._due = 0
        self._closing = False
        self._succeeded = False
        self._warnings = WarnOnce(COUNTED)
        # Started here and not when there is something to send: Python 3.12 and later start no thread once the
        # interpreter has begun to exit, which is when the last spans come.
        self._thread = start_thread(self._run, "gpuscope-sender")

    @property
    def shown_url(self) -> str:
        """Where payloads go, without secrets."""
        return self._client.shown_url

    @property
    def pending_stages(self) -> int:
        """The stages held, those in the request in progress included."""
        with self._changed:
            return self._stages + sum(chunk.delivery.stages for chunk in self._in_flight)

    def put(self, body: bytes, delivery: Delivery) -> None:
        """Take a batch's bytes, or settle it as lost where there is no room."""
        with self._changed:
            reason = self._refusal(len(body))
            if not reason:
                self._waiting.append(Chunk(body, delivery, monotonic()))
                self._bytes += len(body)
                self._stages += delivery.stages
                self._put += 1
                # The first chunk starts the delay and a full payload ends it; in between, nobody needs to wake.
                if len(self._waiting) == 1 or self._is_due():
                    self._changed.notify_all()
        if reason:
            # First the log: if a handler of the application's raises, the caller settles the delivery.
            self._warn(reason, _REFUSED[reason])
            delivery.settle(0, {reason: delivery.stages})

    def flush(self, timeout_s: float) -> bool:
        """Send what is held; return whether all of it was settled within the time."""
        with self._changed:
            target = self._due = self._put
            self._changed.notify_all()
        self._send_here(timeout_s)
        with self._changed:
            return self._changed.wait_for(lambda: self._settled >= target, timeout_s)

    def shutdown(self, timeout_s: float) -> None:
        """Send what can be sent within the time and settle the rest as lost."""
        self._send_here(timeout_s)
        with self._changed:
            self._closing = True
            self._interrupt.set()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._settled >= self._put, timeout_s)
            # A request in progress cannot be called back. Whoever takes its chunks off the list settles them, so the
            # thread, which stays behind if the endpoint hangs, will find none.
            abandoned = [*self._take_in_flight(), *self._waiting]
            self._waiting.clear()
            self._bytes = self._stages = 0
            self._settled = self._put
            self._changed.notify_all()
        if abandoned:
            for chunk in abandoned:
                chunk.settle("shutdown")
            self._warn("shutdown", "the time ran out with spans unsent")
        if self._thread is None:
            self._client.close()

    def _refusal(self, size: int) -> str:
        if self._closing:
            return "shutdown"
        held = self._bytes + sum(len(chunk.body) for chunk in self._in_flight)
        return "buffer_full" if held + size > self._limits.buffer_bytes else ""

    def _is_due(self) -> bool:
        full = self._stages >= self._limits.payload_stages or self._bytes >= self._limits.payload_bytes
        return full or self._closing or self._settled < self._due

    def _run(self) -> None:
        suppress_instrumentation()
        while chunks := self._next_payload():
            self._send(chunks)
        self._client.close()

    def _send_here(self, timeout_s: float) -> None:
        """Send what is held on the thread that asks, within about the time, where a thread could not be started."""
        if self._thread is not None:
            return
        until_s = monotonic() + timeout_s
        with without_instrumentation():
            while self._waiting and monotonic() < until_s:
                with self._changed:
                    self._in_flight = self._take_waiting()
                error = self._send(list(self._in_flight))
                if error is not None and not isinstance(error, Exception):
                    raise error  # On this thread it is the program's.

    def _send(self, chunks: list[Chunk]) -> BaseException | None:
        """Send a payload and settle it; return what it failed with, where it was not the endpoint."""
        failure = None
        try:
            outcome = post(chunks, self._client, self._wrap, lambda: bool(self._in_flight))
        except BaseException as error:  # Whatever it is, the thread must outlive it, or all later spans are lost.
            failure, outcome = error, Outcome("error", type(error).__name__)  # Its message may quote headers.
        # The application's log handlers may raise, and the thread must outlive them.
        with contextlib.suppress(Exception):
            self._conclude(outcome)
        return failure

    def _next_payload(self) -> list[Chunk]:
        """Wait until a payload is due and return its chunks; return none once all is done."""
        with self._changed:
            while not (self._waiting and self._is_due()):
                if self._closing:
                    return []
                wait_s = self._wait_s()
                if wait_s is not None and wait_s <= 0:
                    break
                self._changed.wait(wait_s)
            self._in_flight = self._take_waiting()
            return list(self._in_flight)

    def _wait_s(self) -> float | None:
        return self._waiting[0].taken_at_s + self._limits.delay_s - monotonic() if self._waiting else None

    def _take_waiting(self) -> list[Chunk]:
        taken: list[Chunk] = []
        stages = size = 0
        while self._waiting and (not taken or self._fits(stages, size)):
            chunk = self._waiting.popleft()
            taken.append(chunk)
            stages += chunk.delivery.stages
            size += len(chunk.body)
        self._stages -= stages
        self._bytes -= size
        return taken

    def _fits(self, stages: int, size: int) -> bool:
        chunk = self._waiting[0]
        return (
            stages + chunk.delivery.stages <= self._limits.payload_stages
            and size + len(chunk.body) <= self._limits.payload_bytes
        )

    def _take_in_flight(self) -> list[Chunk]:
        taken, self._in_flight = self._in_flight, []
        return taken

    def _conclude(self, outcome: Outcome) -> None:
        """Settle what was in flight, if shutdown has not; log last, because the application's handlers may raise."""
        with self._changed:
            chunks = self._take_in_flight()
        for chunk in chunks:
            # What has no fate of its own has that of the payload, unless the endpoint took this.
            chunk.settle(outcome.reason)
        with self._changed:
            self._settled += len(chunks)
            self._changed.notify_all()
        if not chunks:
            return
        if outcome.reason:
            self._warn(outcome.reason, outcome.detail)
        elif not self._succeeded:
            self._succeeded = True
            inform("exporting spans to %s.", self._client.shown_url)

    def _warn(self, reason: str, detail: str) -> None:
        advice = _ADVICE.get(reason, "")
        self._warnings.warn(reason, "cannot export to %s: %s (%s).%s", self._client.shown_url, reason, detail, advice)


def start_thread(work: Callable[[], None], name: str) -> Thread | None:
    """Return a daemon thread that does some work, or None: 3.12.0 to 3.12.2 start none once the program has ended."""
    thread = Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def suppress_instrumentation() -> Token[Context]:
    """Keep the application's instrumentation of HTTP clients from making spans of our requests, and so on forever."""
    from opentelemetry import context

    private = getattr(context, "_SUPPRESS_INSTRUMENTATION_KEY", SUPPRESS)
    return context.attach(context.set_value(SUPPRESS, True, context.set_value(private, True)))


@contextlib.contextmanager
def without_instrumentation() -> Iterator[None]:
    """Do the same for the length of a block."""
    from opentelemetry import context

    token = suppress_instrumentation()
    try:
        yield
    finally:
        context.detach(token)
