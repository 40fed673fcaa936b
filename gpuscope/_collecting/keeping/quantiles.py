"""
A running quantile of how long requests take, per kind of request: of the newest so many of each kind.

Arithmetic on columns; exact within its window.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_WINDOW = 2048
"""Requests that a quantile is of; 16 KiB per kind. At 0.999, two of them lie above it."""
_LEAST = 200
_BEYOND = 2
"""A quantile is used once so many of the requests lie beyond it, and 200 requests at least have been seen."""
_RENEWED = 16
"""It is worked out anew when one part in so many of the window is new, which takes some 20 µs."""
_KINDS = 256
"""Kinds of which there are quantiles; of further ones nothing is kept by this rule."""


class _Window:
    """The newest durations of one kind, in nanoseconds."""

    def __init__(self, least: int) -> None:
        self._durations = np.empty(_WINDOW, np.int64)
        self._seen = self._fresh = 0
        self._least = least
        self._limit: int | None = None

    def limit(self, quantile: float) -> int | None:
        """Return the quantile; None before there are enough."""
        if self._seen < self._least:
            return None
        held = min(self._seen, _WINDOW)
        if self._limit is None or self._fresh * _RENEWED >= held:
            place = math.ceil(quantile * held) - 1
            self._limit = int(np.partition(self._durations[:held], place)[place])
            self._fresh = 0
        return self._limit

    def add(self, durations: NDArray[np.int64]) -> None:
        newest = durations[-_WINDOW:]
        places = np.arange(self._seen, self._seen + len(newest)) % _WINDOW
        self._durations[places] = newest
        # Counted without those that a large batch has overwritten at once, so that places follow each other.
        self._seen += len(newest)
        self._fresh += len(newest)


class Quantiles:
    """
    The quantiles of all kinds.

    Args:
        quantile: between 0 and 1.

    """

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self.least = max(_LEAST, math.ceil(_BEYOND / (1 - quantile) - 1e-9))
        """From so many requests of a kind on there is a quantile."""
        self._windows: dict[str, _Window] = {}

    def beyond(self, kind: str, durations: NDArray[np.int64]) -> NDArray[np.bool_]:
        """
        Return which of these requests take longer than the quantile of those before; then they count themselves.

        Args:
            kind: name of the outermost stage.
            durations: in nanoseconds.

        """
        window = self._windows.get(kind)
        if window is None:
            if len(self._windows) >= _KINDS:
                return np.zeros(len(durations), np.bool_)
            window = self._windows[kind] = _Window(self.least)
        limit = window.limit(self._quantile)
        window.add(durations)
        slower: NDArray[np.bool_] = np.zeros(len(durations), np.bool_) if limit is None else durations > limit
        return slower
