"""
What one period of recording leaves to the next: event pairs, and what anchors are taken with.

No event or stream is ever destroyed, because the GPU may still be about to record it. So without this a process that
switches its settings again and again would pile them up.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections import deque

    from gpuscope._cuda.driver import Handle
    from gpuscope._cuda.timed_stream import Pair


class AnchorParts(NamedTuple):
    """What one thread at a time takes anchors of a device with."""

    stream: Handle
    """A private one."""
    ring: deque[Handle]
    """Events."""
    in_a_row: list[Handle]
    """Further events, by which it is measured what a pair takes; none where nobody measures that."""


class Spares:
    """The process's, by the addresses of contexts. It has no lock, because each step is one of a `dict` or a `list`."""

    def __init__(self) -> None:
        self._pairs: dict[int | None, list[Pair]] = {}
        self._anchor_parts: dict[int | None, list[AnchorParts]] = {}

    def pairs(self, context: Handle) -> list[Pair]:
        """Return the pairs of a context that nobody uses: always the same list, which all periods share."""
        return self._pairs.setdefault(context.value, [])

    def take_anchor_parts(self, context: Handle) -> AnchorParts | None:
        """Return what an earlier period has given back, which is the caller's from now on; None if there is nothing."""
        with contextlib.suppress(IndexError):
            return self._anchor_parts.setdefault(context.value, []).pop()
        return None

    def give_anchor_parts(self, context: Handle, parts: AnchorParts) -> None:
        """Keep them for a later period. The thread that took anchors with them has ended."""
        self._anchor_parts.setdefault(context.value, []).append(parts)


spares = Spares()
