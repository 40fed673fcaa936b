"""
A recording on its way to an OTLP endpoint, after the program that made it.

Sends on the caller's thread, one payload after the other, and counts what became of each stage. After a failure that
is not about one payload nothing more is sent. Reads no files.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gpuscope._data.statistics import Delivery
from gpuscope.exporters._pieces import Chunk, post
from gpuscope.exporters._transport.http import Outcome
from gpuscope.exporters._transport.sender import Limits

if TYPE_CHECKING:
    from threading import Event

    from gpuscope.exporters._recorded import Part
    from gpuscope.exporters._transport.http import Client
    from gpuscope.exporters.otlp import Envelope

_OF_THE_PAYLOAD = frozenset(("", "rejected", "http_400", "http_413", "grpc_invalid_argument"))
"""Outcomes after which the next payload may fare better. All else is about the endpoint, or about the way to it."""
NOT_SENT = "not_sent"


class FirstTry:
    """
    A client whose first payload finds out at once that nobody listens; all others have their time for retries.

    Args:
        client: sends the payloads.
        interrupt: the client's: while it is set, each payload is tried once. It is set until the first is sent.

    """

    def __init__(self, client: Client, interrupt: Event) -> None:
        self.shown_url = client.shown_url
        self._client, self._interrupt = client, interrupt
        self._interrupt.set()

    def post(self, payload: bytes) -> Outcome:
        """Send the payload, and again where that may help."""
        first = self._interrupt.is_set()
        outcome = self._client.post(payload)
        if not first or outcome.reason == "unreachable":
            return outcome
        self._interrupt.clear()
        return self._client.post(payload) if outcome.retry else outcome

    def close(self) -> None:
        """Free what is the client's own."""
        self._client.close()


class Resender:
    """
    Takes the spans of a recording and sends them in payloads, each of one process.

    Args:
        client: sends one payload, and tries again within its own time.
        limits: how much is sent at once, and how much of several processes' is held.

    """

    def __init__(self, client: Client, limits: Limits | None = None) -> None:
        self.stages = self.spans = self.delivered = 0
        """The stages taken, their spans, and how many of the stages the endpoint took."""
        self.lost: Counter[str] = Counter()
        """The other stages, by reason."""
        self.worst = Outcome()
        """The first failure."""
        self._client = client
        self._limits = limits or Limits(delay_s=0.0)
        self._waiting: dict[Envelope, list[Chunk]] = {}
        self._bytes = 0
        self._stopped = False

    def add(self, part: Part) -> None:
        """Take spans, and send what is due."""
        self.stages += part.stages
        self.spans += part.spans
        waiting = self._waiting.setdefault(part.envelope, [])
        if waiting and not self._fits(waiting, part):
            self._send(part.envelope)
            waiting = self._waiting.setdefault(part.envelope, [])
        waiting.append(Chunk(part.body, Delivery(self._settle, part.stages, 1), 0.0))
        self._bytes += len(part.body)
        if self._bytes > self._limits.buffer_bytes:
            self.finish()

    def finish(self) -> None:
        """Send what is held."""
        for envelope in list(self._waiting):
            self._send(envelope)

    def _fits(self, waiting: list[Chunk], part: Part) -> bool:
        stages = sum(chunk.delivery.stages for chunk in waiting) + part.stages
        size = sum(len(chunk.body) for chunk in waiting) + len(part.body)
        return stages <= self._limits.payload_stages and size <= self._limits.payload_bytes

    def _send(self, envelope: Envelope) -> None:
        chunks = self._waiting.pop(envelope)
        self._bytes -= sum(len(chunk.body) for chunk in chunks)
        outcome = Outcome(NOT_SENT)
        if not self._stopped:
            outcome = post(chunks, self._client, envelope.wrap, lambda: True)
            self._stopped = outcome.reason not in _OF_THE_PAYLOAD
            self.worst = self.worst if self.worst.reason else outcome
        for chunk in chunks:
            chunk.settle(outcome.reason)

    def _settle(self, _stages: int, exported: int, lost: Counter[str]) -> None:
        self.delivered += exported
        self.lost += lost
