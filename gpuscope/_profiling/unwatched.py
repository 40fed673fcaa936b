"""
What a deep look did to the program: how long stages take while nobody watches, and what their time is without watching.

Keeps a few lengths of each stage on the host, noted before the look, and computes with them; judges nothing.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_STAGES = 500
MAX_CALLS = 1000
"""Of each stage so many lengths are kept, at most."""


class Unwatched:
    """The lengths of stages within their requests. Threads may add to it at the same time."""

    def __init__(self) -> None:
        self._lengths: dict[tuple[str, str], list[int]] = {}

    def add(self, root: str, name: str, began_ns: int) -> None:
        """Note that a stage ends now, which began at this time of `time.perf_counter_ns`."""
        lengths = self._lengths.get((root, name))
        if lengths is None:
            if len(self._lengths) >= MAX_STAGES:
                return
            lengths = self._lengths.setdefault((root, name), [])
        if len(lengths) < MAX_CALLS:
            lengths.append(time.perf_counter_ns() - began_ns)

    def note(self) -> list[tuple[str, str, int]]:
        """Return (outermost stage, stage, median nanoseconds)."""
        return [(root, name, round(statistics.median(each))) for (root, name), each in list(self._lengths.items())]


def without_watching(parts: Mapping[str, float], host: float) -> dict[str, float]:
    """
    Return the parts of a window as they are without the profiler, which makes launches slower and kernels not.

    The window is as much shorter as the host is faster, but never shorter than the GPU's work in it. What the GPU does
    stays. The time in which it has nothing to do is what is left; launches, which took longer, give the most of it.

    Args:
        parts: The fields of `measures.Times`, in any unit.
        host: How long the host is in the stage without the profiler, in the same unit.

    """
    busy = parts["compute"] + parts["transfer"]
    tail = parts["window"] - parts["host"]
    window = min(parts["window"], max(busy, host + tail))
    gone = parts["window"] - window
    dispatch = max(0.0, parts["dispatch"] - gone)
    rest = parts["sync"] + parts["host_only"]
    kept = max(0.0, window - busy - dispatch) / rest if rest else 1.0
    others = {name: parts[name] * min(1.0, kept) for name in ("sync", "host_only", "computing")}
    waits = parts["wait"] + parts["copy_wait"]
    # The host waits in the stage, and for no longer than it is there.
    waited = min(1.0, host / waits) if waits else 1.0
    waits_for = {name: parts[name] * waited for name in ("wait", "copy_wait")}
    return {**parts, **others, **waits_for, "window": window, "host": min(host, window), "dispatch": dispatch}
