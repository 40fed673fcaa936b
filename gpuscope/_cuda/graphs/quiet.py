"""
While a graph of PyTorch's is captured no stream is asked whether it has work: a question would break the capture.

The sampler asks each stream first whether it is being captured, and between the two questions a capture may begin. So
it is held from before a capture begins until it has ended, however it ends. Waits only for a question that is on its
way, which takes microseconds. Without the parts in C nothing is asked, and captures are only counted here.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import TYPE_CHECKING

from gpuscope._data.native import native

if TYPE_CHECKING:
    from collections.abc import Callable


class Quiet:
    """Holds the samplers of this process, once per graph that is being captured."""

    def __init__(self) -> None:
        self._can_hold = hasattr(native, "hold_samplers")
        self.begun = 0
        """How many captures have begun, or tried to, since the start."""
        self._held: dict[int, weakref.finalize[..., object]] = {}
        """By the `id` of the graph; one that goes away in its capture lets go."""
        self._lock = threading.RLock()  # A garbage collection within may end a capture.

    def begin(self, graph: object) -> None:
        """Have nothing asked until `end`."""
        self.begun += 1
        self.end(graph)  # Of a capture that failed without our seeing it.
        hold, let_go = (native.hold_samplers, native.release_samplers) if self._can_hold else (_nothing, _nothing)
        hold()
        try:
            release = weakref.finalize(graph, let_go)
        except BaseException:  # A graph without weak references, or an interrupt: its capture is on its own.
            let_go()
            raise
        release.atexit = False
        with self._lock:
            self._held[id(graph)] = release

    def end(self, graph: object) -> None:
        """Let the samplers go on; does nothing where this graph does not hold them."""
        with self._lock:
            release = self._held.pop(id(graph), None)
        if release is not None:
            release()

    @property
    def is_capturing(self) -> bool:
        """Whether a graph is being captured now, as far as it was seen."""
        return any(release.alive for release in list(self._held.values()))

    def forget(self) -> None:
        """Hold nothing: this process is a forked child, which has no samplers yet."""
        for release in self._held.values():
            release.detach()
        self._held = {}

    def around(self, begin: Callable[[], object], graph: object) -> object:
        """Begin a capture; where that fails, nothing is held."""
        with contextlib.suppress(TypeError):  # As above.
            self.begin(graph)
        try:
            return begin()
        except BaseException:  # It goes on.
            self.end(graph)
            raise


def _nothing() -> None:
    """Hold no sampler where there can be none."""
