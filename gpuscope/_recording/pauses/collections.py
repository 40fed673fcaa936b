"""
Garbage collections that may matter: those of the oldest generation, and those longer than 1 ms; the newest of them.

What `gc` calls is in C alone, also here in the twin of `csrc/current.h`: a callback in Python would swallow what a
signal handler raises in it. So a collection is put down by an iterator that reads the clock and appends, which a
property's setter advances.
"""

from __future__ import annotations

import gc
import operator
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from gpuscope._data.native import native

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 1024
LONG_NS = 1_000_000
FULL = 2
"""The oldest generation."""
_UNREAD = 8192
"""Collections of the twin that nobody has looked at yet; older ones are forgotten."""
_ignore: Any = operator.is_
"""Does nothing, in C."""


class Collection(NamedTuple):
    """One collection, by the records' clock."""

    start_ns: int
    end_ns: int
    generation: int


class _Starts(map):  # type: ignore[type-arg]  # It is what `next` advances.
    """Reads the clock where a collection starts."""

    start, stop = property(fset=next), property(fset=_ignore)


class _Stops(map):  # type: ignore[type-arg]  # As above.
    """Reads the clock where a collection stops."""

    start, stop = property(fset=_ignore), property(fset=next)


class _Facts(deque):  # type: ignore[type-arg]  # Of what `gc` tells.
    """Keeps what is told of a collection that stops."""

    start, stop = property(fset=_ignore), property(fset=deque.append)


class Collections:
    """
    The twin in Python.

    Args:
        clock: of the records.

    """

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._started: deque[int] = deque(maxlen=_UNREAD)
        self._stopped: deque[int] = deque(maxlen=_UNREAD)
        self._facts: deque[dict[str, int]] = _Facts(maxlen=_UNREAD)
        readings = iter(clock, None)
        self.callbacks = (
            partial(setattr, _Starts(self._started.append, readings)),
            partial(setattr, self._facts),
            partial(setattr, _Stops(self._stopped.append, readings)),
        )
        self._turn = threading.Lock()
        self._count = 0
        self._known: deque[Collection] = deque(maxlen=MOST)

    def since(self, seen: int) -> tuple[int, list[Collection]]:
        """Return how many there were, and those after the first `seen` that are still known."""
        if self._turn.acquire(blocking=False):  # Who comes meanwhile has them the next time.
            try:
                self._take()
            finally:
                self._turn.release()
        new = self._count - seen
        return self._count, [*self._known][-new:] if new > 0 else []

    def _take(self) -> None:
        while self._stopped:
            end_ns, facts = self._stopped.popleft(), self._facts.popleft()
            start_ns = None
            while self._started and self._started[0] <= end_ns:
                start_ns = self._started.popleft()
            generation = facts.get("generation", 0)
            if start_ns is not None and (generation >= FULL or end_ns - start_ns > LONG_NS):
                self._known.append(Collection(start_ns, end_ns, generation))
                self._count += 1


collections_in_python = Collections()


def collections_since(seen: int) -> tuple[int, list[Collection]]:
    """Return how many collections that matter there were, and those after the first `seen` that are still known."""
    if native is None:
        return collections_in_python.since(seen)
    count, found = native.collections_since(seen)
    return count, [Collection(*each) for each in found]


def watch_pauses() -> None:
    """Have `gc` tell of its collections; `current_stage.watch_collections` does where the parts in C are there."""
    if native is None and collections_in_python.callbacks[0] not in gc.callbacks:
        gc.callbacks.extend(collections_in_python.callbacks)
