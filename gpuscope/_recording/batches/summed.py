"""
`Summed`: a member of many batches in turn, whose waits and shares are summed; what both sides know of it.

The application's threads write, the collector reads: one writer per field, and nothing is taken back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuscope._data.attributes import TIME_PER_OUTPUT_TOKEN, TIME_TO_FIRST_TOKEN
from gpuscope._data.native import native

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuscope._recording.batches.token import Token


if TYPE_CHECKING or native is None:

    class SummedFields:
        """What each batch needs of it."""

        __slots__ = ("ended", "steps", "token")

else:
    SummedFields = native.SummedFields


class Summed(SummedFields):
    """What takes part in many batches, and has one light span for all of them."""

    __slots__ = ("error_type", "first_step", "first_token_ns", "last_token_ns", "tokens", "told")

    def __init__(self, token: Token, told: Mapping[str, str]) -> None:
        self.token = token
        self.told = told
        """Which operation it is, of which model and whose, as far as that was said, by OpenTelemetry's names."""
        self.steps = 0
        """How many batches it has joined."""
        self.first_step: int | None = None
        """Which of them, from 0, makes its first token; None where that is not known yet."""
        self.tokens = 0
        """How many it has had."""
        self.first_token_ns = self.last_token_ns = 0
        """When, by the records' clock."""
        self.error_type: str | None = None
        """What made it fail."""
        self.ended = False
        """Whether it joins no other batch."""

    def times_s(self) -> dict[str, float]:
        """Return seconds to the first token, and per token after it, by the host's clock and OpenTelemetry's names."""
        found = {}
        if self.tokens and self.token:
            found[TIME_TO_FIRST_TOKEN] = (self.first_token_ns - self.token.time_ns) / 1e9
        if self.tokens > 1:
            rest_ns = self.last_token_ns - self.first_token_ns
            found[TIME_PER_OUTPUT_TOKEN] = rest_ns / 1e9 / (self.tokens - 1)
        return found
