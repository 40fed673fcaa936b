"""
Payloads in pieces: what an endpoint finds too large goes again in halves, down to a single stage.

Counts what became of each batch's stages. Starts no thread and settles nothing by itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gpuscope.exporters._encoding.otlp_message import rejected_spans, split_stages
from gpuscope.exporters._transport.http import Client, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuscope._data.statistics import Delivery

_TOO_LARGE = "http_413"
_LEAST_BYTES = 2048
"""An endpoint that finds so little too large takes nothing."""
_MOST_POSTS = 64
"""For one payload, with all its halves."""
_MESSAGE = 300
"""Characters of an endpoint's message that are shown."""


@dataclass(slots=True, eq=False)
class Chunk:
    """One batch's encoded spans, and the delivery to settle for them."""

    body: bytes
    delivery: Delivery
    taken_at_s: float
    delivered: int = 0
    """Its stages that an endpoint took."""
    lost: Counter[str] = field(default_factory=Counter)
    """Its stages that are known to be lost, by reason."""

    def settle(self, rest: str = "") -> None:
        """Report what became of it; stages of which nothing is known are lost for the reason given, if any."""
        unknown = max(self.delivery.stages - self.delivered - self.lost.total(), 0)
        lost = self.lost + Counter({rest: unknown} if rest else {})
        self.delivery.settle(max(self.delivery.stages - lost.total(), 0), lost)


class Piece(NamedTuple):
    """What is sent of a chunk at once: all of it, unless an endpoint found it too large."""

    chunk: Chunk
    body: bytes
    stages: int


def post(
    chunks: list[Chunk], client: Client, wrap: Callable[[list[bytes]], bytes], is_wanted: Callable[[], bool]
) -> Outcome:
    """
    Send chunks as one payload, or in halves, and note in them what became of their stages.

    Args:
        chunks: of one payload.
        client: sends it.
        wrap: makes a payload of spans.
        is_wanted: whether anybody still waits for what comes of it.

    Returns:
        What is to be said of it: the worst of what came of the halves.

    """
    waiting, sent, worst = [[Piece(chunk, chunk.body, chunk.delivery.stages) for chunk in chunks]], 0, Outcome()
    while waiting and is_wanted():
        pieces = waiting.pop()
        outcome = client.post(wrap([piece.body for piece in pieces]))
        sent += 1
        halves = _halves(pieces) if outcome.reason == _TOO_LARGE and sent < _MOST_POSTS else []
        if halves:
            waiting += halves
        else:
            said = _note(pieces, outcome)
            worst = said if said.detail else worst
    return worst


def _note(pieces: list[Piece], outcome: Outcome) -> Outcome:
    """Count the stages of pieces that have their outcome, and return what is to be said of it."""
    rejected, message = rejected_spans(outcome.body) if outcome.body else (0, "")
    left = rejected
    for chunk, _, stages in pieces:
        # The endpoint does not say which spans it rejected, and a stage has one or two: assume a stage for each.
        missing = stages if outcome.reason else min(left, stages)
        left -= missing
        chunk.delivered += stages - missing
        if missing:
            chunk.lost[outcome.reason or "rejected"] += missing
    if not rejected:
        return outcome
    said = "".join(sign for sign in message[:_MESSAGE] if sign.isprintable()) or "the endpoint does not say why"
    return Outcome("rejected", f"{rejected} spans rejected: {said}")


def _halves(pieces: list[Piece]) -> list[list[Piece]]:
    """Return about one half of the stages each, or nothing where that would not help."""
    if sum(len(piece.body) for piece in pieces) <= _LEAST_BYTES:
        return []
    if len(pieces) == 1:
        chunk, body, _ = pieces[0]
        pieces = [Piece(chunk, part, 1) for part in split_stages(body)]
    half = len(pieces) // 2
    return [_joined(pieces[half:]), _joined(pieces[:half])] if half else []


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Return the same with one piece for each chunk."""
    found: dict[int, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(id(piece.chunk), []).append(piece)
    return [
        Piece(parts[0].chunk, b"".join(part.body for part in parts), sum(part.stages for part in parts))
        for parts in found.values()
    ]
